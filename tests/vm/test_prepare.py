"""What interrupts `prepare`: kill, a full disk, another prepare, runs meanwhile. With the bare snapshot, which is made quickly."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.conftest import DEADLINE_S, DHG, Completed, qemus_of, run_dhg, share_stages

from dhg import seccomp

PREPARE = (DHG, "vm", "prepare", "--bare", "--force")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with a bare snapshot."""
    home = tmp_path_factory.mktemp("prepare")
    share_stages(home)
    done = run_dhg("vm", "prepare", "--bare", env={"DHG_HOME": str(home)})
    assert done.returncode == 0, done.stderr.decode()
    yield home
    assert qemus_of(home) == []


def hello(home: Path) -> Completed:
    return run_dhg("exec", "--vm", "--version", "bare", "-c", "print('hello')", env={"DHG_HOME": str(home)})


@contextmanager
def preparing(home: Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A prepare that is at work; killed if it still is at the end."""
    env = {**os.environ, "DHG_HOME": str(home)}
    pipe = subprocess.PIPE
    with subprocess.Popen(PREPARE, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def generation(home: Path) -> str:
    return os.readlink(home / "snapshots" / "bare" / "qemu")


def test_two_at_once_do_not_collide(home: Path) -> None:
    with preparing(home) as one, preparing(home) as two:
        for process in (one, two):
            out, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, err.decode()
            assert out.startswith(b"ready: ")
    assert hello(home).stdout == b"hello\n"
    assert len(os.listdir(home / "snapshots" / "bare")) == 3  # the lock, the link, what it points to


def test_runs_go_on_while_the_snapshot_is_made_anew(home: Path) -> None:
    before = generation(home)
    with preparing(home) as process:
        while process.poll() is None:
            done = hello(home)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n", b"")
        assert process.returncode == 0
    assert generation(home) != before
    assert hello(home).stdout == b"hello\n"


@pytest.mark.parametrize("stage", ["base system", "boot", "compact", "trial"])
def test_killed_at_any_stage_it_leaves_the_old_one_in_place(stage: str, home: Path) -> None:
    before = generation(home)
    with preparing(home) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if stage in line.decode():
                break
        process.kill()
        process.wait()
    assert generation(home) == before
    assert hello(home).stdout == b"hello\n"
    until = time.monotonic() + 2
    while qemus_of(home) and time.monotonic() < until:
        time.sleep(0.02)
    assert qemus_of(home) == []
    done = run_dhg("vm", "clean", env={"DHG_HOME": str(home)})
    assert done.returncode == 0
    assert len(os.listdir(home / "snapshots" / "bare")) == 3, done.stdout
    assert hello(home).stdout == b"hello\n"


def test_a_disk_that_fills_up_meanwhile(home: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900M,mode=700", "dhg-test", small], check=True)
    try:
        target = small / "home"
        share_stages(target)
        shutil.copytree(home / "snapshots", target / "snapshots", symlinks=True)
        with preparing(target) as process:
            assert process.stderr is not None
            said = b""
            while b"boot" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            with open(small / "filler", "wb") as file:
                try:
                    while True:
                        file.write(bytes(1 << 20))
                        file.flush()
                except OSError:
                    pass
            # Not communicate: what has been read ahead with the lines would be lost.
            err = process.stderr.read()
            assert process.wait(DEADLINE_S) == 2, err.decode()
        assert b"error: " in err
        assert b" is full: free some" in err or b"No space left" in err
        assert b"Traceback" not in err
        os.unlink(small / "filler")
        names = os.listdir(target / "snapshots" / "bare")
        assert not [name for name in names if name.endswith(".tmp")], names
        done = run_dhg("vm", "prepare", "--bare", "--force", env={"DHG_HOME": str(target)})
        assert done.returncode == 0, done.stderr.decode()
        assert hello(target).stdout == b"hello\n"
    finally:
        subprocess.run(["umount", small], check=True)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A memory control group (version 1 or 2) to run something in; skips where none can be made."""
    name = f"dhg-test-{os.getpid()}"
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(root) / name
        try:
            folder.mkdir()
            (folder / limit).write_text(str(limit_bytes))
            break
        except OSError:
            if folder.is_dir():
                folder.rmdir()
    else:
        pytest.skip("no memory control group can be made here")
    try:
        yield folder
    finally:
        until = time.monotonic() + 5
        while True:
            try:
                folder.rmdir()
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.05)


def test_a_host_without_memory_takes_the_vm_not_the_client(home: Path) -> None:
    code = "print('up', flush=True)\nheld = []\nwhile True: held.append(bytearray(b'x' * 1_000_000))"
    with memory_group(120 << 20) as group:
        command = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        argv = ["sh", "-c", command, "sh", DHG, "exec", "--vm", "--version", "bare", "--timeout", "60", "-c", code]
        done = subprocess.run(
            argv,
            capture_output=True,
            timeout=DEADLINE_S,
            env={**os.environ, "DHG_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    assert done.stdout == b"up\n", done.stderr
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(b"error: the VM ended while the script ran\n")
    assert qemus_of(home) == []
    assert hello(home).stdout == b"hello\n"


def without_ptrace() -> None:
    """Take ptrace away from this process and its children, as some containers do (seccomp(2): EPERM)."""
    one = struct.Struct("=HBBI").pack
    load, equal, back = seccomp.LOAD, seccomp.JUMP_EQUAL, seccomp.RETURN
    code = one(load, 0, 0, seccomp.NUMBER) + one(equal, 0, 1, 101)
    code += one(back, 0, 0, seccomp.RET_ERRNO | seccomp.EPERM) + one(back, 0, 0, seccomp.RET_ALLOW)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert prctl(22, 2, ctypes.addressof(fprog), 0, 0) == 0  # PR_SET_SECCOMP


def test_a_host_that_forbids_ptrace_does_without_a_checkpoint(tmp_path: Path) -> None:
    share_stages(tmp_path)
    env = {**os.environ, "DHG_HOME": str(tmp_path)}
    done = subprocess.run(
        [*PREPARE, "--accel", "tcg"],
        env=env,
        capture_output=True,
        timeout=DEADLINE_S,
        preexec_fn=without_ptrace,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"checkpoint: none: ptrace" in done.stderr
    assert not os.path.exists(tmp_path / "snapshots" / "bare" / "qemu" / "checkpoint")
    assert hello(tmp_path).stdout == b"hello\n"
    findings = json.loads(run_dhg("doctor", "--json", env={"DHG_HOME": str(tmp_path)}).stdout)["findings"]
    assert any("there is no checkpoint of QEMU" in finding["text"] for finding in findings)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system that has no programs")
def test_a_home_without_programs_does_without_a_checkpoint(tmp_path: Path) -> None:
    share_stages(tmp_path)
    cache = os.path.realpath(tmp_path / "cache")
    home = tmp_path / "mounted"
    home.mkdir()
    script = f"""set -e
mount -t tmpfs -o noexec,size=1g,mode=700 dhg {home}
ln -s {cache} {home}/cache
{DHG} vm prepare --bare --accel tcg
{DHG} exec --vm --version bare -c "print('hello')"
"""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env={**os.environ, "DHG_HOME": str(home)},
        capture_output=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.endswith(b"hello\n")
    assert b"checkpoint: not used: cannot start" in done.stderr
