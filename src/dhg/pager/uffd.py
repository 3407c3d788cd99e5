"""userfaultfd: the kernel's structures and the calls that the pager makes.

Layouts, numbers and flags are those of linux/userfaultfd.h (API 0xAA); all of them are host-endian. What happens between a call
and a concurrent change of the mapping is in the kernel's Documentation/admin-guide/mm/userfaultfd.rst ("Non-cooperative
userfaultfd"). An ioctl number is direction << 30 | size << 16 | type << 8 | number (asm-generic/ioctl.h).
"""

from __future__ import annotations

import errno
import fcntl
import os
from struct import Struct

PAGE = os.sysconf("SC_PAGESIZE")

# struct uffd_msg: event u8, 7 reserved, then a union of three u64: (flags, address, ptid) or (start, end).
_MSG = Struct("=B7xQQQ")
MSG_SIZE = _MSG.size
EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16

# struct uffdio_api: api, features, ioctls.
_API = Struct("=QQQ")
# struct uffdio_register: start, len, mode, ioctls.
_REGISTER = Struct("=QQQQ")
# struct uffdio_range: start, len.
_RANGE = Struct("=QQ")
# struct uffdio_copy: dst, src, len, mode, copy (s64, out).
_COPY = Struct("=QQQQq")
_COPY_OUT = 32
# struct uffdio_zeropage: start, len, mode, zeropage (s64, out).
_ZERO = Struct("=QQQq")
_ZERO_OUT = 24
_OUT = Struct("=q")

UFFD_API = 0xAA
FEATURE_EVENT_REMOVE = 1 << 3
MODE_MISSING = 1 << 0

_READ_WRITE, _READ = 3, 2
_TYPE = 0xAA


def _number(direction: int, size: int, number: int) -> int:
    return direction << 30 | size << 16 | _TYPE << 8 | number


UFFDIO_API = _number(_READ_WRITE, _API.size, 0x3F)
UFFDIO_REGISTER = _number(_READ_WRITE, _REGISTER.size, 0x00)
UFFDIO_WAKE = _number(_READ, _RANGE.size, 0x02)
UFFDIO_COPY = _number(_READ_WRITE, _COPY.size, 0x03)
UFFDIO_ZEROPAGE = _number(_READ_WRITE, _ZERO.size, 0x04)

# asm/unistd_64.h; Python has no userfaultfd(2).
NR_USERFAULTFD = 323


def open_fd() -> int:
    """A new userfaultfd, close-on-exec and non-blocking. Raises `OSError` where the kernel or its policy has none for us.

    Not for the pager, which is given one: for the probe (`available`) and for tests.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(ctypes.c_long(NR_USERFAULTFD), ctypes.c_long(os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def available() -> str | None:
    """None where a process like this one can have the kernel's faults on its memory served; otherwise why not."""
    try:
        os.close(open_fd())
    except OSError as error:
        if error.errno == errno.EPERM:
            return "userfaultfd is not permitted (vm.unprivileged_userfaultfd is 0 and we are not root)"
        return f"there is no userfaultfd: {error.strerror}"
    return None


def api(fd: int, features: int) -> int:
    """Agree on the API and switch `features` on; the features that the kernel has. For tests: a VMM does it itself."""
    data = bytearray(_API.pack(UFFD_API, features, 0))
    fcntl.ioctl(fd, UFFDIO_API, data, True)
    has: int = _API.unpack(data)[1]
    return has


def register(fd: int, start: int, size: int) -> None:
    """Have missing pages of a range reported. For tests: a VMM does it itself."""
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, size, MODE_MISSING, 0)), True)


def copy(fd: int, to: int, source: int, size: int) -> int:
    """Put `size` bytes at our address `source` into missing pages at `to`, and wake who waits there.

    Returns how many bytes are there now, which may be fewer than `size`; or minus the error if none: EEXIST (the first page is
    there), EAGAIN (the mapping is being changed: read the events), ESRCH (the process is gone), EFAULT (`source` cannot be read),
    ENOENT (no such range).
    """
    data = bytearray(_COPY.pack(to, source, size, 0, 0))
    try:
        fcntl.ioctl(fd, UFFDIO_COPY, data, True)
    except OSError as error:
        # A short copy is EAGAIN with a positive count.
        done: int = _OUT.unpack_from(data, _COPY_OUT)[0]
        return done if done > 0 else -(error.errno or errno.EIO)
    return size


def zero(fd: int, to: int, size: int) -> int:
    """Put zeros into missing pages at `to`, and wake who waits there. Returns as `copy`."""
    data = bytearray(_ZERO.pack(to, size, 0, 0))
    try:
        fcntl.ioctl(fd, UFFDIO_ZEROPAGE, data, True)
    except OSError as error:
        done: int = _OUT.unpack_from(data, _ZERO_OUT)[0]
        return done if done > 0 else -(error.errno or errno.EIO)
    return size


def wake(fd: int, start: int, size: int) -> None:
    """Wake who waits for pages of a range. They look again, and fault again if the page is still missing."""
    fcntl.ioctl(fd, UFFDIO_WAKE, bytearray(_RANGE.pack(start, size)), True)


def read(fd: int) -> list[tuple[int, int, int]]:
    """The messages that wait, as (event, first, second): for PAGEFAULT flags and address, for REMOVE start and end.

    Empty if there is none. Page faults come before events, however old: apply the events first. Whoever caused an event goes on
    as soon as it is read.
    """
    try:
        data = os.read(fd, MSG_SIZE * 64)
    except BlockingIOError:
        return []
    return [(event, first, second) for event, first, second, _ in _MSG.iter_unpack(data)]
