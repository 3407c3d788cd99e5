"""Reading a snapshot ahead of its VM when the host's page cache does not have it.

A VM that pages its memory in waits for the disk a few pages at a time: after a reboot, or when the cache went to something else,
that is most of a hello. Which pages those are repeats from clone to clone; `prepare` notes them, and a restore that finds them
missing has the kernel read all of them while the VMM starts, and the rest of the files if the script is not over soon. Where they
are in the cache that costs a look, some 50 us.

A list is bytes: pairs of first page and count, unsigned 32 bit little-endian, ascending.
"""

from __future__ import annotations

import _thread
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE = 4096
ENTRY = 8
#: How many pages of the list are looked for, spread over it: the kernel may have kept a part.
PROBES = 4
#: Ranges this many pages apart are read as one: the disk reads on faster than it begins anew.
GAP = 8
#: The kernel reads no more at one request than the disk's read-ahead (128 KiB on most), and does not say so.
STEP = 32
#: When the rest of the files is read, in seconds after the list has been asked for: a script that does little is over by then.
REST_S = 0.2
# proc(5), pagemap: the page is in memory.
_PRESENT = 1 << 63


def start(files: Iterable[tuple[str, bytes]]) -> bool:
    """Have the kernel read the pages listed of each file, unless they are in its cache, and later the rest of it; whether it does.

    Does not wait for the disk, nor is what it has begun ended with the VM: in a process that lives on, the next one finds it read.
    It only makes things faster, so whatever goes wrong is left to whoever reads a file next.
    """
    missing = []
    for path, pages in files:
        try:
            fd = _open_if_missing(path, pages)
        except OSError:
            continue
        if fd is not None:
            missing.append((fd, pages))
    if not missing:
        return False
    try:
        # Beside: where the disk has much to do the kernel lets whoever asks for more wait.
        _thread.start_new_thread(_ask, (missing,))
    except RuntimeError:
        for fd, _ in missing:
            os.close(fd)
        return False
    return True


def _open_if_missing(path: str, pages: bytes) -> int | None:
    """A descriptor of the file, if any of the pages that are looked for is not in the page cache. Raises `OSError`."""
    count = len(pages) // ENTRY
    if not count:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    there = False
    try:
        before = _io()
        there = all(_cached(fd, _entry(pages, number * count // PROBES)[0]) for number in range(PROBES))
        there = there and _io() == before
    except OSError:
        there = True
    if there:
        os.close(fd)
        return None
    return fd


def _ask(files: list[tuple[int, bytes]]) -> None:
    try:
        for fd, pages in files:
            for number in range(len(pages) // ENTRY):
                first, length = _entry(pages, number)
                _read(fd, first * PAGE, (first + length) * PAGE)
        time.sleep(REST_S)
        for fd, _ in files:
            end, at = os.fstat(fd).st_size, 0
            while at < end:
                # What is no data is not on the disk; ENXIO if there is none any more.
                at = os.lseek(fd, at, os.SEEK_DATA)
                hole = os.lseek(fd, at, os.SEEK_HOLE)
                _read(fd, at, hole)
                at = hole
    except OSError:
        pass
    finally:
        for fd, _ in files:
            os.close(fd)


def _read(fd: int, start: int, end: int) -> None:
    for at in range(start, end, STEP * PAGE):
        os.posix_fadvise(fd, at, min(STEP * PAGE, end - at), os.POSIX_FADV_WILLNEED)


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


def record(pid: int, path: str) -> set[int]:
    """The pages of the file `path` that the process `pid` has mapped: those that it has touched, and those around them that were in
    the page cache then (the kernel's fault-around, 64 KiB).

    Empty where the kernel does not let us look.
    """
    path, touched = os.path.realpath(path), set[int]()
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
                    touched.update(first + number for number, entry in enumerate(entries) if entry & _PRESENT)
    except OSError:
        return set()
    return touched


def forget(path: str) -> None:
    """Drop a file from the page cache, as far as it is in no other use. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def pack(touched: Iterable[int]) -> bytes:
    """The list of some pages, in any order."""
    ranges: list[list[int]] = []
    for page in sorted(touched):
        if ranges and page <= ranges[-1][1] + GAP:
            ranges[-1][1] = page + 1
        else:
            ranges.append([page, page + 1])
    return b"".join(first.to_bytes(4, "little") + (end - first).to_bytes(4, "little") for first, end in ranges)
