import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.eclipse.jdt.internal.compiler.classfmt.ClassFileReader;
import org.eclipse.jdt.internal.compiler.classfmt.ClassFormatException;
import org.eclipse.jdt.internal.compiler.env.INameEnvironment;
import org.eclipse.jdt.internal.compiler.env.NameEnvironmentAnswer;

/**
 * What ECJ finds by name when it compiles formulas: the JDK's classes, those of the class path's jars by the image's index, and those
 * in the class path's directories. A jar that is not in the index is left to javac. ECJ keeps the answers.
 */
final class FormulaNames implements INameEnvironment {
    final String classPath;

    private final ClassIndex index;
    private final List<Path> folders = new ArrayList<>();
    /** The modules by their packages, with a "." between; and the packages that they export to all, and what is above those. */
    private final Map<String, Module> modules = new HashMap<>();
    private final Set<String> exported = new HashSet<>();

    FormulaNames(ClassIndex index, String classPath) {
        this.index = index;
        this.classPath = classPath;
        for (String part : classPath.split(File.pathSeparator)) {
            Path path = Path.of(part);
            if (Files.isDirectory(path)) {
                folders.add(path);
            }
        }
        for (Module module : ModuleLayer.boot().modules()) {
            for (String name : module.getPackages()) {
                modules.put(name, module);
                if (module.isExported(name)) {
                    for (String each = name; exported.add(each) && each.contains(".");) {
                        each = each.substring(0, each.lastIndexOf('.'));
                    }
                }
            }
        }
    }

    private static String joined(char[][] names, int count) {
        StringBuilder text = new StringBuilder();
        for (int number = 0; number < count; number++) {
            text.append(number > 0 ? "." : "").append(names[number]);
        }
        return text.toString();
    }

    @Override
    public NameEnvironmentAnswer findType(char[][] names) {
        return find(joined(names, names.length - 1), new String(names[names.length - 1]));
    }

    @Override
    public NameEnvironmentAnswer findType(char[] name, char[][] packageName) {
        return find(joined(packageName, packageName == null ? 0 : packageName.length), new String(name));
    }

    @Override
    public boolean isPackage(char[][] parent, char[] name) {
        String full = joined(parent, parent == null ? 0 : parent.length);
        full += (full.isEmpty() ? "" : ".") + new String(name);
        if (exported.contains(full) || index.hasPackage(full)) {
            return true;
        }
        String path = full.replace('.', '/');
        return folders.stream().anyMatch(folder -> Files.isDirectory(folder.resolve(path)));
    }

    @Override
    public void cleanup() {}

    private NameEnvironmentAnswer find(String packageName, String name) {
        String path = (packageName.isEmpty() ? "" : packageName.replace('.', '/') + "/") + name + ".class";
        try (InputStream in = open(packageName, name, path)) {
            return in == null ? null : new NameEnvironmentAnswer(new ClassFileReader(in.readAllBytes(), path.toCharArray()), null);
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        } catch (ClassFormatException error) {
            throw new UncheckedIOException(new IOException(path, error));
        }
    }

    private InputStream open(String packageName, String name, String path) throws IOException {
        Module module = modules.get(packageName);
        InputStream in = module == null ? null : module.getResourceAsStream(path);
        if (in != null) {
            return in;
        }
        ClassIndex.Entry entry = index.find(packageName, name);
        if (entry != null) {
            return entry.open();
        }
        for (Path folder : folders) {
            Path file = folder.resolve(path);
            if (Files.exists(file)) {
                return Files.newInputStream(file);
            }
        }
        return null;
    }
}
