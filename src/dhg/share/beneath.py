"""System calls that Python lacks: names opened beneath a directory and nowhere else, directories read in steps, renames with flags.

`openat2` resolves a path so that neither `..`, nor a symlink, nor one put in place while it is being resolved, nor a magic link of
/proc can lead out of the directory (openat2(2), Linux 5.6). Names are bytes throughout.
"""

from __future__ import annotations

import ctypes
import os
from struct import Struct

from ..errors import HostError

# linux/openat2.h
NO_MAGICLINKS, NO_SYMLINKS, BENEATH = 0x02, 0x04, 0x08
RESOLVE = NO_MAGICLINKS | NO_SYMLINKS | BENEATH
#: The same number on every architecture (asm-generic/unistd.h).
SYS_OPENAT2 = 437

_HOW = Struct("<QQQ")  # flags, mode, resolve

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
_syscall.restype = ctypes.c_long
_getdents64 = _libc.getdents64
_getdents64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_getdents64.restype = ctypes.c_ssize_t
_renameat2 = _libc.renameat2
_renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]

_FIND = _HOW.pack(os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, RESOLVE)


def find(root: int, path: bytes) -> int:
    """An O_PATH descriptor of what is at `path` beneath the directory `root`; no part of `path` may be a symlink but the last,
    which is not followed. Nothing is opened by it: not even a device notices. Raises `OSError`."""
    fd = _syscall(SYS_OPENAT2, root, path, _FIND, _HOW.size)
    if fd < 0:
        raise _error()
    return int(fd)


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def check() -> None:
    """Raises `HostError` on a kernel without openat2."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(find(root, b"."))
    except OSError as error:
        raise HostError(
            f"this kernel has no openat2 ({error.strerror}): files cannot be shared safely",
            hint="Linux 5.6 or newer; --no-workspace runs without",
        ) from None
    finally:
        os.close(root)


def rename(old: int, old_name: bytes, new: int, new_name: bytes, flags: int) -> None:
    """renameat2(2). Raises `OSError`."""
    if _renameat2(old, old_name, new, new_name, flags):
        raise _error()


class Directory:
    """Reads an open directory in steps; a position is the kernel's own cookie, so that nothing has to be kept."""

    __slots__ = ("_at", "_buffer", "_next", "fd")

    #: struct linux_dirent64: ino, off, reclen, type; then the name.
    HEAD = Struct("<QqHB")
    STEP = 8192

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._at = 0
        self._buffer = ctypes.create_string_buffer(self.STEP)
        #: Entries read and not yet given out, with the cookie before each.
        self._next: list[tuple[int, int, int, int, bytes]] = []

    def entries(self, offset: int) -> list[tuple[int, int, int, int, bytes]]:
        """Some entries from the position `offset` (0 is the beginning): the position before it, the one after it, its inode, its
        type as DT_*, its name. Empty at the end. Raises `OSError` for a position that is none."""
        if self._next and self._next[0][0] == offset:
            return self._next
        if offset != self._at:
            os.lseek(self.fd, offset, os.SEEK_SET)
            self._at = offset
        size = _getdents64(self.fd, self._buffer, self.STEP)
        if size < 0:
            raise _error()
        data = ctypes.string_at(self._buffer, size)
        found, at = [], 0
        while at < size:
            inode, after, length, kind = self.HEAD.unpack_from(data, at)
            name = data[at + 19 : data.index(b"\0", at + 19)]
            found.append((self._at, after, inode, kind, name))
            self._at = after
            at += length
        self._next = found
        return found

    def given(self, count: int) -> None:
        """The first `count` of the last entries have been given out."""
        del self._next[:count]
