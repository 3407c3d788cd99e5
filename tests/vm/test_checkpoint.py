"""QEMU's process, written down with what it has translated: used where it fits, done without where it does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Dhg

from dhg import machine, proc
from dhg.engine import ptrace, qmp
from dhg.engine.machinecode import BASE, Program, elf
from dhg.engine.machinecode import HEAD as START
from dhg.errors import HostError
from dhg.snapshot import store
from dhg.wire import client, frames

HELLO = b"print('hello')"


def forbidden() -> str | None:
    """Why this host does not let us look into a process of our own, if it does not."""
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            with ptrace.Stopped(child.pid):
                return None
        except HostError as error:
            return str(error)
        finally:
            child.kill()


@pytest.fixture
def snapshot() -> store.Snapshot:
    """The snapshot that all tests share, if it has a checkpoint."""
    found = store.open_snapshot(engine="qemu")
    os.close(found.lock)
    if found.accel != "tcg":
        pytest.skip("the snapshot is a KVM one: QEMU translates nothing")
    if not found.checkpoint and (why := forbidden()):
        pytest.skip(f"no checkpoint can be made here: {why}")
    assert found.checkpoint, "the snapshot was made here, so its checkpoint fits"
    return found


def a_copy(
    snapshot: store.Snapshot, home: Path, change: Callable[[int, bytes], bytes], checkpoint: Path | None = None
) -> None:
    """A home with a copy of the snapshot, the fields of its `launch` changed; its memory is linked."""
    generation = home / "snapshots" / snapshot.version / ".qemu-copy"
    generation.mkdir(parents=True)
    for name in os.listdir(snapshot.path):
        if name == "ram":
            (generation / name).symlink_to(f"{snapshot.path}/ram")
        else:
            shutil.copy2(
                checkpoint if checkpoint and name == "checkpoint" else f"{snapshot.path}/{name}", generation / name
            )
    there, here = os.fsencode(snapshot.path), os.fsencode(generation)
    fields = frames.fields((generation / "launch").read_bytes())
    launch = b""
    for key, values in fields.items():
        for value in values:
            moved = value.replace(there, here)
            if checkpoint and key == store.L_CHECK and moved.endswith(b"/checkpoint"):
                found = os.stat(generation / "checkpoint")
                moved = b"%d %d %s/checkpoint" % (found.st_size, found.st_mtime_ns, here)
            launch += frames.field(key, change(key, moved))
    (generation / "launch").write_bytes(launch)
    (generation.parent / "qemu").symlink_to(generation.name)


def program(vm: machine.Machine) -> str:
    """What a VM's process runs."""
    return os.path.basename(os.readlink(f"/proc/{vm.vm.process.pid}/exe"))


def says_hello(vm: machine.Machine) -> bool:
    out: list[bytes] = []
    return vm.run(client.Request(HELLO), stdout=out.append, stderr=out.append).exit_code == 0 and out == [b"hello\n"]


def translated(vm: qmp.Vm) -> int:
    """How many blocks QEMU has translated."""
    ask = {"execute": "human-monitor-command", "arguments": {"command-line": "info jit"}, "id": "jit"}
    vm.qmp.send(json.dumps(ask).encode() + b"\n")
    told = json.loads(vm.qmp.wait_for(b'"id": "jit"', deadline=proc.Deadline(20)))["return"]
    found = re.search(r"TB count +(\d+)", told)
    assert found
    return int(found[1])


def blocks_of_a_hello(monkeypatch: pytest.MonkeyPatch, way: str) -> tuple[int, int]:
    """Blocks that a clone has when it begins, and those that a hello adds."""
    monkeypatch.setenv("DHG_VM_RESTORE", way)
    with machine.restore(engine="qemu") as vm:
        assert isinstance(vm.vm, qmp.Vm)
        session = vm._settle(proc.Deadline(60))
        before = translated(vm.vm)
        out: list[bytes] = []
        assert session.run(client.Request(HELLO), stdout=out.append, stderr=out.append).exit_code == 0
        assert b"".join(out) == b"hello\n"
        assert vm.fallback is None
        return before, translated(vm.vm) - before


def test_translations_are_kept(snapshot: store.Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    before, added = blocks_of_a_hello(monkeypatch, "checkpoint")
    before_state, added_state = blocks_of_a_hello(monkeypatch, "state")
    assert before > 10_000 > before_state
    assert added_state > 1_000
    assert added < added_state / 5


def test_the_process_is_the_checkpoint_and_confined(snapshot: store.Snapshot) -> None:
    with machine.restore(engine="qemu") as vm:
        vm._settle(proc.Deadline(60))
        pid = vm.vm.process.pid
        assert os.readlink(f"/proc/{pid}/exe") == os.path.realpath(snapshot.checkpoint or "")
        with open(f"/proc/{pid}/status") as file:
            status = {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
        assert status["Name"] == "qemu-system-x86"
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        assert int(status["CapEff"], 16) == 0
        # The guest's memory cannot be written to, not even by a QEMU that has been broken into.
        for name in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{name}").endswith("/ram"):
                with open(f"/proc/{pid}/fdinfo/{name}") as file:
                    flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
                assert flags & os.O_ACCMODE == os.O_RDONLY
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            assert file.read().split(b"\0")[0].endswith(b"/qemu-system-x86_64")


def as_it_is(_: int, value: bytes) -> bytes:
    return value


def another_kernel(key: int, value: bytes) -> bytes:
    return value + b"x" if key == store.L_HOST else value


def another_library(key: int, value: bytes) -> bytes:
    return b"1" + value if key == store.L_MAPPED and b"libc.so" in value else value


@pytest.mark.parametrize(
    ("change", "expected"),
    [(as_it_is, "checkpoint"), (another_kernel, "qemu-system-x86_64"), (another_library, "qemu-system-x86_64")],
)
def test_where_it_does_not_fit_it_is_left_alone(
    change: Callable[[int, bytes], bytes],
    expected: str,
    snapshot: store.Snapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_copy(snapshot, tmp_path, change)
    monkeypatch.setenv("DHG_HOME", str(tmp_path))
    with machine.restore(engine="qemu") as vm:
        assert says_hello(vm)
        assert (program(vm), vm.fallback) == (expected, None)


def test_one_that_does_not_work_is_replaced_before_the_script_runs(
    snapshot: store.Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dhg: Dhg
) -> None:
    broken = tmp_path / "broken"
    ends = Program(BASE + START)
    ends.call(60, 3)
    broken.write_bytes(elf(ends.finish(), BASE))
    broken.chmod(0o700)
    home = tmp_path / "home"
    a_copy(snapshot, home, as_it_is, broken)
    monkeypatch.setenv("DHG_HOME", str(home))
    with machine.restore(engine="qemu") as vm:
        assert says_hello(vm)
        assert program(vm) == "qemu-system-x86_64"
        assert vm.fallback
    done = dhg("exec", "--vm", "-c", "print('once')", env={"DHG_HOME": str(home)})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"once\n", b"")
    done = dhg("exec", "--vm", "--verbose", "-c", "1", env={"DHG_HOME": str(home)})
    assert b"dhg: the checkpoint was not used: QEMU went away\n" in done.stderr


def test_the_way_can_be_chosen(snapshot: store.Snapshot, monkeypatch: pytest.MonkeyPatch, dhg: Dhg) -> None:
    monkeypatch.setenv("DHG_VM_RESTORE", "state")
    with machine.restore(engine="qemu") as vm:
        assert says_hello(vm)
        assert program(vm) == "qemu-system-x86_64"
    done = dhg("exec", "--vm", "-c", "1", env={"DHG_VM_RESTORE": "quickly"})
    assert done.returncode == 2
    assert b"DHG_VM_RESTORE is 'quickly'" in done.stderr


MANY_READS = b"""
import os, sys, threading, time
files = [f"{folder}/{name}" for folder, _, names in os.walk("/usr/lib") for name in names]
until = time.monotonic() + 4
total = 0
def read(mine):
    global total
    for path in mine:
        if os.path.isfile(path) and time.monotonic() < until:
            with open(path, "rb") as file:
                while data := file.read(1 << 20):
                    total += len(data)
threads = [threading.Thread(target=read, args=(files[first::16],)) for first in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for _ in range(20):
    sys.stdout.buffer.write(b"x" * 1_000_000)
print(total > 20_000_000)
"""


def test_it_takes_new_threads_and_memory(snapshot: store.Snapshot) -> None:
    # QEMU makes threads for what the guest reads of its disk, and its heap grows.
    out = bytearray()
    with machine.restore(engine="qemu") as vm:
        result = vm.run(client.Request(MANY_READS), stdout=out.extend, stderr=out.extend, deadline=proc.Deadline(90))
        assert result.exit_code == 0, bytes(out[-500:])
        with open(f"/proc/{vm.vm.process.pid}/status") as file:
            threads = next(int(line.split()[1]) for line in file if line.startswith("Threads:"))
        assert vm.fallback is None
    assert out == b"x" * 20_000_000 + b"True\n"
    assert threads > 4
