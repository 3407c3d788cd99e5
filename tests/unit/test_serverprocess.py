"""A process of this host's, written down as a program for a guest: what is kept, and what is refused (engine/serverprocess.py).

The program itself needs a guest's privileges; that it goes on there every snapshot of tests/vm shows.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dhg.engine import resume, serverprocess
from dhg.engine.machinecode import HEAD
from dhg.errors import HostError, MachineError

WAIT = """
import ctypes, mmap, os, select, socket, sys, threading
kept = []
{extra}
sys.stdout.write("r")
sys.stdout.flush()
os.eventfd_read(os.eventfd(0))
"""
NUMBERS = "kept.append(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE)); kept[0][4096:8192] = bytes(range(256)) * 16"


@contextmanager
def waiting(extra: str) -> Iterator[int]:
    """A process that has done `extra` and waits; its number."""
    argv = [sys.executable, "-c", WAIT.format(extra=extra)]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"r"
            yield process.pid
        finally:
            process.kill()


def written(pid: int, target: Path) -> bytes:
    try:
        serverprocess.write(pid, str(target), "")
    except HostError as error:
        pytest.skip(f"this host does not let us look into a process: {error}")
    return target.read_bytes()


def test_its_memory_and_descriptors_are_kept(tmp_path: Path) -> None:
    extra = f"""
{NUMBERS}
listener = socket.create_server(("127.0.0.1", 0))
pair = socket.socketpair()
pair[1].close()
poll = select.epoll()
poll.register(listener, select.EPOLLIN)
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
"""
    with waiting(extra) as pid:
        data = written(pid, tmp_path / "start")
        [stack] = [area for area in resume.areas(pid) if area.path == "[stack]"]
    assert data[:4] == b"\x7fELF"
    assert os.access(tmp_path / "start", os.X_OK)
    pages = range(serverprocess.MEMORY_AT, len(data), resume.PAGE)
    assert [at for at in pages if data[at : at + resume.PAGE] == bytes(range(256)) * 16]
    # The code names what the kernel is to put back: the stack, with room below it.
    assert (stack.begin - resume.STACK_ROOM).to_bytes(8, "little") in data[HEAD : serverprocess.MEMORY_AT]


def test_its_clocks_are_not_put_back(tmp_path: Path) -> None:
    clocks = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}
    with waiting("pass") as pid:
        before = {name: time.clock_gettime(clock) for name, clock in clocks.items()}
        data = written(pid, tmp_path / "start")
        after = {name: time.clock_gettime(clock) for name, clock in clocks.items()}
    found = {
        name.decode(): int(seconds)
        for name, seconds in re.findall(rb"(\w+) (\d+) 0\n", data[: serverprocess.MEMORY_AT])
    }
    assert found.keys() == clocks.keys()
    assert all(before[name] <= found[name] <= after[name] + 2 for name in clocks), (before, found, after)


def test_what_nobody_has_written_to_takes_no_room(tmp_path: Path) -> None:
    with waiting("pass") as pid:
        before = len(written(pid, tmp_path / "start"))
    with waiting("kept.append(mmap.mmap(-1, 1 << 28, flags=mmap.MAP_PRIVATE))") as pid:
        after = len(written(pid, tmp_path / "start"))
    assert abs(after - before) < 1 << 24


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("kept.append(ctypes.CDLL(None).inotify_init())", "inotify"),
        (
            "s = socket.create_server(('127.0.0.1', 0)); kept += [s, socket.create_connection(s.getsockname())]",
            "socket",
        ),
        ("f = os.memfd_create('m'); os.truncate(f, 4096); kept.append(mmap.mmap(f, 4096))", "shares memory"),
    ],
)
def test_what_is_not_known_is_named(extra: str, what: str, tmp_path: Path) -> None:
    with waiting(extra) as pid, pytest.raises(MachineError, match=what):
        written(pid, tmp_path / "start")


def test_a_process_that_never_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "TRIES", 3)
    extra = "exec('def f():\\n    while True: pass'); threading.Thread(target=f, daemon=True).start()"
    with waiting(extra) as pid, pytest.raises(MachineError, match="does not come to rest"):
        written(pid, tmp_path / "start")
