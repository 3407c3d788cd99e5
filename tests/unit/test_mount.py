"""Relay and server together with a real kernel: the file system mounted on this host instead of in a VM, over a socket instead of
a virtio port."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.counting import Counts
from tests.posix import POSIX

from dhg.share import start
from dhg.share.start import FileServer

#: What `init` and the relay's main do in a VM.
RELAY = """
import ctypes, os, sys
from dhg.guest import relay
target, port = sys.argv[1].encode(), int(sys.argv[2])
fuse = os.open('/dev/fuse', os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
options = f'fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other'.encode()
if libc.mount(b'dhg', target, b'fuse', 6, options):
    sys.exit(f'mount: {os.strerror(ctypes.get_errno())}')
print('mounted', flush=True)
carrier = relay.Relay(fuse, port)
poke = relay.alone(fuse)
os.write(fuse, relay.OUT.pack(relay.OUT.size, -relay.ENOENT, poke))
carrier.carry()
"""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK),
    reason="mounting takes root and /dev/fuse",
)


class Mount:
    """A read-only share 0 and a writable share 1."""

    def __init__(self, tmp_path: Path) -> None:
        self.target = tmp_path / "mount"
        self.sources = [tmp_path / "ro", tmp_path / "rw"]
        for folder in (self.target, *self.sources):
            folder.mkdir()
        self.server: FileServer | None = None
        host, guest = socket.socketpair()
        self.host = host
        self.relay = subprocess.Popen(
            [sys.executable, "-c", RELAY, str(self.target), str(guest.fileno())],
            pass_fds=(guest.fileno(),),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        guest.close()
        assert self.relay.stdout is not None
        if self.relay.stdout.readline() != b"mounted\n":
            _, said = self.relay.communicate(timeout=10)
            host.close()
            pytest.skip(f"no mount here: {said.decode()}")
        # Nobody has been asked so far; the workspace is there and empty.
        assert os.listdir(self.target / "0") == []
        assert not os.path.lexists(self.target / ".frozen")
        self.server = FileServer(host.fileno(), ((str(self.sources[0]), "r"), (str(self.sources[1]), "w")))

        self.closed = False

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        ctypes.CDLL(None).umount2(str(self.target).encode(), 2)
        self.relay.kill()
        self.relay.communicate(timeout=10)
        self.host.close()
        if self.server is not None:
            self.server.end()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    made = Mount(tmp_path)
    yield made
    made.close()


def test_reading(mount: Mount) -> None:
    source, target = mount.sources[0], mount.target / "0"
    (source / "sub").mkdir()
    big = os.urandom(5_000_001)
    (source / "big").write_bytes(big)
    for i in range(300):
        (source / "sub" / f"f{i}").write_text(f"file {i}\n" * (i % 50))
    for _ in range(2):
        for i in range(300):
            path = target / "sub" / f"f{i}"
            assert path.stat().st_size == len(path.read_text())
            assert path.read_text() == f"file {i}\n" * (i % 50)
    assert (target / "big").read_bytes() == big
    assert sorted(os.listdir(target / "sub")) == sorted(f"f{i}" for i in range(300))
    # What is opened ahead is what is there now.
    for i in range(0, 300, 7):
        (source / "sub" / f"f{i}").write_text("changed")
    time.sleep(1.1)
    for i in range(0, 300, 7):
        assert (target / "sub" / f"f{i}").read_text() == "changed"
    with pytest.raises(OSError) as caught:
        (target / "big").open("w")
    assert caught.value.errno == errno.EROFS
    assert sorted(os.listdir(mount.target)) == ["0", "1"]


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counts:
    found = Counts(tmp_path / "counts")
    monkeypatch.setattr(start, "CODE", found.code)
    return found


@pytest.mark.parametrize("how", ["by name", "listed", "stat only", "shuffled"])
def test_a_thousand_small_files(counts: Counts, tmp_path: Path, how: str) -> None:
    source = tmp_path / "ro" / "small"
    mount = Mount(tmp_path)
    try:
        source.mkdir()
        names = [f"file{i}.txt" for i in range(1000)]
        for name in names:
            (source / name).write_text(name * 20)
        time.sleep(0.05)
        target = mount.target / "0" / "small"
        if how == "listed":
            assert sorted(os.listdir(target)) == sorted(names)
            names = os.listdir(target)
        elif how == "shuffled":
            random.Random(1).shuffle(names)
        for name in names:
            assert (target / name).stat().st_size == 20 * len(name)
            if how != "stat only":
                assert (target / name).read_text() == name * 20
    finally:
        mount.close()
    # One request a file where there is no order in which they come; otherwise one for 64 files, and some to begin with.
    assert counts.answered() < (1100 if how == "shuffled" else 120), counts.read()


def test_a_file_that_changes_after_it_was_sent_along_is_old_or_new(mount: Mount) -> None:
    source, target = mount.sources[0], mount.target / "0"
    old = {f"f{i:02}": f"old {i}" for i in range(40)}
    for name, text in old.items():
        (source / name).write_text(text)
    time.sleep(0.05)

    def read(name: str) -> str:
        with open(target / name) as file:
            text = file.read()
            assert os.fstat(file.fileno()).st_size == len(text)
        return text

    new = dict(old)
    for i, name in enumerate(old):
        if i == 6:
            # What comes next is with the relay.
            for number in range(7, 20):
                path = source / f"f{number:02}"
                new[path.name] = ("longer than before" * 300, "new", f"NEW {number}")[number % 3]
                if number % 2:
                    path.write_text(new[path.name])
                else:
                    (source / "next").write_text(new[path.name])
                    os.rename(source / "next", path)
        assert read(name) in (old[name], new[name]), name
    time.sleep(1.1)
    for name in old:
        assert read(name) == new[name], name


def test_files_that_are_replaced_all_the_time_are_whole(mount: Mount) -> None:
    source, target = mount.sources[0], mount.target / "0"
    (source / "d").mkdir()
    stop = threading.Event()

    def write(number: int, turn: int) -> None:
        (source / "next").write_text(f"{turn:06}" * (1 + (number + turn) % 900))
        os.rename(source / "next", source / "d" / f"{number}.txt")

    for number in range(200):
        write(number, 0)

    def keep_writing() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            write(turn * 7 % 200, turn)

    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        until, reads = time.monotonic() + 4, 0
        while time.monotonic() < until:
            for number in range(200):
                try:
                    text = (target / "d" / f"{number}.txt").read_text()
                except OSError as error:
                    # Replaced between being looked up and being opened, and once more when that was tried again.
                    assert error.errno == errno.ESTALE
                    continue
                turn = int(text[:6])
                assert text == f"{turn:06}" * (1 + (number + turn) % 900)
                reads += 1
    finally:
        stop.set()
        thread.join()
    assert reads >= 200


def test_what_a_program_changes_itself_shows_at_once(mount: Mount) -> None:
    source, target = mount.sources[1], mount.target / "1"
    for i in range(40):
        (source / f"f{i:02}").write_text(f"old {i}")
    time.sleep(0.05)
    for i in range(6):
        (target / f"f{i:02}").read_text()
    (target / "f07").write_text("written")
    os.rename(target / "f08", target / "moved")
    os.unlink(target / "f09")
    os.replace(target / "f00", target / "f10")
    os.truncate(target / "f11", 1)
    with (target / "f12").open("r+b") as file:
        file.write(b"NEW")
        file.flush()
        assert (target / "f12").read_text() == "NEW 12"
    assert (target / "f06").read_text() == "old 6"
    assert (target / "f07").read_text() == "written"
    for name in ("f08", "f09", "f00"):
        with pytest.raises(FileNotFoundError):
            (target / name).read_text()
    found = [(target / name).read_text() for name in ("f10", "f11", "f12", "f13", "moved")]
    assert found == ["old 0", "o", "NEW 12", "old 13", "old 8"]


def test_a_file_that_has_changed_shows_when_it_is_opened(mount: Mount) -> None:
    path = mount.target / "0" / "f"
    for text in ("one", "two, longer", "3", "", "four"):
        (mount.sources[0] / "f").write_text(text)
        # Its attributes as they were would be taken as true for a second.
        assert path.read_text() == text
        assert path.stat().st_size == len(text)


def test_many_at_once(mount: Mount) -> None:
    source, target = mount.sources[1], mount.target / "1"

    def one(number: int) -> int:
        data = bytes([number]) * 200_000
        for turn in range(10):
            path = target / f"{number}.{turn}"
            path.write_bytes(data)
            assert path.read_bytes() == data
            os.rename(path, target / f"done{number}.{turn}")
        return len(os.listdir(target))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(8)))
    assert len(os.listdir(source)) == 80


def test_writing_as_on_a_local_file_system(mount: Mount) -> None:
    folder = mount.target / "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", POSIX], cwd=folder, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert (mount.sources[1] / "x3").read_text() == "2more"


def test_a_server_that_dies_is_an_error_and_no_wait(mount: Mount) -> None:
    (mount.sources[0] / "f").write_text("f")
    assert (mount.target / "0" / "f").read_text() == "f"
    assert mount.server is not None
    os.kill(mount.server.process.pid, signal.SIGKILL)
    mount.server.process.wait(10)
    mount.host.shutdown(socket.SHUT_RDWR)
    began = time.monotonic()
    with pytest.raises(OSError) as caught:
        os.stat(mount.target / "0" / "g")
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert time.monotonic() - began < 10
