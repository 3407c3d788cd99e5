"""What a script, a guest or a broken-into VMM cannot do."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.conftest import DHG, Dhg

from dhg import config, proc
from dhg.engine import qmp
from dhg.snapshot import store


@contextmanager
def running(code: str = "print('up'); import time; time.sleep(100)") -> Iterator[int]:
    """The pid of a QEMU whose script says it is up."""
    argv = [DHG, "exec", "--vm", "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == b"up\n"
            with open(f"/proc/{client.pid}/task/{client.pid}/children") as file:
                yield int(file.read().split()[0])
        finally:
            client.kill()
            client.communicate()


def status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def server_of() -> str:
    """The stage with the server's process that the shared snapshot goes on with; empty where there is none."""
    found = store.open_snapshot(engine="qemu")
    os.close(found.lock)
    with open(f"{found.path}/manifest.json") as file:
        return str(json.load(file)["inputs"]["server"])


def test_the_vmm_has_no_privileges() -> None:
    with running() as pid:
        found = status(pid)
        assert found["Seccomp"] == "2"
        assert int(found["CapEff"], 16) == 0
        if os.geteuid() == 0:
            assert all(int(uid) not in (0, os.geteuid()) for uid in found["Uid"].split())
            assert all(int(gid) != 0 for gid in found["Gid"].split())
            assert found["Groups"] in ("", found["Gid"].split()[0])
        limits = {
            line[:26].strip(): line[26:].split()[1] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()
        }
        assert int(limits["Max address space"]) <= (config.DEFAULT_MEMORY_MIB + qmp.OVERHEAD_MIB) << 20
        assert limits["Max core file size"] == "0"


def test_the_vmm_holds_nothing_but_its_own_descriptors() -> None:
    with running() as pid:
        targets = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        home = config.home()
        files = {
            os.path.basename(target) for target in targets if target.startswith("/") and not target.startswith("/dev/")
        }
        own = {"ram", "state", "lock", "root.erofs", *(["server.erofs"] if server_of() else [])}
        assert files <= own | {name for name in files if "memfd:" in name}, targets
        assert all(target.startswith(home) for target in targets if os.path.basename(target) in own)


def test_no_network(dhg: Dhg) -> None:
    code = """
import socket, os
print(sorted(os.listdir('/sys/class/net')))
try:
    socket.create_connection(('192.0.2.1', 80), timeout=2)
except OSError as error:
    print(error.errno)
"""
    done = dhg("exec", "--vm", "-c", code)
    assert done.stdout == b"['lo']\n101\n", done.stderr


def test_the_devices_are_those_that_are_used(dhg: Dhg) -> None:
    code = "import os\nprint(sorted(os.path.basename(os.readlink('/sys/bus/virtio/devices/' + d + '/driver'))\
 for d in os.listdir('/sys/bus/virtio/devices') if os.path.exists('/sys/bus/virtio/devices/' + d + '/driver')))"
    # The root file system, and the server's process where it was started natively.
    drives = "'virtio_blk', " * (2 if server_of() else 1)
    assert dhg("exec", "--vm", "-c", code).stdout.decode() == f"[{drives}'virtio_console']\n"


BOMBS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "memory hog": "held = []\nwhile True:\n    held.append(bytearray(b'x' * 50_000_000))",
    "disk filler": "with open('/root/big', 'wb') as file:\n    while True:\n        file.write(b'x' * 1_000_000)",
    "jvm hog": "import jpy\nheld = []\nwhile True:\n    held.append(jpy.array('long', 10_000_000))",
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_bomb_hurts_its_own_script_only(name: str, dhg: Dhg) -> None:
    argv = [DHG, "exec", "--vm", "--timeout", "25", "-c", "print('up', flush=True)\n" + BOMBS[name]]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        with open(f"/proc/{client.pid}/task/{client.pid}/children") as file:
            qemu = int(file.read().split()[0])
        # Another VM, while it rages.
        assert dhg("exec", "--vm", "-c", "print('fine')").stdout == b"fine\n"
        held_kib = 0
        while client.poll() is None:
            try:
                held_kib = max(held_kib, int(status(qemu)["RssAnon"].split()[0]))
            except (OSError, KeyError):
                pass
            time.sleep(0.1)
        _, err = client.communicate()
    assert client.returncode in (1, 2, 3), err
    assert err.strip() or name == "fork bomb"
    assert held_kib >> 10 <= config.DEFAULT_MEMORY_MIB + qmp.OVERHEAD_MIB
    assert dhg("exec", "--vm", "-c", "print('fine')").stdout == b"fine\n"


HOSTILE = {
    "garbage": b"\xff" * 64,
    "a huge frame": bytes([2, 0, 0, 0]) + (1 << 31).to_bytes(4, "little"),
    "half a frame and silence": bytes([2, 0, 0, 0, 100, 0, 0, 0]) + b"x",
    "a result without its fields": bytes([2, 0, 0, 0, 0, 0, 0, 0]),
    "a result that is a lie": bytes([2, 0, 0, 0, 16, 0, 0, 0, 32, 0, 0, 0, 255, 255, 255, 255]) + bytes(8),
    "a flood": bytes([3, 0, 0, 0, 8, 0, 0, 0]) * 1 + bytes(8),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_whatever_the_guest_sends_the_host_ends_in_order(name: str, dhg: Dhg) -> None:
    repeat = 200_000 if name == "a flood" else 1
    code = f"""
import os
fd = os.open('/run/dhg/control', os.O_RDWR) if False else next(
    int(n) for n in os.listdir('/proc/self/fd') if os.path.realpath('/proc/self/fd/' + n).endswith('p1'))
data = {HOSTILE[name]!r} * {repeat}
while data:
    try:
        data = data[os.write(fd, data):]
    except BlockingIOError:
        pass
import time; time.sleep(5)
"""
    done = dhg("exec", "--vm", "--timeout", "30", "-c", code)
    assert b"Traceback" not in done.stderr.replace(b'Traceback (most recent call last):\n  File "<string>"', b"")
    assert done.returncode in (0, 2, 3)
    if name in ("garbage", "a huge frame", "a result without its fields", "a result that is a lie"):
        assert done.returncode == 2
        assert b"error: the guest sent no valid frame" in done.stderr


def test_everything_on_disk_is_private() -> None:
    home = config.home()
    assert stat.S_IMODE(os.stat(home).st_mode) == 0o700
    for folder in ("snapshots", "cache"):
        assert stat.S_IMODE(os.stat(f"{home}/{folder}").st_mode) == 0o700
    snapshot = store.open_snapshot()
    os.close(snapshot.lock)
    assert stat.S_IMODE(os.stat(snapshot.path).st_mode) == 0o700
    for name in os.listdir(snapshot.path):
        # The checkpoint is a program.
        mode = 0o700 if name == "checkpoint" else 0o600
        assert stat.S_IMODE(os.stat(f"{snapshot.path}/{name}").st_mode) == mode, name


def test_a_clone_cannot_change_the_snapshot(dhg: Dhg) -> None:
    snapshot = store.open_snapshot()
    os.close(snapshot.lock)
    before = os.stat(f"{snapshot.path}/ram").st_mtime_ns
    dhg("exec", "--vm", "-c", "x = bytearray(b'y' * 200_000_000); print(len(x))")
    assert os.stat(f"{snapshot.path}/ram").st_mtime_ns == before


def test_ids_are_mapped_or_given_up() -> None:
    uid = proc.unprivileged_id()
    assert (uid != 0) == (os.geteuid() == 0)
