import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.jar.JarFile;
import java.util.zip.ZipEntry;
import java.util.zip.ZipFile;

/**
 * Which classes the jars of the class path have, by package, as a file of the image says (image/compilepath.py): a line a jar, an
 * empty line, and a line a package: its name, and then "#" and the number of a jar or the name of a class in the jar named last,
 * separated by tabs. Of a class that several jars have only the first jar's is there.
 *
 * javac's own way is to open every jar once more, and to keep an object for each of its entries: forty megabytes.
 */
final class ClassIndex {
    /** A class in a jar. */
    static final class Entry {
        final ClassIndex index;
        final int jar;
        final String packageName;
        final String name;

        Entry(ClassIndex index, int jar, String packageName, String name) {
            this.index = index;
            this.jar = jar;
            this.packageName = packageName;
            this.name = name;
        }

        String path() {
            return (packageName.isEmpty() ? "" : packageName.replace('.', '/') + "/") + name + ".class";
        }

        String jarPath() {
            return index.jars.get(jar);
        }

        InputStream open() throws IOException {
            JarFile file = index.file(jar);
            ZipEntry entry = file.getEntry(path());
            if (entry == null) {
                throw new NoSuchFileException(jarPath() + "!/" + path());
            }
            return file.getInputStream(entry);
        }
    }

    private final byte[] text;
    private final List<String> jars = new ArrayList<>();
    private final Map<String, Integer> packages = new HashMap<>();
    /** Opened when they are first read from. The JVM's own class loader has them open, too: what they hold is there once. */
    private final JarFile[] files;

    ClassIndex(Path path) throws IOException {
        text = Files.readAllBytes(path);
        boolean header = true;
        for (int start = 0; start < text.length;) {
            int end = start;
            int tab = -1;
            for (; text[end] != '\n'; end++) {
                if (tab < 0 && text[end] == '\t') {
                    tab = end;
                }
            }
            if (end == start) {
                header = false;
            } else if (header) {
                jars.add(string(start, end));
            } else {
                packages.put(string(start, tab), tab + 1);
            }
            start = end + 1;
        }
        files = new JarFile[jars.size()];
    }

    private String string(int start, int end) {
        return new String(text, start, end - start, StandardCharsets.UTF_8);
    }

    private JarFile file(int jar) throws IOException {
        synchronized (files) {
            if (files[jar] == null) {
                files[jar] = new JarFile(new File(jars.get(jar)), false, ZipFile.OPEN_READ, JarFile.runtimeVersion());
            }
            return files[jar];
        }
    }

    Set<String> jars() {
        return Set.copyOf(jars);
    }

    /** The classes of a package; none if no jar has it. */
    List<Entry> list(String packageName) {
        List<Entry> found = new ArrayList<>();
        Integer at = packages.get(packageName);
        int jar = -1;
        for (int start = at == null ? text.length : at, end; start < text.length; start = end + 1) {
            for (end = start; text[end] != '\t' && text[end] != '\n'; end++) {
            }
            if (text[start] == '#') {
                jar = Integer.parseInt(string(start + 1, end));
            } else {
                found.add(new Entry(this, jar, packageName, string(start, end)));
            }
            if (text[end] == '\n') {
                break;
            }
        }
        return found;
    }

    /** The names of all packages below one. */
    List<String> below(String packageName) {
        List<String> found = new ArrayList<>();
        for (String name : packages.keySet()) {
            if (packageName.isEmpty() || name.startsWith(packageName + ".")) {
                found.add(name);
            }
        }
        return found;
    }
}
