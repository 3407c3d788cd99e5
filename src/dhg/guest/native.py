"""The server's first half, run natively in the guest's root file system when an image for emulation is made (image/server.py).

Starts the server, warms it up, gives memory back, says so and waits: there the host writes the process down as a program
(engine/serverprocess.py), and the wait ends when a guest has started that (`init`). Natively all this takes seconds.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import gc
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from . import hotspot, jvm, memory, preview, queries, reseed, runner, training, vdso, warmup

#: How often all warm-up scripts are run. A second time leaves ten megabytes more in the snapshot, and nothing is quicker for it.
PASSES = 1
#: What the JVM is not to take for granted, though this CPU may have it: QEMU's emulation lacks it, and 32 registers of 512 bits.
JVM_ARGS = (
    "-XX:UseAVX=2",
    "-XX:-UseSHA",
    "-XX:-UseFastStosb",
    "-XX:ActiveProcessorCount=1",
    "-XX:-UseContainerSupport",
)
#: Of glibc's variants, by the names that GLIBC_TUNABLES has for them.
_LACKING = (
    "AVX512F",
    "AVX512VL",
    "AVX512BW",
    "AVX512CD",
    "AVX512DQ",
    "AVX512ER",
    "AVX512PF",
    "ERMS",
    "FSRM",
    "FMA4",
    "RTM",
    "XSAVEC",
)
#: The same for libraries, by their own variables. OpenSSL (OPENSSL_ia32cap(3)): RDRAND and XOP; RDSEED, AVX-512 and SHA; and of the
#: third word what comes with AVX-512.
LIBRARIES = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in _LACKING),
    "OPENSSL_ia32cap": "~0x4000080000000000:~0x5f42fc270000",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
    # All that is linked is looked for now and not in the clones.
    "LD_BIND_NOW": "1",
}
#: Where the training goes on with tables that tick, which would be left behind. Its lines with these words are left out: the
#: rehearsal needs something that is new (queries.REHEARSAL_NEW), and the benchmark a kind of query that was never run.
UNTIL = "from deephaven import dtypes"
LEFT_OUT = ("uby.", "head_by", "reverse", "move_columns", "count_by", "partition", "merge", "group", "get_exec_ctx")
WRITTEN = ("/tmp/t.parquet", "/tmp/t.csv")


def environ() -> dict[str, str]:
    """The variables that a program has that `init` starts."""
    return {
        "SHLVL": "2",
        "HOME": "/root",
        "OLDPWD": "/",
        "TERM": "linux",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PWD": "/workspace",
    }


def numpy_features() -> str:
    """Which of the variants that NumPy chooses from at its start the emulated CPU has not, as NPY_DISABLE_CPU_FEATURES wants them."""
    ask = (
        "from numpy._core._multiarray_umath import __cpu_dispatch__ as names, __cpu_features__ as there\n"
        "print(*[name for name in names if there.get(name) and ('512' in name or 'V4' in name)])"
    )
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60).stdout.strip()


def optimize(finder: preview.Finder, log: Callable[[str], None]) -> None:
    """Have C2 compile what each row goes through, in other operations, too, and C1 nearly all that a formula does.

    A bytecode that is interpreted is an indirect jump, which emulation has to look up: a formula that is interpreted in part
    takes twice as long.
    """
    warmup.optimize_loops(finder, log)
    log("warm-up: cells")
    jvm.set_flags(hotspot.COMPILE_LOOPS, log)
    warmup.rehearse(finder, "cells", queries.CELLS, rows=100_000, times=3)
    jvm.set_flags(hotspot.COMPILE_NOW, log)
    for turn in range(2):
        log("warm-up: formulas")
        warmup.rehearse(finder, "formulas", queries.FORMULAS, turn=turn)
    jvm.set_flags(hotspot.COMPILE_SOON, log)


def run_widely() -> None:
    """Run most of what the training of the image runs, once: classes are there then that many a script needs."""
    jvm.set_flags(hotspot.COMPILE_SELDOM, print)
    lines = queries.TRAINING.partition(UNTIL)[0].splitlines()
    kept = [line for line in lines if line.startswith("from") or not any(word in line for word in LEFT_OUT)]
    names: dict[str, object] = {"__name__": "__main__"}
    for why in training.run("\n".join(kept), names):
        print(why, flush=True)
    names.clear()
    for name in WRITTEN:
        os.unlink(name)


def main(ready: int, heap_mib: int) -> None:
    """Make ready, say so on the socket `ready`, wait, and go on in a VM."""
    # As in a guest. Who is root in a namespace of users only may not write /proc/sys/kernel/hostname.
    socket.sethostname("dhg")
    # As many CPUs as the guest has.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if features := numpy_features():
        os.environ["NPY_DISABLE_CPU_FEATURES"] = features
    with open("/proc/cpuinfo") as file:
        if " avx2 " in file.read():
            os.environ["OPENBLAS_CORETYPE"] = "Haswell"
    began = time.monotonic()
    warm = warmup.warm_up_emulated(
        lambda text: print(f"{time.monotonic() - began:6.2f} {text}", flush=True),
        heap_mib,
        passes=PASSES,
        optimize=optimize,
        args=JVM_ARGS,
    )
    run_widely()
    # Not before: each library asks when it is loaded.
    for name in (*LIBRARIES, "NPY_DISABLE_CPU_FEATURES", "OPENBLAS_CORETYPE"):
        os.environ.pop(name, None)
    sys.path.remove(f"{runner.RUN_DIR}/lib")
    assert warm.jvm is not None
    memory.compact_java()
    memory.collect_java()
    cells = reseed.Cells()
    warm.jvm.find(cells)
    warm.jvm.check()
    kernel = vdso.Known()
    gc.collect()
    warm = warm._replace(cells=cells, objects=memory.of_objects())
    gc.freeze()
    memory.trim()
    go = os.eventfd(0, os.EFD_CLOEXEC)
    print("ready", flush=True)
    os.write(ready, b"r")
    os.close(ready)
    os.eventfd_read(go)
    # In a guest.
    os.close(go)
    kernel.connect()
    # As a JVM does at its start.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    runner.serve_vm(os.open(f"{runner.RUN_DIR}/control", os.O_RDWR), None, warm)
