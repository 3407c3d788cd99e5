import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.io.UncheckedIOException;
import java.io.Writer;
import java.lang.reflect.Field;
import java.nio.charset.Charset;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.Iterator;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.function.Supplier;
import javax.annotation.processing.Processor;
import javax.lang.model.SourceVersion;
import javax.tools.DiagnosticListener;
import javax.tools.JavaCompiler;
import javax.tools.JavaFileManager;
import javax.tools.JavaFileObject;
import javax.tools.StandardJavaFileManager;
import javax.tools.ToolProvider;
import org.eclipse.jdt.internal.compiler.ClassFile;
import org.eclipse.jdt.internal.compiler.CompilationResult;
import org.eclipse.jdt.internal.compiler.Compiler;
import org.eclipse.jdt.internal.compiler.DefaultErrorHandlingPolicies;
import org.eclipse.jdt.internal.compiler.ICompilerRequestor;
import org.eclipse.jdt.internal.compiler.classfmt.ClassFileConstants;
import org.eclipse.jdt.internal.compiler.env.ICompilationUnit;
import org.eclipse.jdt.internal.compiler.impl.CompilerOptions;
import org.eclipse.jdt.internal.compiler.impl.IrritantSet;
import org.eclipse.jdt.internal.compiler.problem.DefaultProblemFactory;

/**
 * The compiler of formulas: Eclipse's (ECJ), which takes a tenth of javac's time for a class as small as a formula's, and keeps what
 * it has read of the class path from one formula to the next. Deephaven compiles each against the same few dozen imports.
 *
 * Class files go into the directory of -d. What it does not compile is compiled by javac, so that the errors are the ones that
 * Deephaven reports elsewhere; so is what is asked for with options that Deephaven's formulas do not have.
 */
public final class FormulaCompiler implements JavaCompiler {
    /** Compilers that are kept, where several have run at once. */
    private static final int KEPT = 2;
    /** Each formula leaves a little behind: after so many a compiler is made anew. */
    private static final int USES = 2000;
    private static final String RELEASE = String.valueOf(Runtime.version().feature());

    private static final AtomicInteger REUSED = new AtomicInteger();
    private static final AtomicInteger COMPILED = new AtomicInteger();
    private static final AtomicInteger JAVAC = new AtomicInteger();

    private final JavaCompiler javac = ToolProvider.getSystemJavaCompiler();
    private final Deque<Kept> idle = new ArrayDeque<>();
    private final ClassIndex index;

    private FormulaCompiler(ClassIndex index) {
        this.index = index;
    }

    /** Put one into a static field of a class. `index` is the path of the class path's index, which has to be there. */
    public static void install(Class<?> owner, String name, String index) throws ReflectiveOperationException, IOException {
        Field field = owner.getDeclaredField(name);
        field.setAccessible(true);
        if (CompilerOptions.versionToJdkLevel(RELEASE) == 0) {
            throw new UnsupportedOperationException("ECJ does not know Java " + RELEASE);
        }
        field.set(null, new FormulaCompiler(new ClassIndex(Path.of(index))));
    }

    /** How many tasks were done, how many of them with what an earlier one has read, and how many were left to javac. */
    public static int[] counts() {
        return new int[] {COMPILED.get(), REUSED.get(), JAVAC.get()};
    }

    /** ECJ with the types that it has seen. For one task at a time. */
    private static final class Kept extends Compiler {
        final String classPath;
        final Classes found;
        int uses;

        Kept(FormulaNames names, Classes found) {
            super(names, DefaultErrorHandlingPolicies.exitOnFirstError(), new Options(), found, new DefaultProblemFactory(Locale.ROOT));
            classPath = names.classPath;
            this.found = found;
            useSingleThread = true;
        }

        /** What is said after each compilation: all of it but the types is forgotten. */
        @Override
        public void reset() {
            parser.scanner.source = null;
            unitsToProcess = null;
            problemReporter.reset();
        }
    }

    private static final class Options extends CompilerOptions {
        Options() {
            super(Map.of(OPTION_Source, RELEASE, OPTION_Compliance, RELEASE, OPTION_TargetPlatform, RELEASE));
            // As javac does it where nothing is asked for.
            produceDebugAttributes = ClassFileConstants.ATTR_SOURCE | ClassFileConstants.ATTR_LINES;
            // Nobody reads them, and formulas are full of what is not used.
            warningThreshold = new IrritantSet(0);
            infoThreshold = new IrritantSet(0);
            performMethodsFullRecovery = false;
            performStatementsRecovery = false;
            processAnnotations = false;
        }
    }

    /** The class files of a compilation, and how many sources they are of; those with an error do not count. */
    private static final class Classes implements ICompilerRequestor {
        final List<ClassFile> files = new ArrayList<>();
        int sources;

        @Override
        public void acceptResult(CompilationResult result) {
            if (!result.hasErrors()) {
                sources++;
                files.addAll(List.of(result.getClassFiles()));
            }
        }
    }

    /** A source, as ECJ takes it. */
    private static final class Unit implements ICompilationUnit {
        private final String path;
        private final char[] text;

        Unit(JavaFileObject file) throws IOException {
            path = file.toUri().getPath();
            text = file.getCharContent(true).toString().toCharArray();
        }

        @Override
        public char[] getContents() {
            return text;
        }

        @Override
        public char[] getFileName() {
            return path.toCharArray();
        }

        @Override
        public char[] getMainTypeName() {
            return path.substring(path.lastIndexOf('/') + 1, path.lastIndexOf('.')).toCharArray();
        }

        /** Whichever the source says. */
        @Override
        public char[][] getPackageName() {
            return null;
        }

        @Override
        public boolean ignoreOptionalProblems() {
            return true;
        }
    }

    private final class Task implements CompilationTask {
        private final Supplier<CompilationTask> other;
        private final Iterable<? extends JavaFileObject> units;
        private final String target;
        private final String classPath;

        Task(Supplier<CompilationTask> other, Iterable<? extends JavaFileObject> units, String target, String classPath) {
            this.other = other;
            this.units = units;
            this.target = target;
            this.classPath = classPath;
        }

        @Override
        public Boolean call() {
            try {
                if (compile()) {
                    COMPILED.incrementAndGet();
                    return true;
                }
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
            return other.get().call();
        }

        /** Whether the classes are there now. If not there are none. */
        private boolean compile() throws IOException {
            List<Unit> sources = new ArrayList<>();
            for (JavaFileObject unit : units) {
                sources.add(new Unit(unit));
            }
            Kept kept = take(classPath);
            if (kept == null) {
                return false;
            }
            try {
                kept.compile(sources.toArray(new ICompilationUnit[0]));
            } catch (RuntimeException | LinkageError | AssertionError error) {
                // ECJ's own fault. This one is not used again.
                return false;
            }
            if (kept.found.sources < sources.size()) {
                return false;
            }
            for (ClassFile file : kept.found.files) {
                Path path = Path.of(target, new String(file.fileName()) + ".class");
                Files.createDirectories(path.getParent());
                Files.write(path, file.getBytes());
            }
            REUSED.addAndGet(kept.uses++ > 0 ? 1 : 0);
            giveBack(kept);
            return true;
        }

        @Override
        public void addModules(Iterable<String> names) {
            throw new UnsupportedOperationException();
        }

        @Override
        public void setProcessors(Iterable<? extends Processor> processors) {
            throw new UnsupportedOperationException();
        }

        @Override
        public void setLocale(Locale locale) {
            throw new UnsupportedOperationException();
        }
    }

    /** A compiler for a class path; null if the index is not about it. */
    private Kept take(String classPath) {
        synchronized (idle) {
            for (Iterator<Kept> each = idle.iterator(); each.hasNext();) {
                Kept kept = each.next();
                if (kept.classPath.equals(classPath)) {
                    each.remove();
                    return kept;
                }
            }
        }
        boolean indexed = Set.copyOf(List.of(classPath.split(File.pathSeparator))).containsAll(index.jars());
        return indexed ? new Kept(new FormulaNames(index, classPath), new Classes()) : null;
    }

    private void giveBack(Kept kept) {
        kept.found.files.clear();
        kept.found.sources = 0;
        synchronized (idle) {
            if (kept.uses < USES) {
                idle.addFirst(kept);
                if (idle.size() > KEPT) {
                    idle.removeLast();
                }
            }
        }
    }

    @Override
    public CompilationTask getTask(Writer out, JavaFileManager files, DiagnosticListener<? super JavaFileObject> listener,
            Iterable<String> options, Iterable<String> classes, Iterable<? extends JavaFileObject> units) {
        String target = null;
        String classPath = null;
        boolean known = options != null && classes == null && units != null;
        for (Iterator<String> each = known ? options.iterator() : List.<String>of().iterator(); each.hasNext();) {
            String option = each.next();
            if (option.equals("-d") && each.hasNext()) {
                target = each.next();
            } else if (option.equals("-cp") && each.hasNext()) {
                classPath = each.next();
            } else {
                // What javac is to do after an error is javac's to do.
                known &= option.startsWith("--should-stop=");
            }
        }
        Supplier<CompilationTask> other = () -> {
            JAVAC.incrementAndGet();
            return javac.getTask(out, files, listener, options, classes, units);
        };
        return known && target != null && classPath != null ? new Task(other, units, target, classPath) : other.get();
    }

    @Override
    public StandardJavaFileManager getStandardFileManager(DiagnosticListener<? super JavaFileObject> listener, Locale locale,
            Charset charset) {
        return javac.getStandardFileManager(listener, locale, charset);
    }

    @Override
    public int isSupportedOption(String option) {
        return javac.isSupportedOption(option);
    }

    @Override
    public int run(InputStream in, OutputStream out, OutputStream err, String... arguments) {
        return javac.run(in, out, err, arguments);
    }

    @Override
    public Set<SourceVersion> getSourceVersions() {
        return javac.getSourceVersions();
    }

    @Override
    public String name() {
        return javac.name();
    }
}
