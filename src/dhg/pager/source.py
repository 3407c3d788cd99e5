"""The memory file of a snapshot, mapped: a page goes from the page cache into the guest in one copy."""

from __future__ import annotations

import ctypes
import errno
import os

from ..errors import SnapshotError
from .uffd import PAGE

# sys/mman.h
_PROT_READ, _MAP_SHARED, _MAP_ANONYMOUS, _MAP_PRIVATE = 1, 1, 0x20, 2
_MAP_FAILED = 2**64 - 1


class Source:
    """An open memory file. `address` is where it is mapped, read-only; `size` is its length in bytes."""

    __slots__ = ("_libc", "address", "fd", "size")

    def __init__(self, path: str) -> None:
        """Raises `SnapshotError` if the file cannot be read."""
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotError(f"cannot read {path}: {error.strerror}") from error
        self.size = os.fstat(self.fd).st_size
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        self.address = self._map(_MAP_SHARED, self.fd, self.size) if self.size else 0

    def _map(self, flags: int, fd: int, size: int) -> int:
        found: int = self._libc.mmap(None, size, _PROT_READ, flags, fd, 0)
        if found == _MAP_FAILED:
            os.close(self.fd)
            raise SnapshotError(f"cannot map the memory file: {os.strerror(ctypes.get_errno())}")
        return found

    def blank(self, size: int) -> int:
        """The address of `size` zero bytes: what a huge page, which has no ZEROPAGE, is cleared with."""
        return self._map(_MAP_PRIVATE | _MAP_ANONYMOUS, -1, size)

    def data(self, start: int, end: int) -> tuple[int, int]:
        """The first run of data between two offsets (multiples of the page size), as offsets; (end, end) if all of it is a hole.

        What is not backed by blocks reads as zeros and need not be copied (lseek(2), SEEK_DATA).
        Raises `SnapshotError` if the file is not as long as it was.
        """
        try:
            first = os.lseek(self.fd, start, os.SEEK_DATA)
            if first >= end:
                return end, end
            last = os.lseek(self.fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            # No data from here to the end, wherever that is by now.
            if os.fstat(self.fd).st_size != self.size:
                raise SnapshotError("the memory file has been truncated while it was in use") from None
            return end, end
        # The file's blocks may be smaller than a page, and its last page may be partial.
        return first // PAGE * PAGE, min(end, -(-last // PAGE) * PAGE)

    def will_need(self, start: int, size: int) -> None:
        """Have the kernel read a part of the file ahead, without waiting for it."""
        os.posix_fadvise(self.fd, start, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file. It stays mapped until the process ends."""
        os.close(self.fd)
