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

from . import jvm, preview, queries, reseed, script


def warm_up(runner: Any, log: Callable[[str], None]) -> dict[str, str]:
    """Start the server, where the image has one, and run the warm-up scripts; the versions of what runs."""
    if importlib.util.find_spec("deephaven_server") is None:
        return warm_up_bare(runner, log)
    versions = jvm.start_server(log, jvm.vm_args())
    frames_without_source()
    runner.finder = preview.Finder()
    # The exit handlers of the server and of pandas are for the end of this process, not of a script.
    script.settle()
    for name, source in queries.WARM_UP.items():
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
