"""What the guest does once, before the freeze: start Deephaven, run what scripts run first, give memory back.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import hotspot, jvm, memory, preview, queries, reseed, script, tlb

#: How often all warm-up scripts are run; in a VM under emulation once less, as the host's rehearsal comes then (its
#: snapshot/rehearsal.py).
PASSES = 2
#: What does most of its work the first time only (Hadoop's configuration, what Jackson finds out about classes): compiling that took
#: a third of its first run, and is of no use to a clone. It is early in the order: what others share with it they have compiled.
ONCE = ("parquet",)


class Warm(NamedTuple):
    """What is warmed up: the versions of what runs; without Deephaven no more."""

    versions: dict[str, str]
    finder: preview.Finder | None = None
    jvm: reseed.Jvm | None = None
    #: Of a server that was started natively, whose Java heap is in order: the JVM's generators, and where Python has its objects.
    cells: reseed.Cells | None = None
    objects: Sequence[tuple[int, int]] = ()


def warm_up(log: Callable[[str], None]) -> Warm:
    """In a VM: start the server, where the image has one, and run the warm-up scripts."""
    if importlib.util.find_spec("deephaven_server") is None:
        return warm_up_bare(log)
    if jvm.is_emulated():
        return warm_up_emulated(log, jvm.heap_mib(), passes=PASSES - 1, optimize=optimize_loops)
    versions = jvm.start_server(log, jvm.vm_args(jvm.heap_mib(), emulated=False), image=True)
    finder = _settle()
    for number in range(1, PASSES + 1):
        for name, source in queries.WARM_UP.items():
            log(f"warm-up {number} of {PASSES}: {name}")
            rehearse(finder, name, source, turn=number)
        if number < PASSES:
            # What was needed once only is given back, and what is used again is read again.
            memory.release_files()
    rehearse_failure()
    return Warm(versions, finder, reseed.Jvm())


def warm_up_emulated(
    log: Callable[[str], None],
    heap_mib: int,
    *,
    passes: int,
    optimize: Callable[[preview.Finder, Callable[[str], None]], None],
    args: Sequence[str] = (),
) -> Warm:
    """The same for a VM under software emulation, there or natively; `args` are more options for the JVM.

    What `optimize` does comes before the passes: what C1 has compiled to stay C2 does not compile any more.
    """
    options = [*jvm.vm_args(heap_mib, emulated=True), *args]
    versions = jvm.start_server(log, options, image=True, flags=hotspot.COMPILE_SELDOM)
    jvm.set_flags(hotspot.COMPILE_SOON, log)
    finder = _settle()
    optimize(finder, log)
    for number in range(1, passes + 1):
        for name, source in queries.WARM_UP.items():
            log(f"warm-up {number} of {passes}: {name}")
            jvm.set_flags(hotspot.COMPILE_SELDOM if number == 1 and name in ONCE else hotspot.COMPILE_SOON, log)
            rehearse(finder, name, source, turn=number)
    rehearse_failure()
    return Warm(versions, finder, reseed.Jvm())


def _settle() -> preview.Finder:
    frames_without_source()
    finder = preview.Finder()
    # The exit handlers of the server and of pandas are for the end of this process, not of a script.
    script.settle()
    return finder


def compile_late(log: Callable[[str], None]) -> None:
    """From now on HotSpot compiles what runs very often only. What scripts are likely to run has been compiled."""
    jvm.set_flags(hotspot.COMPILE_LATE, log)


def warm_up_bare(log: Callable[[str], None]) -> Warm:
    """What `warm_up` does, for an image with Python only."""
    log("a bare Python")
    script.settle()
    outcome = script.Script(b"import json, random, tempfile\n", "<warm-up>", [], {"__name__": "__main__"}).run()
    if outcome.exit_code:
        raise RuntimeError(f"the warm-up script failed: {outcome.error}")
    rehearse_failure()
    gc.collect()
    return Warm({"python": sys.version.split()[0]})


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


def before_first_query() -> None:
    """Have the first query of a clone make room for what queries need. A script without one does not need it."""
    if jvm.is_emulated():
        _Frames.first = tlb.Pages().grow


class _Frames:
    """What that module needs of `inspect`."""

    #: What the next query does before anything else.
    first: Callable[[], None] | None = None

    currentframe = staticmethod(inspect.currentframe)

    @staticmethod
    def getouterframes(frame: Any, context: int = 1) -> list[inspect.FrameInfo]:
        if _Frames.first is not None:
            first, _Frames.first = _Frames.first, None
            first()
        found = []
        while frame is not None:
            code = frame.f_code
            found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
            frame = frame.f_back
        return found


def optimize_loops(finder: preview.Finder, log: Callable[[str], None]) -> None:
    """Have C2 compile what each row of a formula goes through.

    C1 does not inline calls of interfaces, of which there are two a row, each 125 ns under emulation. C2 at work in the clones would
    cost seconds. So it is at work here only, and for what runs a hundred thousand times: the formulas are there before.
    """
    log("warm-up: rows")
    rehearse(finder, "rows", queries.ROWS, rows=5, times=1)
    jvm.set_flags(hotspot.COMPILE_LOOPS, log)
    rehearse(finder, "rows", queries.ROWS, rows=200_000, times=2)
    jvm.set_flags(hotspot.COMPILE_SOON, log)


def rehearse(finder: preview.Finder, name: str, source: str, **given: int) -> None:
    """Run a script the way a user's is, with names that are given, and its table previews. Raises `RuntimeError` if it fails."""
    names: dict[str, Any] = {"__name__": "__main__", **given}
    outcome = script.Script(source.encode(), f"<warm-up {name}>", [], names).run()
    if outcome.exit_code:
        raise RuntimeError(f"the warm-up script {name!r} failed: {outcome.error}")
    for text, _ in finder.texts_and_data(names, 10, True, True):
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
