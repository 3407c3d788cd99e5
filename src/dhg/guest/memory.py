"""Giving memory back before the freeze: what is zero in the guest's memory takes no room in the snapshot.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time

# linux/mman.h: reclaim these pages now; those of a file that are clean are read again when they are needed.
MADV_PAGEOUT = 21
PAGE = 4096
#: How large the arrays are that eden is filled with, and what is left of it.
ARRAY = 1 << 20
EDEN_LEFT = 3 << 20


def release_files() -> None:
    """Give back every page of a file that is mapped into this process, so that only what is used again is in memory."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open("/proc/self/maps") as file:
        maps = file.read().splitlines()
    for line in maps:
        area, mode, _, _, inode, *_ = line.split()
        if inode != "0" and "w" not in mode:
            start, end = (int(part, 16) for part in area.split("-"))
            madvise(start, end - start, MADV_PAGEOUT)


def collect_java() -> None:
    """A full collection."""
    import jpy

    jpy.get_type("java.lang.System").gc()


def give_back() -> None:
    """Collect garbage in Python and in the JVM."""
    gc.collect()
    collect_java()
    # References that only a cleaner thread drops go away with the second collection.
    time.sleep(0.2)
    gc.collect()
    collect_java()


def compact_java() -> None:
    """Leave the Java heap as large as what lives in it, and zeros in the rest of it."""
    import jpy

    factory = jpy.get_type("java.lang.management.ManagementFactory")
    kind = jpy.get_type("com.sun.management.HotSpotDiagnosticMXBean")
    options = jpy.cast(factory.getPlatformMXBean(kind.jclass), kind)
    # Ratios of free to used after a collection, in percent; a full one gives back what is beyond. Both can be set at any time.
    names = ("MinHeapFreeRatio", "MaxHeapFreeRatio")
    before = [options.getVMOption(name).getValue() for name in names]
    for name, value in zip(names, ("2", "5"), strict=True):
        options.setVMOption(name, value)
    collect_java()
    for name, value in zip(reversed(names), reversed(before), strict=True):
        options.setVMOption(name, value)
    # Java zeroes an array when it makes it: filled with arrays, and then collected once more, eden is zeros.
    eden = next(pool for pool in factory.getMemoryPoolMXBeans().toArray() if pool.getName() == "Eden Space")
    usage = eden.getUsage()
    for _ in range((usage.getCommitted() - usage.getUsed() - EDEN_LEFT) // ARRAY):
        jpy.array("byte", ARRAY - 64)
    collect_java()


def trim() -> None:
    """Have the C library give back what is free in its heaps."""
    ctypes.CDLL(None).malloc_trim(0)


def clean_free_pages() -> None:
    """Drop the page cache and leave zeros in every free page, so that the snapshot file is sparse."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
    with open("/proc/sys/vm/compact_memory", "w") as file:
        file.write("1")
    # A process of its own and not a fork: that would leave every page of this one to be copied at its first write after the restore.
    argv = ["/usr/bin/python3", "-I", "-S", "-c", _TOUCH_FREE_MEMORY]
    pid = os.posix_spawn(argv[0], argv, {})
    os.waitpid(pid, 0)


# A page that is mapped in for the first time has been zeroed by the kernel; freed again, it stays zero. A bit is left for what
# else goes on meanwhile, the more the more memory there is: the kernel keeps a reserve (min_free_kbytes).
_TOUCH_FREE_MEMORY = """
import mmap
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
with open("/proc/meminfo") as file:
    info = {line.split(":")[0]: int(line.split()[1]) for line in file}
size = (info["MemFree"] - info["MemTotal"] // 128) * 1024
if size > 0:
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
"""
