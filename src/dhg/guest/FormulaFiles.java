import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.io.Reader;
import java.io.Writer;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.Set;
import javax.lang.model.element.Modifier;
import javax.lang.model.element.NestingKind;
import javax.tools.FileObject;
import javax.tools.ForwardingJavaFileManager;
import javax.tools.JavaFileObject;
import javax.tools.SimpleJavaFileObject;
import javax.tools.StandardJavaFileManager;
import javax.tools.StandardLocation;

/**
 * The files of one javac that compiles formulas: the jars of the class path by the image's index, the rest of the class path and
 * the JDK by javac's own file manager, and class files into a directory that is another each time.
 */
final class FormulaFiles extends ForwardingJavaFileManager<StandardJavaFileManager> {
    final String classPath;
    /** Where class files go. */
    Path target;

    private final ClassIndex index;
    private final Map<String, String> handled = new HashMap<>();

    FormulaFiles(StandardJavaFileManager files, String classPath, ClassIndex index) {
        super(files);
        this.classPath = classPath;
        Set<String> indexed = index == null ? Set.of() : index.jars();
        List<String> rest = new ArrayList<>();
        List<String> parts = List.of(classPath.split(File.pathSeparator));
        for (String part : parts) {
            if (!indexed.contains(part)) {
                rest.add(part);
            }
        }
        // The index is for the class path that it was made of.
        this.index = index != null && parts.containsAll(indexed) ? index : null;
        String own = this.index == null ? classPath : String.join(File.pathSeparator, rest);
        files.handleOption("-cp", List.of(own).iterator());
    }

    /** Whether the jars of this class path are those of the index. */
    boolean isIndexed() {
        return index != null;
    }

    /** Files are written at once; the manager below would forget its index of packages, and sort it anew each time. */
    @Override
    public void flush() {}

    /** The same for an option of javac's own that comes with each compilation. */
    @Override
    public boolean handleOption(String option, Iterator<String> rest) {
        if (!option.equals("--multi-release")) {
            return super.handleOption(option, rest);
        }
        String value = rest.next();
        return value.equals(handled.put(option, value)) || super.handleOption(option, List.of(value).iterator());
    }

    /** Where plugins would come from: not from the jars, which are many. */
    @Override
    public ClassLoader getClassLoader(Location location) {
        return ClassLoader.getPlatformClassLoader();
    }

    @Override
    public Iterable<JavaFileObject> list(Location location, String packageName, Set<JavaFileObject.Kind> kinds, boolean recurse)
            throws IOException {
        Iterable<JavaFileObject> others = super.list(location, packageName, kinds, recurse);
        if (index == null || location != StandardLocation.CLASS_PATH || !kinds.contains(JavaFileObject.Kind.CLASS)) {
            return others;
        }
        List<JavaFileObject> found = new ArrayList<>();
        others.forEach(found::add);
        index.list(packageName).forEach(entry -> found.add(new InJar(entry)));
        if (recurse) {
            for (String below : index.below(packageName)) {
                index.list(below).forEach(entry -> found.add(new InJar(entry)));
            }
        }
        return found;
    }

    @Override
    public String inferBinaryName(Location location, JavaFileObject file) {
        if (file instanceof InJar) {
            ClassIndex.Entry entry = ((InJar) file).entry;
            return entry.packageName.isEmpty() ? entry.name : entry.packageName + "." + entry.name;
        }
        return super.inferBinaryName(location, file);
    }

    @Override
    public boolean isSameFile(FileObject one, FileObject other) {
        return one instanceof InJar || other instanceof InJar ? one.equals(other) : super.isSameFile(one, other);
    }

    @Override
    public JavaFileObject getJavaFileForOutput(Location location, String name, JavaFileObject.Kind kind, FileObject sibling) {
        Path path = target.resolve(name.replace('.', '/') + kind.extension);
        return new SimpleJavaFileObject(path.toUri(), kind) {
            @Override
            public OutputStream openOutputStream() throws IOException {
                Files.createDirectories(path.getParent());
                return Files.newOutputStream(path);
            }
        };
    }

    /** A class of the index. Unlike SimpleJavaFileObject it has no URI before it is asked for one: packages have hundreds. */
    private static final class InJar implements JavaFileObject {
        final ClassIndex.Entry entry;

        InJar(ClassIndex.Entry entry) {
            this.entry = entry;
        }

        @Override
        public boolean equals(Object other) {
            return other instanceof InJar && ((InJar) other).getName().equals(getName());
        }

        @Override
        public int hashCode() {
            return entry.name.hashCode();
        }

        @Override
        public URI toUri() {
            return URI.create("jar:" + Path.of(entry.jarPath()).toUri() + "!/" + entry.path());
        }

        @Override
        public String getName() {
            return entry.jarPath() + "(/" + entry.path() + ")";
        }

        @Override
        public InputStream openInputStream() throws IOException {
            return entry.open();
        }

        @Override
        public Reader openReader(boolean ignoreEncodingErrors) throws IOException {
            return new InputStreamReader(openInputStream(), StandardCharsets.UTF_8);
        }

        @Override
        public CharSequence getCharContent(boolean ignoreEncodingErrors) {
            throw new UnsupportedOperationException();
        }

        @Override
        public OutputStream openOutputStream() {
            throw new UnsupportedOperationException();
        }

        @Override
        public Writer openWriter() {
            throw new UnsupportedOperationException();
        }

        @Override
        public long getLastModified() {
            return 0;
        }

        @Override
        public boolean delete() {
            return false;
        }

        @Override
        public Kind getKind() {
            return Kind.CLASS;
        }

        @Override
        public boolean isNameCompatible(String simpleName, Kind kind) {
            return kind == Kind.CLASS && entry.name.equals(simpleName);
        }

        @Override
        public NestingKind getNestingKind() {
            return null;
        }

        @Override
        public Modifier getAccessLevel() {
            return null;
        }
    }
}
