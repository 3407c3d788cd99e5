"""The translation buffer (TLB) that QEMU has for this VM's processes under software emulation: made larger from within.

QEMU starts with 256 entries (CPU_TLB_DYN_DEFAULT_BITS in accel/tcg) and doubles their number when all of the buffer is flushed while
more than 70 of a hundred are in use (tlb_mmu_resize_locked in accel/tcg/cputlb.c). A clone's kernel flushes all of it when it
switches to another process, which there is none of, so a query that works on some thousand pages would walk the page tables all
the time.

Guest code: standard library only.
"""

from __future__ import annotations

import mmap

#: How many entries there are to begin with, and how often they are doubled.
ENTRIES = 256
TIMES = 4
#: More pages than the kernel drops from the buffer one by one (tlb_single_page_flush_ceiling: 33).
MANY = 64


class Pages:
    """Pages to fill the buffer with, and pages to take away, which flushes it: all of them the kernel's one page of zeros."""

    def __init__(self) -> None:
        self._most = ENTRIES << (TIMES - 1)
        size = (self._most + MANY * TIMES) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        self._bytes = memoryview(self._map)
        bytes(self._bytes[:: mmap.PAGESIZE])

    def grow(self) -> None:
        """Make the buffer larger. Once; it takes some five milliseconds."""
        for time in range(TIMES):
            bytes(self._bytes[: (ENTRIES << time) * mmap.PAGESIZE : mmap.PAGESIZE])
            self._map.madvise(mmap.MADV_DONTNEED, (self._most + MANY * time) * mmap.PAGESIZE, MANY * mmap.PAGESIZE)
