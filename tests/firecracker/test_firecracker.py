"""The Firecracker engine against a stand-in that speaks its protocols; the guest is the real runner, without a kernel of its own."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.conftest import run_dhg
from tests.firecracker.conftest import make_snapshot, requests, stand_in
from tests.kvm.checks import TABLE

from dhg import machine, proc
from dhg.engine import fcapi, firecracker
from dhg.errors import DhgError, HostError, MachineError, OutcomeUnknown, UsageError
from dhg.pager import process as pager
from dhg.snapshot import store
from dhg.wire import client

LOAD = "PUT /snapshot/load "


def run(source: bytes) -> tuple[int, bytes] | tuple[int, bytes, bytes]:
    """Exit code and output of a script in a restored VM, and what it said on stderr if it did."""
    out: list[bytes] = []
    err: list[bytes] = []
    with machine.restore("1") as vm:
        result = vm.run(client.Request(source), stdout=out.append, stderr=err.append, deadline=proc.Deadline(60.0))
    return (result.exit_code, b"".join(out), b"".join(err)) if err else (result.exit_code, b"".join(out))


@pytest.mark.parametrize("version", ["1.12.0", "1.15.1", "1.16.0"])
def test_from_boot_to_script(tmp_path: Path, home: Path, needs_uffd: None, version: str) -> None:
    path = make_snapshot(tmp_path, home, stand_in(tmp_path, version))
    # Each was valid by Firecracker's own description, or the stand-in would have refused it.
    assert [line.split(" ")[:2] for line in requests(tmp_path)] == [
        ["PUT", "/machine-config"],
        ["PUT", "/boot-source"],
        ["PUT", "/drives/root"],
        ["PUT", "/vsock"],
        ["PUT", "/actions"],
        ["PATCH", "/vm"],
        ["PUT", "/snapshot/create"],
    ]
    assert run(b"import sys; print('hello'); print('err', file=sys.stderr); sys.exit(7)") == (7, b"hello\n", b"err\n")
    load, *rest = requests(tmp_path)
    body = json.loads(load.removeprefix(LOAD))
    assert body["mem_backend"]["backend_type"] == "Uffd"
    assert ("vsock_override" in body) == (version == "1.16.0")
    # The memory that the pager served is the snapshot's.
    with open(f"{path}/ram", "rb") as file:
        assert f"memory {file.read(8).hex()} {'00' * 8}" in rest
    assert 'PATCH /vm {"state":"Resumed"}' in rest
    assert not os.path.exists(home / "run") or os.listdir(home / "run") == []


def test_several_at_once(tmp_path: Path, home: Path, needs_uffd: None) -> None:
    for version in ("1.12.0", "1.16.0"):
        folder = tmp_path / version
        folder.mkdir()
        make_snapshot(folder, home / version, stand_in(folder, version))
        os.environ["DHG_HOME"] = str(home / version)
        with ThreadPoolExecutor(3) as workers:
            found = list(workers.map(lambda number: run(b"print(%d)" % number), range(3)))
        assert found == [(0, b"%d\n" % number) for number in range(3)]


def test_the_file_backend(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_snapshot(tmp_path, home, stand_in(tmp_path))
    requests(tmp_path)
    monkeypatch.setenv("DHG_VM_MEMORY", "file")
    assert run(b"print(1)") == (0, b"1\n")
    body = json.loads(requests(tmp_path)[0].removeprefix(LOAD))
    assert body["mem_backend"] == {"backend_type": "File", "backend_path": f"{path}/ram"}


def test_the_modes_of_the_pager(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path)
    assert firecracker.memory_mode(path) == pager.LAZY
    (tmp_path / firecracker.WORKING_SET).touch()
    assert firecracker.memory_mode(path) == pager.SET
    monkeypatch.setenv("DHG_VM_EAGER_UFFD", "1")
    assert firecracker.memory_mode(path) == pager.EAGER
    monkeypatch.setenv("DHG_VM_MEMORY", "lazy")
    assert firecracker.memory_mode(path) == pager.LAZY
    monkeypatch.setenv("DHG_VM_MEMORY", "swap")
    with pytest.raises(UsageError):
        firecracker.memory_mode(path)


def test_the_chunk_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert firecracker.chunk_bytes() == 64 << 10
    for text, size in (("2M", 2 << 20), ("4k", 4096), ("1024M", 1 << 30)):
        monkeypatch.setenv("DHG_VM_CHUNK", text)
        assert firecracker.chunk_bytes() == size
    for text in ("3M", "2", "M", "2048M", "1K", "-1M", "64KiB"):
        monkeypatch.setenv("DHG_VM_CHUNK", text)
        with pytest.raises(UsageError):
            firecracker.chunk_bytes()


@pytest.mark.parametrize("mode", ["eager", "set", "lazy"])
def test_each_mode_runs(
    tmp_path: Path, home: Path, needs_uffd: None, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path))
    monkeypatch.setenv("DHG_VM_MEMORY", mode)
    assert run(b"print(2)") == (0, b"2\n")


def test_a_working_set_is_recorded(tmp_path: Path, home: Path, needs_uffd: None) -> None:
    path = make_snapshot(tmp_path, home, stand_in(tmp_path))
    snapshot = store.open_snapshot("1", engine="firecracker")

    def start(what: store.Snapshot) -> firecracker.Vm:
        return firecracker.start(
            what.path, what.argv[0], version="1.16.0", lock=what.lock, memory_mib=what.memory_mib, mode=pager.RECORD
        )

    with machine.Machine(snapshot, start) as vm:
        vm.run(client.Request(b"pass"), stdout=print, stderr=print, deadline=proc.Deadline(60.0))
        assert isinstance(vm.vm, firecracker.Vm)
        firecracker.record(vm.vm)
    os.close(snapshot.lock)
    assert os.path.getsize(f"{path}/{firecracker.WORKING_SET}") > 32
    assert run(b"print(3)") == (0, b"3\n")


def test_connections_lost_to_the_reset_are_made_anew(tmp_path: Path, home: Path, needs_uffd: None) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path, faults="r"))
    assert run(b"print('there')") == (0, b"there\n")


def test_stdin_and_a_script_that_ends_its_interpreter(tmp_path: Path, home: Path, needs_uffd: None) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path))
    source = "import sys; print(len(sys.stdin.read()))"
    done = run_dhg("exec", "--vm", "--version", "1", "-c", source, stdin=b"x" * 300_000)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"300000\n", b"")
    with pytest.raises(OutcomeUnknown, match="exit status 9"):
        run(b"import os; print('last', flush=True); os._exit(9)")
    done = run_dhg("exec", "--vm", "--version", "1", "-c", "import os, signal; os.kill(os.getpid(), 9)")
    assert done.returncode == 2
    assert b"killed by signal 9" in done.stderr


def test_ctrl_c_and_timeout(tmp_path: Path, home: Path, needs_uffd: None) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path))
    done = run_dhg("exec", "--vm", "--version", "1", "--timeout", "3", "-c", "import time; time.sleep(60)")
    assert done.returncode == 3
    got: list[bytes] = []
    with machine.restore("1") as vm:

        def output(data: bytes) -> None:
            got.append(data)
            vm.interrupt()

        source = b"import time\ntry:\n    print('go', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('stopped')"
        result = vm.run(client.Request(source), stdout=output, stderr=print, deadline=proc.Deadline(60.0))
    assert (result.exit_code, b"".join(got)) == (0, b"go\nstopped\n")


def test_the_pager_dies_and_takes_the_vm_along(tmp_path: Path, home: Path, needs_uffd: None) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path))
    with machine.restore("1") as vm:
        assert isinstance(vm.vm, firecracker.Vm)
        server = vm.vm.pager
        assert server is not None

        def output(data: bytes) -> None:
            os.kill(server.process.pid, signal.SIGKILL)

        source = b"import time; print(1, flush=True); time.sleep(60)"
        with pytest.raises(OutcomeUnknown):
            vm.run(client.Request(source), stdout=output, stderr=print, deadline=proc.Deadline(60.0))
        assert vm.vm.process.wait(10.0) == -signal.SIGKILL


needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="mounting takes root and /dev/fuse"
)

READING = """
import os
import helper
print(os.getcwd(), sorted(os.listdir()), helper.X, open('a.txt').read(), len(open('big', 'rb').read()))
print(open('/mnt/more/b.txt').read())
try:
    open('new', 'w')
except OSError as error:
    print(error.strerror)
with open('/mnt/more/c.txt', 'w') as file:
    file.write('from the VM')
os.rename('/mnt/more/c.txt', '/mnt/more/d.txt')
"""


@needs_fuse
@pytest.mark.parametrize("faults", ["-", "r", "f"])
def test_the_hosts_files(tmp_path: Path, home: Path, needs_uffd: None, faults: str) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path, faults=faults))
    work, more = tmp_path / "work", tmp_path / "more"
    work.mkdir()
    more.mkdir()
    for path, data in {
        work / "a.txt": b"in a",
        work / "helper.py": b"X = 42",
        work / "big": bytes(3_000_000),
        more / "b.txt": b"in b",
    }.items():
        path.write_bytes(data)
    vm = ("exec", "--vm", "--version", "1")
    done = run_dhg(*vm, "--mount", f"{more}:/mnt/more:rw", "-c", READING, cwd=work)
    expected = "/mnt/workspace ['a.txt', 'big', 'helper.py'] 42 in a 3000000\nin b\nRead-only file system\n"
    assert (done.returncode, done.stdout.decode()) == (0, expected)
    assert b"hint: the script tried to write to files of this host" in done.stderr
    assert sorted(os.listdir(more)) == ["b.txt", "d.txt"]
    assert (more / "d.txt").read_text() == "from the VM"
    done = run_dhg(*vm, "--rw", "-c", "open('new', 'w').write('new'); import os; os.unlink('a.txt')", cwd=work)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (work / "new").read_text() == "new"
    assert not (work / "a.txt").exists()
    done = run_dhg(*vm, "--no-workspace", "-c", "import os; print(os.getcwd(), os.listdir())", cwd=work)
    assert (done.returncode, done.stdout) == (0, b"/mnt/workspace []\n")


@needs_fuse
def test_outputs(tmp_path: Path, home: Path, needs_uffd: None) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "t.csv").write_text("old")
    command = ("exec", "--vm", "--version", "1", "--output", f"t={folder}/t.csv", "-c")
    done = run_dhg(*command, TABLE + "raise SystemExit(3)")
    assert done.returncode == 3
    assert (os.listdir(folder), (folder / "t.csv").read_text()) == (["t.csv"], "old")
    done = run_dhg(*command, TABLE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (os.listdir(folder), (folder / "t.csv").read_text()) == (["t.csv"], "x\n1\n")


@needs_fuse
def test_a_script_that_touches_no_file_starts_no_server(
    tmp_path: Path, home: Path, needs_uffd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source, served in ((b"print(sum(range(10)))", False), (b"import os; os.stat('console')", True)):
        with machine.restore("1") as vm:
            request = client.Request(source)
            vm.run(request, stdout=print, stderr=print, deadline=proc.Deadline(60.0), shares=((".", "r"),))
            assert (vm._server is not None) == served


@needs_fuse
def test_a_server_that_is_gone_is_an_error_and_no_wait(
    tmp_path: Path, home: Path, needs_uffd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_snapshot(tmp_path, home, stand_in(tmp_path))
    monkeypatch.chdir(tmp_path)
    out: list[bytes] = []
    with machine.restore("1") as vm:

        def output(data: bytes) -> None:
            out.append(data)
            if data.startswith(b"there"):
                assert vm._server is not None
                os.kill(vm._server.process.pid, signal.SIGKILL)

        source = b"""
import os, time
os.stat('console')
print('there', flush=True)
end = time.monotonic() + 30
while time.monotonic() < end:
    try:
        os.stat('nothing')
    except FileNotFoundError:
        time.sleep(0.01)
    except OSError as error:
        print(error.errno)
        break
"""
        shares = ((".", "r"),)
        vm.run(client.Request(source), stdout=output, stderr=print, deadline=proc.Deadline(60.0), shares=shares)
    assert b"".join(out) in (b"there\n107\n", b"there\n103\n")
    assert vm.files_error is not None


def test_what_firecracker_refuses_is_told(tmp_path: Path, home: Path) -> None:
    with pytest.raises(MachineError, match=r"refused PATCH /vm \(400\)") as caught:
        make_snapshot(tmp_path, home, stand_in(tmp_path, faults="p"))
    assert "cannot go from running to Paused" in (caught.value.detail or "")


def test_a_program_that_ends_or_is_another(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match=r"1\.12 or newer"):
        firecracker.version_of(stand_in(tmp_path, "1.11.0"))
    with pytest.raises(HostError, match="no Firecracker"):
        firecracker.version_of("/bin/echo")
    monkeypatch.setenv("DHG_FIRECRACKER", str(tmp_path / "none"))
    with pytest.raises(HostError, match="not found"):
        firecracker.path()
    assert firecracker.numbers("1.17.0-dev") == (1, 17)
    spec = firecracker.Spec("/bin/false", "1.16.0", memory_mib=1, vcpus=1, kernel="", initramfs="", image="")
    with pytest.raises(MachineError, match="ended with status 1"):
        firecracker.boot(spec, console=2, timeout_s=10)
    assert os.listdir(home / "run") == []


def test_requests_are_json_whatever_the_path() -> None:
    body: dict[str, fcapi.Value] = {'a"b\\c\n\x1f/ü': {"x": True, "n": 3, "s": "'\t\u2028"}}
    assert json.loads(fcapi.encode(body)) == body
    with pytest.raises(UnicodeEncodeError):
        fcapi.encode({"path": os.fsdecode(b"/\xff")})


def test_a_snapshot_whose_state_is_gone(tmp_path: Path, home: Path) -> None:
    path = make_snapshot(tmp_path, home, stand_in(tmp_path))
    os.truncate(f"{path}/state", 0)
    with pytest.raises(DhgError, match="has changed since"):
        machine.restore("1")


def test_clean_removes_what_killed_clients_left(home: Path) -> None:
    ours, left = home / "run" / f"dhg-{os.getpid()}-00", home / "run" / "dhg-4194305-00"
    for folder in (ours, left):
        folder.mkdir(parents=True)
        (folder / "api").touch()
    assert run_dhg("vm", "clean").returncode == 0
    assert ours.exists()
    assert not left.exists()
