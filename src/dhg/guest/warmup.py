"""What the guest does once, before the freeze: start Deephaven, run what scripts run first, give memory back.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import io
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from . import preview, reseed, script

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
    "-XX:GuaranteedSafepointInterval=0",
    "-XX:AsyncDeflationInterval=0",
]

# Under software emulation: C2's own work costs far more than its code gains within the life of a script, and
# verifying classes takes a sixth of the start.
JVM_ARGS_TCG = ["-XX:TieredStopAtLevel=1", "-XX:-BytecodeVerificationRemote"]

#: An empty list would be taken for "none given" (start_jvm.py), and Deephaven's own pick G1: a second collector, and the JVM exits.
HARMLESS = ["-XX:+OmitStackTraceInFastThrow"]


def jvm_args() -> list[str]:
    """The JVM's options for this VM: half of its memory as heap, and what suits the acceleration that the host told."""
    with open("/proc/cmdline") as file:
        words = file.read().split()
    with open("/proc/meminfo") as file:
        heap_mib = int(file.readline().split()[1]) >> 11
    return [f"-Xmx{heap_mib}m", *JVM_ARGS, *JVM_ARGS_VM, *(JVM_ARGS_TCG if "dhg.accel=tcg" in words else [])]


def start_server(log: Callable[[str], None], args: list[str]) -> dict[str, str]:
    """Start Deephaven in this process; the versions of what runs."""
    log("starting the JVM")
    from deephaven_server import Server

    server = Server(port=0, jvm_args=args, default_jvm_args=HARMLESS)
    log("starting the server")
    server.start()
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


def warm_up(runner: Any, log: Callable[[str], None]) -> dict[str, str]:
    """Start the server, where the image has one, and run the warm-up scripts; the versions of what runs."""
    if importlib.util.find_spec("deephaven_server") is None:
        return warm_up_bare(runner, log)
    versions = start_server(log, jvm_args())
    frames_without_source()
    runner.finder = preview.Finder()
    # The exit handlers of the server and of pandas are for the end of this process, not of a script.
    script.settle()
    for name, source in SCRIPTS.items():
        log(f"warm-up: {name}")
        rehearse(runner.finder, name, source)
    rehearse_failure()
    runner.jvm = reseed.Jvm()
    log("collecting garbage")
    give_back()
    return versions


def warm_up_bare(runner: Any, log: Callable[[str], None]) -> dict[str, str]:
    """What `warm_up` does, for an image with Python only."""
    log("a bare Python")
    script.settle()
    outcome = script.Script(b"import json, random, tempfile\n", "<warm-up>", [], {"__name__": "__main__"}).run()
    if outcome.exit_code:
        raise RuntimeError(f"the warm-up script failed: {outcome.error}")
    rehearse_failure()
    gc.collect()
    return {"python": sys.version.split()[0]}


def frames_without_source() -> None:
    """Have Deephaven look at its callers' frames without their source.

    Each query asks `inspect` for all frames above it and the line each is at, of which it uses the names of files and functions only
    (deephaven/_query_scope.py). To find those lines `inspect` looks for the script's file, and for "<string>", in the working
    directory, which is the host's: that would make every query a reader of files.
    """
    try:
        from deephaven import _query_scope
    except ImportError:
        return  # another release; it may be slower
    if hasattr(_query_scope, "inspect"):
        vars(_query_scope)["inspect"] = _Frames


class _Frames:
    """What that module needs of `inspect`."""

    currentframe = staticmethod(inspect.currentframe)

    @staticmethod
    def getouterframes(frame: Any, context: int = 1) -> list[inspect.FrameInfo]:
        found = []
        while frame is not None:
            code = frame.f_code
            found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
            frame = frame.f_back
        return found


def rehearse(finder: preview.Finder, name: str, source: str) -> None:
    """Run a script the way a user's is, with its table previews. Raises `RuntimeError` if it fails."""
    names: dict[str, Any] = {"__name__": "__main__"}
    outcome = script.Script(source.encode(), f"<warm-up {name}>", [], names).run()
    if outcome.exit_code:
        raise RuntimeError(f"the warm-up script {name!r} failed: {outcome.error}")
    for text, _ in finder.texts_and_data(names, 10, meta=True, data=True):
        print(text)
        if "no preview" in text:
            raise RuntimeError(f"the warm-up script {name!r}: {text.strip()}")
    names.clear()


def rehearse_failure() -> None:
    """Run one script that raises, so that the modules that print tracebacks are there."""
    quiet = io.StringIO()
    with contextlib.redirect_stderr(quiet):
        outcome = script.Script(b"def f():\n    1 / 0\nf()\n", "<warm-up>", [], {}).run()
    if outcome.exit_code != 1 or "ZeroDivisionError" not in quiet.getvalue():
        raise RuntimeError(f"the warm-up of tracebacks: {quiet.getvalue()}")


# What scripts do first, so that its classes are loaded, its code compiled and its modules imported. Each leaves nothing behind.
SCRIPTS = {
    "update, where, agg_by, join, sort": """
from deephaven import agg, empty_table
from deephaven import new_table
from deephaven.column import double_col, int_col, long_col, string_col
for n in 1, 1000, 1_000_000:
    t = empty_table(n).update('x = i')
    assert t.size == n
t = empty_table(1000).update(['g = ii % 7', 's = `s` + g', 'v = i * 0.5', 'ts = now()'])
assert t.where(['g > 2', 's != `s5`']).size > 0
assert t.agg_by([agg.sum_('sv = v'), agg.avg('av = v'), agg.count_('n')], by=['g']).size == 7
assert t.view(['g', 'v']).sum_by('g').size == t.last_by('g').size
right = new_table([long_col('g', [0, 1]), string_col('name', ['a', 'b']), int_col('n', [1, 2]), double_col('d', [1.0, 2.0])])
assert t.natural_join(right, on='g', joins='name').sort('v').sort_descending('g').size == 1000
assert t.join(right, on='g').select(['g', 'name']).head(5).size == 5
print(t.size)
""",
    "ticking table": """
import time
from deephaven import time_table
t = time_table('PT0.02s').update('y = ii * 2')
n = t.last_by()
until = time.monotonic() + 120
while t.size < 3:
    assert time.monotonic() < until, 'the update graph does not run'
    time.sleep(0.05)
n.close() if hasattr(n, 'close') else None
""",
    "csv": """
import os
from deephaven import read_csv, write_csv
with open('/tmp/warm.csv', 'w') as file:
    file.write('sym,price,qty\\n' + ''.join(f'S{i % 5},{i / 7},{i}\\n' for i in range(2000)))
t = read_csv('/tmp/warm.csv')
assert t.size == 2000
write_csv(t.head(10), '/tmp/warm2.csv')
os.unlink('/tmp/warm.csv')
os.unlink('/tmp/warm2.csv')
""",
    "parquet": """
import os
from deephaven import empty_table, parquet
t = empty_table(1000).update(['x = i', 's = `a` + i', 'd = i / 3.0'])
parquet.write(t, '/tmp/warm.parquet')
assert parquet.read('/tmp/warm.parquet').select().size == 1000
os.unlink('/tmp/warm.parquet')
""",
    "pandas, numpy": """
import pandas
from deephaven import empty_table
from deephaven.numpy import to_numpy
from deephaven.pandas import to_pandas, to_table
empty = empty_table(0).update('x = i')
frame = to_pandas(empty_table(1000).update(['x = i', 's = `a` + i', 'd = i / 3.0']))
frame.head(10).to_string(index=False)
assert to_table(frame).size == 1000
assert frame.groupby('s').d.mean().size == 1000
to_numpy(empty_table(10).update('x = i'))
""",
}


def give_back() -> None:
    """Collect garbage in Python and in the JVM."""
    gc.collect()
    collect_java()
    # References that only a cleaner thread drops go away with the second collection.
    time.sleep(0.2)
    gc.collect()
    collect_java()


def collect_java() -> None:
    """A full collection."""
    import jpy

    jpy.get_type("java.lang.System").gc()


def shrink() -> None:
    """Drop the page cache and leave zeros in every free page, so that the snapshot file is sparse."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
    with open("/proc/sys/vm/compact_memory", "w") as file:
        file.write("1")
    # A process of its own and not a fork: that would leave every page of this one to be copied at its first write after the restore.
    argv = ["/usr/bin/python3", "-I", "-S", "-c", _TOUCH_FREE_MEMORY]
    pid = os.posix_spawn(argv[0], argv, {})
    os.waitpid(pid, 0)


# A page that is mapped in for the first time has been zeroed by the kernel; freed again, it stays zero.
_TOUCH_FREE_MEMORY = """
import mmap
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
with open("/proc/meminfo") as file:
    free_kib = next(int(line.split()[1]) for line in file if line.startswith("MemFree:"))
size = (free_kib - 48 * 1024) * 1024
if size > 0:
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
"""


#: How long the other threads are watched, and how finely.
WATCH_S = 3.0
STEP_S = 0.01


def wait_for_quiet() -> None:
    """Return at the beginning of the longest time in which no other thread of this process is about to run.

    What wakes up does so once a second (the update graph, cleaners). Frozen right after, a clone runs its first hundred
    milliseconds undisturbed: under emulation what such a thread executes would have to be translated first.
    """
    steps = round(1 / STEP_S)
    busy = [False] * steps
    switches = _switches()
    end = time.monotonic() + WATCH_S
    while (now := time.monotonic()) < end:
        time.sleep(STEP_S - now % STEP_S)
        switches, before = _switches(), switches
        if switches != before:
            busy[int(now / STEP_S) % steps] = True
    start, _ = longest_gap(busy)
    # One step later: what made the last one busy may not be done.
    time.sleep((((start + 1) * STEP_S) - time.monotonic()) % 1.0)
    # What the kernel puts off while it idles (deferrable timers, RCU) it does at the first ticks after: now, and not in a clone.
    for _ in range(2):
        until = time.monotonic() + 2 * STEP_S
        while time.monotonic() < until:
            pass
        time.sleep(STEP_S / 2)


def longest_gap(busy: list[bool]) -> tuple[int, int]:
    """Start and length of the longest run of False in a list that is taken as a circle."""
    best = (0, 0)
    for start in range(len(busy)):
        length = 0
        while length < len(busy) and not busy[(start + length) % len(busy)]:
            length += 1
        if length > best[1]:
            best = (start, length)
    return best


def _switches() -> int:
    """How often the threads of this process, the calling one left out, have been given the CPU (third field of schedstat)."""
    total = 0
    for name in os.listdir("/proc/self/task"):
        if int(name) != threading.get_native_id():
            try:
                with open(f"/proc/self/task/{name}/schedstat", "rb") as file:
                    total += int(file.read().split()[2])
            except OSError:
                pass
    return total
