import com.sun.tools.javac.api.JavacTaskPool;
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
import java.util.Set;
import java.util.concurrent.atomic.AtomicInteger;
import javax.annotation.processing.Processor;
import javax.lang.model.SourceVersion;
import javax.tools.Diagnostic;
import javax.tools.DiagnosticListener;
import javax.tools.JavaCompiler;
import javax.tools.JavaFileManager;
import javax.tools.JavaFileObject;
import javax.tools.StandardJavaFileManager;
import javax.tools.ToolProvider;

/**
 * A javac that keeps what it has read of the class path from one compilation to the next, as JShell's does (JavacTaskPool of
 * OpenJDK 17, which needs jdk.compiler/com.sun.tools.javac.api exported). Deephaven compiles each formula by itself, against the
 * same few dozen imports: without this, reading them anew is four fifths of it, and the whole is a second under emulation.
 *
 * For formulas only: no annotation processors, no plugins, class files into the directory of -d. What is asked for otherwise, and
 * what fails without an error in the source, is done by a javac of its own.
 */
public final class ReusingCompiler implements JavaCompiler {
    /** Compilers that are kept, where several have run at once. */
    private static final int KEPT = 2;
    /** Each leaves a little behind: after so many compilations one is made anew. */
    private static final int USES = 2000;

    private static final AtomicInteger REUSED = new AtomicInteger();
    private static final AtomicInteger INDEXED = new AtomicInteger();
    private static final AtomicInteger PLAIN = new AtomicInteger();

    private final JavaCompiler javac = ToolProvider.getSystemJavaCompiler();
    private final Deque<Warm> idle = new ArrayDeque<>();
    private final ClassIndex index;

    private ReusingCompiler(ClassIndex index) {
        this.index = index;
    }

    /** Put one into a static field of a class. `index` is the path of the class path's index. */
    public static void install(Class<?> owner, String name, String index) throws ReflectiveOperationException, IOException {
        Field field = owner.getDeclaredField(name);
        field.setAccessible(true);
        Path path = Path.of(index);
        field.set(null, new ReusingCompiler(Files.exists(path) ? new ClassIndex(path) : null));
    }

    /** How many compilations had what an earlier one has read, how many the index, and how many were left to a plain javac. */
    public static int[] counts() {
        return new int[] {REUSED.get(), INDEXED.get(), PLAIN.get()};
    }

    /** What stays between compilations: symbols in the pool's only context, and where their classes are. For one at a time. */
    private static final class Warm {
        final FormulaFiles files;
        final JavacTaskPool pool = new JavacTaskPool(1);
        int uses;

        Warm(FormulaFiles files) {
            this.files = files;
        }
    }

    private final class Formulas implements CompilationTask {
        private final Writer out;
        private final JavaFileManager files;
        private final DiagnosticListener<? super JavaFileObject> listener;
        private final List<String> all;
        private final List<String> others = new ArrayList<>(List.of("-proc:none"));
        private final Iterable<? extends JavaFileObject> units;
        private String target;
        private String classPath;
        private boolean wrong;

        Formulas(Writer out, JavaFileManager files, DiagnosticListener<? super JavaFileObject> listener, List<String> all,
                Iterable<? extends JavaFileObject> units) {
            this.out = out;
            this.files = files;
            this.listener = listener;
            this.all = all;
            this.units = units;
            for (Iterator<String> each = all.iterator(); each.hasNext();) {
                String option = each.next();
                if (option.equals("-d") && each.hasNext()) {
                    target = each.next();
                } else if (option.equals("-cp") && each.hasNext()) {
                    classPath = each.next();
                } else {
                    others.add(option);
                }
            }
        }

        private void report(Diagnostic<? extends JavaFileObject> diagnostic) {
            wrong |= diagnostic.getKind() == Diagnostic.Kind.ERROR;
            listener.report(diagnostic);
        }

        @Override
        public Boolean call() {
            if (target != null && classPath != null) {
                Warm warm = take(classPath);
                warm.files.target = Path.of(target);
                try {
                    boolean done = warm.pool.getTask(out, warm.files, this::report, others, null, units, task -> task.call());
                    if (done || wrong) {
                        REUSED.addAndGet(warm.uses++ > 0 ? 1 : 0);
                        INDEXED.addAndGet(warm.files.isIndexed() ? 1 : 0);
                        giveBack(warm);
                        return done;
                    }
                } catch (RuntimeException | LinkageError | AssertionError error) {
                    if (wrong) {
                        close(warm);
                        throw error;
                    }
                }
                // It may be the reuse that failed: this one is not used again.
                close(warm);
            }
            PLAIN.incrementAndGet();
            return javac.getTask(out, files, listener, all, null, units).call();
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

    private Warm take(String classPath) {
        synchronized (idle) {
            for (Iterator<Warm> each = idle.iterator(); each.hasNext();) {
                Warm warm = each.next();
                if (warm.files.classPath.equals(classPath)) {
                    each.remove();
                    return warm;
                }
            }
        }
        return new Warm(new FormulaFiles(javac.getStandardFileManager(null, null, null), classPath, index));
    }

    private void giveBack(Warm warm) {
        synchronized (idle) {
            if (warm.uses < USES) {
                idle.addFirst(warm);
                warm = idle.size() > KEPT ? idle.removeLast() : null;
            }
        }
        if (warm != null) {
            close(warm);
        }
    }

    private static void close(Warm warm) {
        try {
            warm.files.close();
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }

    @Override
    public CompilationTask getTask(Writer out, JavaFileManager files, DiagnosticListener<? super JavaFileObject> listener,
            Iterable<String> options, Iterable<String> classes, Iterable<? extends JavaFileObject> units) {
        if (listener == null || options == null || classes != null || units == null) {
            PLAIN.incrementAndGet();
            return javac.getTask(out, files, listener, options, classes, units);
        }
        List<String> all = new ArrayList<>();
        options.forEach(all::add);
        return new Formulas(out, files, listener, all, units);
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
