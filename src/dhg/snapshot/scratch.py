"""The file that a VM's memory is in until its snapshot is written: in huge pages where the host lets us, and allocated ahead."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# The system calls of the mount API by number (the same on all architectures): glibc has no functions for them before 2.36.
NR_FSOPEN, NR_FSCONFIG, NR_FSMOUNT = 430, 431, 432
# linux/mount.h.
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
CLOEXEC = 1
# linux/mman.h, since Linux 5.14.
MADV_POPULATE_WRITE = 23

#: What is allocated at a time; also the size of a huge page, or a multiple of it.
STEP = 16 << 20


@contextmanager
def memory(size: int) -> Iterator[int]:
    """A descriptor of a file of `size` bytes, all zero, that is gone with the descriptor. Raises `OSError`.

    While it is in use another thread allocates what is not there yet. The guest's kernel writes to all of its memory when it boots,
    and then finds the pages instead of waiting for each.
    """
    fd = _file(size)
    stop = threading.Event()
    ahead = threading.Thread(target=_allocate, args=(fd, size, stop), name="dhg-allocate")
    try:
        os.truncate(fd, size)
        ahead.start()
        try:
            yield fd
        finally:
            stop.set()
            ahead.join()
    finally:
        os.close(fd)


def _file(size: int) -> int:
    # Huge pages in a memfd are up to the host's administrator (transparent_hugepage/shmem_enabled, "never" by default); in a file
    # system of one's own they are not, but making one takes CAP_SYS_ADMIN.
    try:
        return _huge_file(size)
    except OSError:
        return os.memfd_create("dhg-ram")


def _huge_file(size: int) -> int:
    """A file in a tmpfs that is mounted nowhere. Raises `OSError`."""
    context = _call(NR_FSOPEN, b"tmpfs", CLOEXEC)
    try:
        # A huge page more: the limit counts what the file system itself needs, too.
        for key, value in ((b"huge", b"always"), (b"size", b"%d" % (size + (2 << 20))), (b"mode", b"0700")):
            _call(NR_FSCONFIG, context, FSCONFIG_SET_STRING, key, value, 0)
        _call(NR_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _call(NR_FSMOUNT, context, CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return os.open("dhg-ram", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=mount)
    finally:
        os.close(mount)


def _call(number: int, *args: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in (number, *args)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _allocate(fd: int, size: int, stop: threading.Event) -> None:
    # Through a mapping and by one call a step, without the interpreter's lock: fallocate would leave the zeroing to the first use.
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, size) as area:
        start = ctypes.addressof(held := ctypes.c_char.from_buffer(area))
        for at in range(0, size, STEP):
            # An old kernel, or one short of memory: the VM gets each page when it writes to it.
            if stop.is_set() or libc.madvise(
                ctypes.c_void_p(start + at), ctypes.c_size_t(min(STEP, size - at)), MADV_POPULATE_WRITE
            ):
                break
        del held
