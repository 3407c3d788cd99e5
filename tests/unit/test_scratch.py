"""The memory of a VM that is being prepared."""

from __future__ import annotations

import errno
import os
import time

import pytest

from dhg.snapshot import scratch

SIZE = 40 << 20


def mapped_to(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def test_it_is_zero_keeps_what_is_written_and_is_allocated_beside() -> None:
    with scratch.memory(SIZE) as fd:
        os.pwrite(fd, b"guest", 12345)
        assert os.fstat(fd).st_size == SIZE
        until = time.monotonic() + 60
        while os.fstat(fd).st_blocks * 512 < SIZE:
            assert time.monotonic() < until, "nobody allocates the memory"
            time.sleep(0.01)
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            assert file.read() == bytes(12345) + b"guest" + bytes(SIZE - 12350)
    with pytest.raises(OSError) as caught:
        os.fstat(fd)
    assert caught.value.errno == errno.EBADF


def test_huge_pages_where_that_is_allowed() -> None:
    try:
        os.close(scratch._huge_file(SIZE))
    except OSError as error:
        pytest.skip(f"no file system of one's own: {error}")
    with scratch.memory(SIZE) as fd:
        assert "dhg-ram" in mapped_to(fd) and "memfd" not in mapped_to(fd)
        # What a tmpfs says that has huge pages, whatever the host has to give.
        assert os.fstat(fd).st_blksize >= 2 << 20


def test_a_memfd_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(size: int) -> int:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(scratch, "_huge_file", refused)
    with scratch.memory(SIZE) as fd:
        assert mapped_to(fd).startswith("/memfd:dhg-ram")


def test_it_ends_at_once_where_it_is_not_needed_any_more() -> None:
    with pytest.raises(KeyError), scratch.memory(SIZE):
        raise KeyError
