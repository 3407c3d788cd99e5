"""Relay and server together with a real kernel: the file system mounted on this host instead of in a VM, over a socket instead of
a virtio port."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.posix import POSIX

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

    def close(self) -> None:
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
