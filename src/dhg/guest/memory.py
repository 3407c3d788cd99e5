"""Giving memory back before the freeze: what is zero in the guest's memory takes no room in the snapshot.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from bisect import bisect_left as bisect
from collections.abc import Callable, Iterable

# linux/mman.h: read around a page that is needed, or that page alone; reclaim pages now (those of a file that are clean are read
# again when they are needed); read all of them now.
MADV_NORMAL, MADV_RANDOM, MADV_PAGEOUT, MADV_POPULATE_READ = 0, 1, 21, 22
#: The process that has gone on here, if it was started natively (init).
SERVER = "/run/dhg/server/start"
#: Mappings with fewer objects than one in so many bytes are not Python's own.
OBJECT = 4096
#: Where the kernel's settings for debugging are mounted while one is set, and what the kernel's own is for that one.
DEBUG, AROUND = "/sys/kernel/debug", 65536
#: How large the arrays are that the young generation is filled with.
ARRAY = 1 << 20
#: Less than what the C library maps by itself (M_MMAP_THRESHOLD, 128 KiB), or gives back at once.
ROOM = 96 << 10


def release_files() -> None:
    """Give back every page of a file that is mapped into this process, so that only what is used again is in memory.

    Until `read_around` each page that is used is read by itself, or what lies beside it would stay in the snapshot, too. The
    interpreter and the C library stay whole (three megabytes more): every script uses some of them that nothing else has.
    """
    # In this order: what other threads use meanwhile is read by itself, too.
    _advise(MADV_RANDOM)
    _advise(MADV_PAGEOUT)
    for path in os.path.realpath(sys.executable), "/libc.so.6":
        _advise(MADV_POPULATE_READ, path)


def of_objects() -> list[tuple[int, int]]:
    """Where Python has its objects: the mappings that have any that can be part of a cycle, as first address and the one after."""
    places = sorted(id(found) for found in gc.get_objects())
    with open("/proc/self/maps") as file:
        spans = [tuple(int(part, 16) for part in line.split(maxsplit=1)[0].split("-")) for line in file]
    # Some of those in the C library's heap, which has far more than objects, are of no account.
    return [
        (start, end) for start, end in spans if bisect(places, end) - bisect(places, start) > (end - start) // OBJECT
    ]


def populate(spans: Iterable[tuple[int, int]]) -> None:
    """Have all pages of these parts of the memory there: a clone reads them one by one, scattered as objects are."""
    madvise = _madvise()
    for start, end in spans:
        madvise(start, end - start, MADV_POPULATE_READ)


def read_around() -> None:
    """From now on the kernel reads what lies beside a page, too: a clone that needs a file's page is likely to need more of them."""
    _advise(MADV_NORMAL)
    if os.path.exists(SERVER):
        _map_around(AROUND)


def read_server() -> None:
    """Have the process that has gone on here in the page cache, and only what is used of it mapped: page by page that would be half
    a minute. What nothing maps goes with the cache again."""
    if not os.path.exists(SERVER):
        return
    buffer = bytearray(1 << 20)
    with open(SERVER, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    _map_around(mmap.PAGESIZE)


def _map_around(size: int) -> None:
    """How much of a file that is in the page cache the kernel maps at once where a page of it is needed (fault_around_bytes).

    A kernel without such a setting maps more than is used then, and the snapshot is larger.
    """
    libc = ctypes.CDLL(None)
    if libc.mount(b"dhg", DEBUG.encode(), b"debugfs", 0, None):
        return
    try:
        with open(f"{DEBUG}/fault_around_bytes", "w") as file:
            file.write(str(size))
    except FileNotFoundError:
        pass
    finally:
        libc.umount(DEBUG.encode())


def _advise(advice: int, path: str = "") -> None:
    """Advise the kernel about all files that are mapped, or those parts of one that are code; `path` is how its name ends.

    Advice is advice: what cannot be followed for a mapping is not an error.
    """
    madvise = _madvise()
    with open("/proc/self/maps") as file:
        maps = file.read().splitlines()
    for line in maps:
        area, mode, _, _, inode, *_ = line.split()
        if inode != "0" and (not path or ("x" in mode and line.endswith(path))):
            start, end = (int(part, 16) for part in area.split("-"))
            madvise(start, end - start, advice)


def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


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


def clear_young() -> None:
    """Overwrite what scripts have left in eden, without a full collection, which would move what `reseed.Jvm` has found."""
    import jpy

    factory = jpy.get_type("java.lang.management.ManagementFactory")
    eden = next(pool for pool in factory.getMemoryPoolMXBeans().toArray() if pool.getName() == "Eden Space").getUsage()
    # What is in use moves out of eden when that is full; all of it is overwritten by the time that it is full again, and empty then.
    for _ in range((2 * eden.getCommitted() - eden.getUsed()) // ARRAY + 2):
        jpy.array("byte", ARRAY - 64)


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
