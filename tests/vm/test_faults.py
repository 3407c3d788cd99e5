"""Faults, provoked for real: files, processes, the host."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import DEADLINE_S, DHG, Dhg, gone, qemus_of

from dhg import config
from dhg.snapshot import store


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Path]:
    """A home with a copy of the snapshot (RAM as a hard link where that is possible), to be damaged."""
    snapshot = store.open_snapshot()
    os.close(snapshot.lock)
    home = tmp_path / "home"
    target = home / "snapshots" / snapshot.version / os.path.basename(snapshot.path)
    target.mkdir(parents=True)
    subprocess.run(["cp", "--sparse=always", "-a", f"{snapshot.path}/.", target], check=True)
    launch = (target / "launch").read_bytes()
    old, new = os.fsencode(snapshot.path), os.fsencode(target)
    (target / "launch").write_bytes(_relocate(launch, old, new))
    os.symlink(target.name, target.parent / "qemu")
    yield home
    shutil.rmtree(home, ignore_errors=True)


def _relocate(launch: bytes, old: bytes, new: bytes) -> bytes:
    from dhg.wire import frames

    data = b""
    for key, values in frames.fields(launch).items():
        for value in values:
            data += frames.field(key, value.replace(old, new))
    return data


def generation(home: Path) -> Path:
    found = list(home.glob("snapshots/*/qemu"))
    return found[0].resolve()


def of_the_copy(home: Path, name: str) -> Path:
    """A file of the copied snapshot, if it has such a one."""
    path = generation(home) / name
    if name == "checkpoint" and not path.exists():
        pytest.skip("the snapshot is a KVM one: it has no checkpoint")
    return path


def hello(dhg: Dhg, home: Path, **more: str) -> tuple[int, bytes, bytes]:
    done = dhg("exec", "--vm", "-c", "print('hello')", env={"DHG_HOME": str(home), **more})
    return done.returncode, done.stdout, done.stderr


def test_the_copy_works(dhg: Dhg, copy: Path) -> None:
    assert hello(dhg, copy) == (0, b"hello\n", b"")


@pytest.mark.parametrize("name", ["ram", "state", "kernel", "launch", "checkpoint"])
def test_a_truncated_file_is_named(name: str, dhg: Dhg, copy: Path) -> None:
    path = of_the_copy(copy, name)
    os.truncate(path, path.stat().st_size // 2)
    code, out, err = hello(dhg, copy)
    assert (code, out) == (2, b"")
    assert name.encode() in err
    assert b"hint: run `dhg vm prepare" in err


@pytest.mark.parametrize("name", ["ram", "state", "kernel", "launch", "checkpoint"])
def test_a_missing_file_is_named(name: str, dhg: Dhg, copy: Path) -> None:
    of_the_copy(copy, name).unlink()
    code, out, err = hello(dhg, copy)
    assert (code, out) == (2, b"")
    assert name.encode() in err
    assert b"hint: run `dhg vm prepare" in err


def test_a_swapped_file_is_found(dhg: Dhg, copy: Path) -> None:
    path = generation(copy) / "state"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    code, _, err = hello(dhg, copy)
    assert code == 2
    assert b"state has changed" in err


def test_flipped_bits_in_the_state_end_in_an_error_not_in_a_hang(dhg: Dhg, copy: Path) -> None:
    # With size and time as they were: what only the checksums of `verify` can see.
    path = generation(copy) / "state"
    times = path.stat()
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 97):
        data[at] ^= 0x41
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, out, err = hello(dhg, copy, DHG_VM_RESTORE="state")
    assert (code, out) == (2, b""), err
    assert b"error: the VM could not be restored" in err
    done = dhg("vm", "verify", "--json", env={"DHG_HOME": str(copy)})
    assert done.returncode == 1
    bad = [check["name"] for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert bad == ["sha256 of state"]


def test_flipped_bits_in_the_checkpoint_are_done_without(dhg: Dhg, copy: Path) -> None:
    path = of_the_copy(copy, "checkpoint")
    times = path.stat()
    with open(path, "r+b") as file:
        # Of the program, behind what the kernel looks at; a few bytes only, so that some of it runs.
        for at in range(2000, 20_000, 997):
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 0x41]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hello(dhg, copy) == (0, b"hello\n", b"")
    done = dhg("vm", "verify", "--json", env={"DHG_HOME": str(copy)})
    assert done.returncode == 1
    bad = [check["name"] for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert bad == ["sha256 of checkpoint"]


def test_an_unknown_format_is_refused(dhg: Dhg, copy: Path) -> None:
    from dhg.wire import frames

    path = generation(copy) / "launch"
    found = frames.fields(path.read_bytes())
    found[store.L_FORMAT] = [frames.field(0, store.FORMAT + 1)[frames.HEAD_SIZE :]]
    path.write_bytes(b"".join(frames.field(key, value) for key, values in found.items() for value in values))
    code, _, err = hello(dhg, copy)
    assert code == 2
    assert b"has format" in err
    assert b"hint: run `dhg vm prepare" in err


def test_garbage_instead_of_launch(dhg: Dhg, copy: Path) -> None:
    for data in (b"", b"\xff" * 100, os.urandom(500)):
        (generation(copy) / "launch").write_bytes(data)
        code, _, err = hello(dhg, copy)
        assert code == 2
        assert b"damaged" in err
        assert b"Traceback" not in err


def test_another_qemu_is_noticed(dhg: Dhg, copy: Path, tmp_path: Path) -> None:
    from dhg.wire import frames

    # A QEMU that was upgraded: same path, other file.
    real = shutil.which("qemu-system-x86_64")
    assert real is not None
    path = generation(copy) / "launch"
    found = frames.fields(path.read_bytes())
    other = tmp_path / "qemu-system-x86_64"
    shutil.copy(real, other)
    found[store.L_CHECK] = [
        value.replace(os.fsencode(os.path.realpath(real)), os.fsencode(other)) for value in found[store.L_CHECK]
    ]
    path.write_bytes(b"".join(frames.field(key, value) for key, values in found.items() for value in values))
    code, _, err = hello(dhg, copy)
    assert code == 2
    assert b"qemu-system-x86_64 has changed since" in err


def _start(code: str) -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen(
        [DHG, "exec", "--vm", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return process, int(file.read().split()[0])


def test_qemu_killed_from_outside() -> None:
    process, qemu = _start("print('up'); import time; time.sleep(100)")
    os.kill(qemu, signal.SIGKILL)
    begin = time.monotonic()
    _, err = process.communicate(timeout=DEADLINE_S)
    assert time.monotonic() - begin < 2
    assert process.returncode == 2
    assert err.startswith(b"error: the VM ended while the script ran\n")


def test_guest_kernel_panic() -> None:
    process, _ = _start(
        "print('up', flush=True); open('/proc/sysrq-trigger', 'w').write('c'); import time; time.sleep(100)"
    )
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert b"error: the VM ended while the script ran" in err


def test_jvm_crash() -> None:
    # HotSpot's handler takes a null pointer in native code for a crash of its own: report, abort.
    process, _ = _start("print('up', flush=True)\nimport ctypes\nctypes.string_at(0)")
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert b"A fatal error has been detected by the Java Runtime Environment" in out
    assert b"error: the script ended its interpreter (killed by signal 6)" in err


def test_a_stopped_vmm_does_not_outlive_the_timeout() -> None:
    argv = [DHG, "exec", "--vm", "--timeout", "8", "-c", "print('up'); import time; time.sleep(100)"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            qemu = int(file.read().split()[0])
        os.kill(qemu, signal.SIGSTOP)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3
    assert b"timed out after 8 s" in err
    assert not os.path.exists(f"/proc/{qemu}")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_a_client_killed_by_any_signal_takes_its_vm_along(number: signal.Signals) -> None:
    # What runs in a shell's background ignores some, and so would a client that inherits it.
    before = None if number == signal.SIGKILL else signal.signal(number, signal.SIG_DFL)
    try:
        process, qemu = _start("print('up'); import time; time.sleep(100)")
    finally:
        if before is not None:
            signal.signal(number, before)
    process.send_signal(number)
    process.communicate(timeout=DEADLINE_S)
    assert gone(qemu, 1.0)


def test_clean_leaves_what_is_in_use(dhg: Dhg, copy: Path) -> None:
    env = {**os.environ, "DHG_HOME": str(copy)}
    argv = [DHG, "exec", "--vm", "-c", "print('up'); import time; time.sleep(100)"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        done = dhg("vm", "clean", "--all", env={"DHG_HOME": str(copy)})
        assert b"in use" in done.stdout
        assert hello(dhg, copy)[:2] == (0, b"hello\n")
    finally:
        process.kill()
        process.communicate()
    until = time.monotonic() + 2
    while qemus_of(copy) and time.monotonic() < until:
        time.sleep(0.02)
    assert dhg("vm", "clean", "--all", env={"DHG_HOME": str(copy)}).returncode == 0
    assert hello(dhg, copy)[0] == 4


def test_clean_refuses_what_is_no_version(dhg: Dhg) -> None:
    for name in ("..", "../../etc", "/", "", "x"):
        done = dhg("vm", "clean", "--version", name)
        assert done.returncode == 2
        assert b"not a version" in done.stderr


def test_a_prepare_that_is_killed_leaves_nothing_that_is_used(dhg: Dhg, copy: Path) -> None:
    # The stages are there already, so that the kill hits the making of the snapshot.
    os.symlink(f"{config.home()}/cache", copy / "cache")
    before = hello(dhg, copy)
    assert before[:2] == (0, b"hello\n")
    for delay_s in (0.1, 0.4, 0.8, 1.5, 4.0):
        argv = [DHG, "vm", "prepare", "--force", "--memory", "1G"]
        env = {**os.environ, "DHG_HOME": str(copy)}
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay_s)
        process.kill()
        process.wait()
        assert hello(dhg, copy)[:2] == (0, b"hello\n")
    until = time.monotonic() + 2
    while qemus_of(copy) and time.monotonic() < until:
        time.sleep(0.02)
    assert qemus_of(copy) == []
    (copy / "cache").unlink()
    assert dhg("vm", "clean", env={"DHG_HOME": str(copy)}).returncode == 0
    assert [path.name for path in generation(copy).parent.iterdir() if path.name.endswith(".tmp")] == []
    assert hello(dhg, copy)[:2] == (0, b"hello\n")


def test_a_full_disk_and_a_read_only_home(dhg: Dhg, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100M,mode=700", "dhg-test", place], check=True)
    try:
        done = dhg("vm", "prepare", env={"DHG_HOME": str(place / "home")})
        assert done.returncode == 2
        assert b"MiB free" in done.stderr
        found = json.loads(dhg("doctor", "--json", env={"DHG_HOME": str(place / "home")}).stdout)["findings"]
        (home,) = [item for item in found if item["name"] == "home"]
        assert home["level"] == "note"
        assert home["text"].split()[-1] == re.findall(r"takes (\d+)", done.stderr.decode())[0]
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        done = dhg("vm", "prepare", env={"DHG_HOME": str(place / "other")})
        assert done.returncode == 2
        assert b"set DHG_HOME to a writable directory" in done.stderr
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_read_only_home_that_has_a_snapshot(dhg: Dhg, copy: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a read-only mount takes root")
    subprocess.run(["mount", "--bind", copy, copy], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", copy], check=True)
        env = {"DHG_HOME": str(copy)}
        hint = b"set DHG_HOME to a writable directory\n"
        state = {"DHG_VM_RESTORE": "state"}
        code, out, err = hello(dhg, copy, **state)
        assert (code, out) == (2, b"")
        assert b"hint: the script did not run; QEMU needs a snapshot that can be written: " + hint in err
        ways = [(state, 1, "bad")]
        if (generation(copy) / "checkpoint").exists():
            # Which opens nothing for writing.
            assert hello(dhg, copy) == (0, b"hello\n", b"")
            ways.append(({}, 0, "note"))
        for more, code, level in ways:
            done = dhg("doctor", "--json", env={**env, **more})
            found = {item["name"]: item["level"] for item in json.loads(done.stdout)["findings"]}
            assert (done.returncode, found["home"], found["leftovers"]) == (code, level, "ok")
        assert dhg("doctor", "--fix", env=env).returncode == 2
        assert b"STATE" in dhg("vm", "status", env=env).stdout
        for verb in ("prepare", "clean"):
            done = dhg("vm", verb, env=env)
            assert done.returncode == 2
            assert b"Read-only file system\nhint: " + hint in done.stderr
    finally:
        subprocess.run(["umount", copy], check=True)


def test_doctor(dhg: Dhg, tmp_path: Path) -> None:
    done = dhg("doctor", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True)
    names = [finding["name"] for finding in found["findings"]]
    assert {"qemu", "kvm", "userfaultfd", "home", "memory", "leftovers"} <= set(names)
    done = dhg("doctor", env={"DHG_HOME": str(tmp_path)})
    assert done.returncode == 1
    assert b"-> dhg vm prepare" in done.stdout


def test_doctor_minds_the_snapshot_that_exec_takes(dhg: Dhg, copy: Path) -> None:
    def examined(**env: str) -> tuple[int, dict[str, tuple[str, str]]]:
        done = dhg("doctor", "--json", env={"DHG_HOME": str(copy), **env})
        findings = {item["name"]: item for item in json.loads(done.stdout)["findings"]}
        found = {
            name: (item["level"], item["remedy"] or "") for name, item in findings.items() if name.startswith("snap")
        }
        return done.returncode, found

    version = generation(copy).parent.name
    other = copy / "snapshots" / "0.36.1"
    shutil.copytree(generation(copy).parent, other, symlinks=True)
    (other / generation(copy).name / "launch").unlink()
    # The newest is taken.
    os.utime(other / generation(copy).name, ns=(1, 1))
    assert hello(dhg, copy)[:2] == (0, b"hello\n")
    remedy = "dhg vm prepare --version 0.36.1 --force"
    assert examined() == (0, {f"snapshot {version} (qemu)": ("ok", ""), "snapshot 0.36.1 (qemu)": ("note", remedy)})
    assert dhg("exec", "--vm", "-c", "", env={"DHG_HOME": str(copy), "DHG_VERSION": "0.36.1"}).returncode == 2
    code, found = examined(DHG_VERSION="0.36.1")
    assert (code, found["snapshot 0.36.1 (qemu)"]) == (1, ("bad", remedy))
    code, found = examined(DHG_VERSION="0.36.2")
    assert (code, found["snapshots"]) == (1, ("bad", "dhg vm prepare --version 0.36.2"))
    code, found = examined(DHG_ENGINE="firecracker")
    assert (code, found["snapshots"]) == (1, ("bad", f"dhg vm prepare --version {version} --engine firecracker"))


def test_doctor_finds_and_removes_leftovers(dhg: Dhg, copy: Path) -> None:
    left = generation(copy).parent / ".qemu-0123456789ab.tmp"
    left.mkdir()
    (left / "ram.boot").write_bytes(b"x")
    done = dhg("doctor", env={"DHG_HOME": str(copy)})
    assert str(left).encode() in done.stdout
    done = dhg("doctor", "--fix", env={"DHG_HOME": str(copy)})
    assert b"removed " + str(left).encode() in done.stdout
    assert not left.exists()
    assert hello(dhg, copy)[:2] == (0, b"hello\n")
