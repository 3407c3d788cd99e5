import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.NavigableMap;
import java.util.Set;
import java.util.TreeMap;
import java.util.jar.JarFile;
import java.util.zip.ZipEntry;
import java.util.zip.ZipFile;

/**
 * Which classes the jars of the class path have, by package, as a file of the image says (image/compilepath.py): a line a jar, an
 * empty line, and a line a package: its name, and then "#" and the number of a jar or the name of a class in the jar named last,
 * separated by tabs. Of a class that several jars have only the first jar's is there.
 *
 * A compiler's own way is to open every jar once more, and to keep an object for each of its entries: forty megabytes.
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
    private final NavigableMap<String, Integer> packages = new TreeMap<>();
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

    /** A class, by its package's name, with a "." between, and its own; null if no jar has it. */
    Entry find(String packageName, String name) {
        byte[] wanted = name.getBytes(StandardCharsets.UTF_8);
        Integer at = packages.get(packageName);
        int jar = -1;
        for (int start = at == null ? text.length : at, end; start < text.length; start = end + 1) {
            for (end = start; text[end] != '\t' && text[end] != '\n'; end++) {
            }
            if (text[start] == '#') {
                jar = Integer.parseInt(string(start + 1, end));
            } else if (Arrays.equals(text, start, end, wanted, 0, wanted.length)) {
                return new Entry(this, jar, packageName, name);
            }
            if (text[end] == '\n') {
                break;
            }
        }
        return null;
    }

    /** Whether a jar has classes in a package, or in one below it. */
    boolean hasPackage(String name) {
        if (packages.containsKey(name)) {
            return true;
        }
        String next = packages.ceilingKey(name + ".");
        return next != null && next.startsWith(name + ".");
    }
}
