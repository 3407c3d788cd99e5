"""The JVM of the guest: its options, its class path, and the start of the server in it.

Guest code: standard library and Deephaven only. Used by the VM, by the embedded server of `exec` without a VM, and by the training
that makes the archive of classes (training.py), which only a JVM with the same class path in the same order can use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from . import hotspot

#: Where Debian has the image's JVM: without being told, Deephaven starts one more to ask it, two seconds under emulation.
JAVA_HOME = "/usr/lib/jvm/java-17-openjdk-amd64"
#: The archive of classes in the image (class data sharing), where one could be made.
CLASSES = "/usr/local/lib/dhg/classes.jsa"

#: Which package has which classes, and in which jar (image/compilepath.py).
INDEX = "/usr/local/lib/dhg/classes.index"
#: Our own classes in the image (image/java.py).
OWN_JAR = "/usr/local/lib/dhg/guest.jar"
#: Where Debian's package has ECJ, Eclipse's compiler, which FormulaCompiler.java is made of.
ECJ_JAR = "/usr/share/java/eclipse-jdt-core.jar"

JVM_ARGS = [
    # One VM, few cores, a small heap: the serial collector has no threads of its own that wake up.
    "-XX:+UseSerialGC",
    # Python keeps SIGINT and SIGTERM.
    "-Xrs",
    "-XX:-UsePerfData",
    "-Ddeephaven.console.type=python",
    "-XX:+UnlockDiagnosticVMOptions",
]

# What wakes up by itself, ten times a second and more, would do so within the first milliseconds of every clone. None of it is
# needed for what a script does: the look for new global variables tells web clients, of which there are none; idle monitors are
# given back at the next safepoint that something else needs, and the statistics go to a log that dies with the VM.
JVM_ARGS_VM = [
    "-DDeephavenApiServer.checkScopeChangesIntervalMillis=3600000",
    "-Dstatsdriver.enabled=false",
    # Every 15 s by itself, so a second after some clones' begin; the first time in a clone takes 200 ms.
    "-DServerStateTracker.reportIntervalMillis=3600000",
    # A description of the machine, for the same log: native libraries, files of the kernel's and programs that it asks.
    "-Dprocess.info.system-info.enabled=false",
    # Jetty asks the JVM's management for it, which would be there for nothing else: 64 bytes a line, and 4 a reference in a heap of
    # less than 32 GB.
    "-Dorg.eclipse.jetty.util.referencesPerCacheLine=16",
    "-XX:GuaranteedSafepointInterval=0",
    "-XX:AsyncDeflationInterval=0",
    # What memory.py asks to be given back is given back at once.
    "-XX:-ShrinkHeapInSteps",
    # Nobody attaches to it: a thread less, and a socket.
    "-XX:+DisableAttachMechanism",
]

# Under software emulation. Verifying classes takes a sixth of the start. C2 compiles a few methods in the warm-up, and then nothing
# more (warmup.py); so what it takes for granted would stay a trap for ever, and it is to take nothing for granted. The code cache is
# one, and as small as for a JVM that has C1 only.
JVM_ARGS_TCG = [
    "-XX:-BytecodeVerificationRemote",
    "-XX:PerMethodTrapLimit=0",
    "-XX:PerBytecodeTrapLimit=0",
    "-XX:ReservedCodeCacheSize=48m",
    "-XX:-SegmentedCodeCache",
    # The search for code that is not used any more goes through all of it, a second: after 24 MB of changes instead of 240 KB.
    "-XX:SweeperThreshold=50",
]

#: The archive where it was made for, so that its pages stay those of the file: Debian's default moves it, and writes to all of them.
JVM_ARGS_CLASSES = [f"-XX:SharedArchiveFile={CLASSES}", "-XX:ArchiveRelocationMode=0"]

#: An empty list would be taken for "none given" (start_jvm.py), and Deephaven's own pick G1: a second collector, and the JVM exits.
HARMLESS = ["-XX:+OmitStackTraceInFastThrow"]


def is_emulated() -> bool:
    """Whether this VM runs under software emulation: the host tells by the kernel's command line."""
    with open("/proc/cmdline") as file:
        return "dhg.accel=tcg" in file.read().split()


def heap_mib() -> int:
    """How much of this VM's memory is for the Java heap, in MiB: half."""
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) >> 11


def vm_args(heap_mib: int, *, emulated: bool) -> list[str]:
    """The JVM's options for a VM: its heap, and what suits the acceleration."""
    # A young generation that scripts need not collect at once. It is all zeros at the freeze, so its size costs nothing.
    args = [f"-Xmx{heap_mib}m", f"-XX:NewSize={heap_mib // 8}m", *JVM_ARGS, *JVM_ARGS_VM]
    args += JVM_ARGS_TCG if emulated else []
    return args + (JVM_ARGS_CLASSES if os.path.exists(CLASSES) else [])


def _sort_class_path() -> None:
    """Have the server's jars in the order of their names: it takes them as the directory lists them."""
    from deephaven_server import start_jvm

    if hasattr(start_jvm, "_jars") and hasattr(start_jvm, "_jars_path"):
        jars = sorted(start_jvm._jars_path().glob("*.jar"))
        vars(start_jvm)["_jars"] = lambda: iter(jars)


def _compile_with_ecj(log: Callable[[str], None]) -> None:
    """Have formulas compiled by ECJ, which keeps what it has read of the class path (FormulaCompiler.java)."""
    import jpy

    owner = jpy.get_type("io.deephaven.engine.context.QueryCompilerImpl").jclass
    try:
        jpy.get_type("FormulaCompiler").install(owner, "compiler", INDEX)
    except RuntimeError as error:
        # Another release, which has it elsewhere. It works; formulas are slower.
        log(f"formulas are compiled by javac: {str(error).splitlines()[0]}")


def set_flags(flags: dict[str, int], log: Callable[[str], None]) -> None:
    """Set flags of HotSpot's in the JVM of this process. A JVM that does not say where they are is left as it is, which works."""
    try:
        hotspot.set_flags(flags)
    except LookupError as error:
        log(f"methods are compiled as HotSpot does by itself, scripts are slower: {error}")


def _when_created(action: Callable[[], None]) -> None:
    """Have something done as soon as there is a JVM, before anything of Java has run in it."""
    from deephaven_internal import jvm

    # Without libjvm.so there is no importing jpy.
    jvm.preload_jvm_dll()  # type: ignore[no-untyped-call]
    import jpy

    create = jpy.create_jvm

    def created(*args: Any, **options: Any) -> Any:
        jpy.create_jvm = create
        result = create(*args, **options)
        action()
        return result

    jpy.create_jvm = created


def start_server(
    log: Callable[[str], None], args: list[str], *, image: bool, flags: dict[str, int] | None = None
) -> dict[str, str]:
    """Start Deephaven in this process; the versions of what runs. `image` says that this is our image and not the host.

    `flags` are HotSpot's, set before anything but the JVM itself has run in it.
    """
    log("starting the JVM")
    from deephaven_server import Server

    if image:
        _sort_class_path()
        os.environ["JAVA_HOME"] = JAVA_HOME
    if flags:
        values = flags
        _when_created(lambda: set_flags(values, log))
    extra = [OWN_JAR, ECJ_JAR] if image else None
    server = Server(port=0, jvm_args=args, default_jvm_args=HARMLESS, extra_classpath=extra)
    log("starting the server")
    server.start()
    if image:
        # It is for Deephaven, not for scripts.
        del os.environ["JAVA_HOME"]
        _compile_with_ecj(log)
    import deephaven
    import jpy
    import numpy
    import pandas
    import pyarrow

    return {
        "deephaven": deephaven.__version__,
        "python": sys.version.split()[0],
        "java": str(jpy.get_type("java.lang.System").getProperty("java.version")),
        "numpy": numpy.__version__,
        "pandas": pandas.__version__,
        "pyarrow": pyarrow.__version__,
    }
