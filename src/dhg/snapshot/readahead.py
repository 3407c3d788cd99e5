"""Reading a snapshot ahead of its VM when the host's page cache does not have it.

A VM that pages its memory in waits for the disk a few pages at a time: after a reboot, or when the cache went to something else,
that is most of a hello. Which pages those are repeats from clone to clone; `prepare` notes them, and a restore that finds them
missing has the kernel read all of them while the VMM starts. Where they are in the cache that costs a look, some 50 us.

A list is bytes: pairs of first page and count, unsigned 32 bit little-endian, ascending.
"""

from __future__ import annotations

import _thread
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = 4096
ENTRY = 8
#: How many pages of the list are looked for, spread over it: the kernel may have kept a part.
PROBES = 4
#: Ranges this many pages apart are read as one: the disk reads on faster than it begins anew.
GAP = 8
#: The kernel reads no more at one request than the disk's read-ahead (128 KiB on most), and does not say so.
STEP = 32
# proc(5), pagemap: the page is in memory.
_PRESENT = 1 << 63


def start(path: str, pages: bytes) -> bool:
    """Have the kernel read `pages` of the file `path`, unless they are in its cache; whether it does. Does not wait for the disk.

    It only makes things faster, so whatever goes wrong is left to whoever reads the file next.
    """
    count = len(pages) // ENTRY
    if not count:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        before = _io()
        there = (
            all(_cached(fd, _entry(pages, number * count // PROBES)[0]) for number in range(PROBES)) and _io() == before
        )
        if not there:
            # Beside: where the disk has much to do the kernel lets whoever asks for more wait.
            _thread.start_new_thread(_ask, (fd, pages))
            fd = -1
    except (OSError, RuntimeError):
        return False
    finally:
        if fd >= 0:
            os.close(fd)
    return not there


def _ask(fd: int, pages: bytes) -> None:
    try:
        for number in range(len(pages) // ENTRY):
            first, length = _entry(pages, number)
            for page in range(first, first + length, STEP):
                size = min(STEP, first + length - page)
                os.posix_fadvise(fd, page * PAGE, size * PAGE, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass
    finally:
        os.close(fd)


def _entry(pages: bytes, number: int) -> tuple[int, int]:
    at = number * ENTRY
    return int.from_bytes(pages[at : at + 4], "little"), int.from_bytes(pages[at + 4 : at + 8], "little")


def _io() -> bytes:
    """What this process has had read from disks (proc(5), /proc/pid/io: read_bytes); nothing where the kernel does not count."""
    try:
        fd = os.open("/proc/self/io", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 4096).partition(b"\nread_bytes: ")[2].partition(b"\n")[0]
    finally:
        os.close(fd)


def _cached(fd: int, page: int) -> bool:
    # A look at a page that is not there starts to read it, and on a fast disk finds it read: only `_io` tells.
    try:
        return os.preadv(fd, [bytearray(1)], page * PAGE, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def record(pid: int, path: str) -> bytes:
    """The pages of the file `path` that the process `pid` has mapped: those that it has touched, and those around them that were in
    the page cache then (the kernel's fault-around, 64 KiB).

    Empty where the kernel does not let us look.
    """
    path, touched = os.path.realpath(path), list[int]()
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            for line in maps:
                words = line.rstrip("\n").split(maxsplit=5)
                if len(words) == 6 and words[5] == path:
                    begin, end = (int(word, 16) for word in words[0].split("-"))
                    first = int(words[2], 16) // PAGE
                    entries = memoryview(os.pread(pagemap.fileno(), (end - begin) // PAGE * 8, begin // PAGE * 8)).cast(
                        "Q"
                    )
                    touched += (first + number for number, entry in enumerate(entries) if entry & _PRESENT)
    except OSError:
        return b""
    return pack(touched)


def forget(path: str) -> None:
    """Drop a file from the page cache, as far as it is in no other use. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def pack(touched: Sequence[int]) -> bytes:
    """The list of some pages, in any order."""
    ranges: list[list[int]] = []
    for page in sorted(touched):
        if ranges and page <= ranges[-1][1] + GAP:
            ranges[-1][1] = page + 1
        else:
            ranges.append([page, page + 1])
    return b"".join(first.to_bytes(4, "little") + (end - first).to_bytes(4, "little") for first, end in ranges)
