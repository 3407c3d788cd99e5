"""What the guest does once, before the freeze: start Deephaven, run what scripts run first, give memory back.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

JVM_ARGS = [
    "-Xmx1g",
    # One VM, few cores, a small heap: the serial collector has no threads of its own that wake up.
    "-XX:+UseSerialGC",
    # Python keeps SIGINT and SIGTERM.
    "-Xrs",
    "-XX:-UsePerfData",
    "-XX:+UnlockDiagnosticVMOptions",
    "-XX:-BytecodeVerificationRemote",
    "-Ddeephaven.console.type=python",
]


def warm_up(runner: Any, log: Callable[[str], None]) -> dict[str, str]:
    """Start the server and run the warm-up scripts; the versions of what runs."""
    log("starting the JVM")

    log("imported")
    from deephaven_server import Server

    server = Server(port=10000, jvm_args=JVM_ARGS, default_jvm_args=["-XX:+OmitStackTraceInFastThrow"])
    log("starting the server")
    server.start()
    log("warming up")
    import deephaven
    import jpy
    import numpy
    import pandas
    import pyarrow

    _run_scripts(log)
    import random

    def reseed_python() -> None:
        random.seed(os.urandom(32))
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))

    runner.reseeders.append(reseed_python)
    reseed_python()
    jpy.get_type("java.lang.System").gc()
    return {
        "deephaven": deephaven.__version__,
        "python": sys.version.split()[0],
        "java": jpy.get_type("java.lang.System").getProperty("java.version"),
        "numpy": numpy.__version__,
        "pandas": pandas.__version__,
        "pyarrow": pyarrow.__version__,
    }


def _run_scripts(log: Callable[[str], None]) -> None:
    for name, source in SCRIPTS.items():
        log(f"warm-up: {name}")
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(source, f"<warm-up {name}>", "exec", dont_inherit=True), names)


SCRIPTS = {
    "update": """
from deephaven import empty_table
for n in 1, 1000, 1_000_000:
    t = empty_table(n).update('x = i')
    assert t.size == n
""",
}


def shrink() -> None:
    """Drop the page cache and leave zeros in every free page, so that the snapshot file is sparse."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
    with open("/proc/sys/vm/compact_memory", "w") as file:
        file.write("1")
    pid = os.fork()
    if pid == 0:
        _touch_free_memory()
        os._exit(0)
    os.waitpid(pid, 0)


def _touch_free_memory() -> None:
    # A page that is mapped in for the first time has been zeroed by the kernel; freed again, it stays zero.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    with open("/proc/meminfo") as file:
        free_kib = next(int(line.split()[1]) for line in file if line.startswith("MemFree:"))
    size = (free_kib - 48 * 1024) * 1024
    if size > 0:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
