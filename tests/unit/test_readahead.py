"""Reading a snapshot ahead: lists of pages, and the look into the kernel's cache, on real files."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dhg.snapshot import readahead
from dhg.snapshot.readahead import ENTRY, GAP, PAGE


def ranges(pages: bytes) -> list[tuple[int, int]]:
    return [readahead._entry(pages, number) for number in range(len(pages) // ENTRY)]


@given(st.lists(st.integers(0, 5000)))
def test_a_list_covers_its_pages_and_joins_what_is_near(touched: list[int]) -> None:
    found = ranges(readahead.pack(touched))
    covered = {page for first, count in found for page in range(first, first + count)}
    assert set(touched) <= covered
    for (first, count), (following, _) in itertools.pairwise(found):
        assert following > first + count + GAP
    for page in covered - set(touched):
        assert any(abs(page - near) <= GAP for near in touched)


def file_of(tmp_path: Path, pages: int) -> Path:
    path = tmp_path / "ram"
    with open(path, "wb") as file:
        file.write(os.urandom(pages * PAGE))
        file.flush()
        os.fsync(file.fileno())
    return path


def in_cache(fd: int, size: int) -> set[int]:
    """The pages of a file that the page cache has, by mincore: a read that may not wait starts a read-ahead."""
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE) as area:
        start = ctypes.addressof(held := ctypes.c_char.from_buffer(area))
        there = (ctypes.c_ubyte * (size // PAGE))()
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), there)
        del held
    return {page for page, flags in enumerate(there) if flags & 1}


def drop(path: Path) -> None:
    """Take a file that is on disk out of the page cache. A page that another CPU has just had in hand stays for a moment."""
    until = time.monotonic() + 60
    with open(path, "rb") as file:
        fd, size = file.fileno(), path.stat().st_size
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while in_cache(fd, size):
            assert time.monotonic() < until, "the page cache keeps the file"
            time.sleep(0.05)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_reads_only_what_is_not_in_the_cache(tmp_path: Path) -> None:
    path = file_of(tmp_path, 2000)
    pages = readahead.pack([3, 700, 701, 1500])
    path.read_bytes()
    assert not readahead.start([(str(path), pages)])
    drop(path)
    assert readahead.start([(str(path), pages)])
    # What it has started ends: then all of it is there, and nothing is left to be done.
    with open(path, "rb") as file:
        for first, count in ranges(pages):
            os.pread(file.fileno(), count * PAGE, first * PAGE)
    assert not readahead.start([(str(path), pages)])


def test_a_part_that_was_dropped_is_noticed(tmp_path: Path) -> None:
    path = file_of(tmp_path, 4000)
    pages = readahead.pack([10, 1000, 2000, 3000])
    drop(path)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for page in (10, 1000, 3000):
            os.pread(file.fileno(), PAGE, page * PAGE)
    assert readahead.start([(str(path), pages)])


def test_the_rest_is_read_after_the_list(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    # Further from each other than a disk reads ahead.
    data = {*range(100), *range(10_000, 10_100), *range(20_000, 20_100)}
    with open(path, "wb") as file:
        for page in sorted(data):
            os.pwrite(file.fileno(), b"x" * PAGE, page * PAGE)
        os.fsync(file.fileno())
    drop(path)
    assert readahead.start([(str(path), readahead.pack([10_050]))])
    until = time.monotonic() + 30
    with open(path, "rb") as file:
        while not in_cache(file.fileno(), path.stat().st_size) >= data:
            assert time.monotonic() < until, "the rest is not read"
            time.sleep(0.1)


def test_nothing_to_do_and_nothing_there(tmp_path: Path) -> None:
    path = file_of(tmp_path, 1)
    assert not readahead.start([(str(path), b"")])
    assert not readahead.start([(str(tmp_path / "missing"), readahead.pack([1]))])
    # Beyond the end, as a damaged list might have it.
    readahead.start([(str(path), readahead.pack([1 << 31]))])


def test_records_what_a_process_touched(tmp_path: Path) -> None:
    path = file_of(tmp_path, 1024)
    drop(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)
        assert mapped[PAGE * 5 : PAGE * 5 + 1] and mapped[PAGE * 900 : PAGE * 900 + 1]
        found = readahead.record(os.getpid(), str(path))
    assert {5, 900} <= found
    # In steps of what the kernel maps around a fault.
    assert len(found) <= 4 * 16
    assert readahead.record(os.getpid(), str(tmp_path / "another")) == set()


def test_of_a_file_that_was_forgotten_what_is_mapped_is_what_was_used(tmp_path: Path) -> None:
    path = file_of(tmp_path, 1000)
    drop(path)
    readahead.forget(str(path))
    used = [3, 500, 999]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as area:
        area.madvise(mmap.MADV_RANDOM)
        for page in used:
            area[page * PAGE]
        assert readahead.record(os.getpid(), str(path)) == set(used)
