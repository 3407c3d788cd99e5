"""Giving memory back before the freeze: what is zero in the guest's memory takes no room in the snapshot.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import ctypes

# linux/mman.h: reclaim these pages now; those of a file that are clean are read again when they are needed.
MADV_PAGEOUT = 21
#: How large the arrays are that the young generation is filled with.
ARRAY = 1 << 20
#: Less than what the C library maps by itself (M_MMAP_THRESHOLD, 128 KiB), or gives back at once.
ROOM = 96 << 10


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
    # Java zeroes an array when it makes it. Eden is filled with them, and the two survivor spaces in turn with those that are still
    # in use when eden is full and the young generation is collected.
    used = {pool.getName(): pool.getUsage() for pool in factory.getMemoryPoolMXBeans().toArray()}
    eden, survivor = (used[name].getCommitted() // ARRAY for name in ("Eden Space", "Survivor Space"))
    for _ in range(2):
        kept = [jpy.array("byte", ARRAY - 64) for _ in range(survivor - 1)]
        for _ in range(eden):
            jpy.array("byte", ARRAY - 64)
        del kept
    collect_java()


def trim() -> None:
    """Have the C library give back what is free in its heaps."""
    ctypes.CDLL(None).malloc_trim(0)


def leave_room() -> None:
    """Have some room in the C library's heap: a clone that has to ask the kernel for it would run that code for the first time."""
    bytearray(ROOM)


def drop_caches() -> None:
    """Drop the page cache and what else the kernel can do without. What is freed is zeroed (init_on_free, engine/qemu.py)."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
