"""QEMU's command lines as a whole, and the pieces of the image that need no VM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import gone

from dhg import proc
from dhg.engine import qemu
from dhg.errors import DeadlineExceeded, HostError
from dhg.image.cpio import Archive
from dhg.snapshot import build

SPEC = qemu.Spec("/usr/bin/qemu-system-x86_64", "tcg", 2048, 1, "/k", "/i", "/s/kernel", "/a,b/root.erofs", 2596096)

RESTORE = """
/usr/bin/qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot
-M microvm,rtc=on,memory-backend=ram,acpi=on,isa-serial=on,auto-kernel-cmdline=off,mem-merge=off,dump-guest-core=off
-accel tcg,tb-size=256 -cpu max,-erms,-fsrm,-la57,-rdrand,-rdseed
-smp 1 -m 2048M -object memory-backend-file,id=ram,size=2048M,mem-path=/s/ram,share=off -kernel /s/kernel -append
"""


def test_the_restore_command_line() -> None:
    argv = qemu.restore_argv(SPEC, "/s/ram")
    at = argv.index("-append")
    assert argv[: at + 1] == RESTORE.split()
    assert argv[at + 1].endswith(" dhg.accel=tcg tsc_early_khz=2596096")
    assert "driver=file,node-name=root,filename=/a,,b/root.erofs,read-only=on,locking=off" in argv
    assert argv[-2:] == ["-incoming", "defer"]


def test_boot_and_restore_differ_in_nothing_a_guest_sees() -> None:
    boot, restore = qemu.boot_argv(SPEC), qemu.restore_argv(SPEC, "/s/ram")
    only_boot = [arg for arg in boot if arg not in restore]
    only_restore = [arg for arg in restore if arg not in boot]
    assert only_boot == [
        "memory-backend-file,id=ram,size=2048M,mem-path=/dev/fd/211,share=on,align=2M",
        "/k",
        "-initrd",
        "/i",
        "-add-fd",
        "fd=206,set=1",
        "file,id=console,path=/dev/fdset/1",
    ]
    assert only_restore == [
        "memory-backend-file,id=ram,size=2048M,mem-path=/s/ram,share=off",
        "/s/kernel",
        "null,id=console",
        "-incoming",
        "defer",
    ]


def test_kvm_takes_the_hosts_cpu() -> None:
    argv = qemu.restore_argv(SPEC._replace(accel="kvm"), "/s/ram")
    assert argv[argv.index("-cpu") + 1] == "host"
    assert argv[argv.index("-accel") + 1] == "kvm"


def test_cpio_by_the_letter_of_its_format() -> None:
    archive = Archive()
    archive.file("a/b/c", b"hello", mode=0o755)
    archive.file("a/d", b"")
    found: dict[str, tuple[int, bytes]] = {}
    data, at = archive.whole(), 0
    while not found or "TRAILER!!!" not in found:
        assert data[at : at + 6] == b"070701"
        numbers = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        at += (110 + name_size + 3) // 4 * 4
        found[name] = (mode, data[at : at + size])
        at += (size + 3) // 4 * 4
    assert found == {
        "a": (0o040755, b""),
        "a/b": (0o040755, b""),
        "a/b/c": (0o100755, b"hello"),
        "a/d": (0o100644, b""),
        "TRAILER!!!": (0, b""),
    }
    assert at == len(data)


def test_sparse_copies_keep_every_byte_and_no_zeros(tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = bytearray(5 * 1024 * 1024 + 100)
    data[0:4] = b"head"
    data[3_000_000:3_000_004] = b"body"
    data[-4:] = b"tail"
    source.write_bytes(data)
    target = tmp_path / "target"
    build.copy_sparse(str(source), str(target))
    assert target.read_bytes() == data
    assert target.stat().st_blocks * 512 <= 16 * 4096


def test_spawn_gives_exactly_the_named_descriptors() -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with proc.spawn(
        ["/bin/sh", "-c", "ls -l /proc/self/fd | wc -l >&7; echo x >&2"], fds={7: writer, 2: writer}
    ) as child:
        os.close(writer)
        assert child.wait(10) == 0
        assert os.read(reader, 100).endswith(b"x\n")
    os.close(reader)


def test_spawn_survives_descriptors_that_cross() -> None:
    first, second = os.pipe2(os.O_CLOEXEC)
    with proc.spawn(
        ["/bin/sh", "-c", f"echo crossed > /proc/self/fd/{first}"], fds={first: second, second: first}
    ) as child:
        assert child.wait(10) == 0
    assert os.read(first, 100) == b"crossed\n"
    os.close(first)
    os.close(second)


def test_a_child_on_the_leash_dies_with_its_parent() -> None:
    code = (
        "import os, time\n"
        "from dhg import proc\n"
        "r, w = os.pipe2(os.O_CLOEXEC)\n"
        "child = proc.spawn(['/bin/sleep', '1000'], fds={9: r})\n"
        "proc.kill_with_us(child.pid, r)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(pid, 5.0)


def test_run_reports_failure_timeout_and_absence() -> None:
    with pytest.raises(proc.CommandFailed) as failed:
        proc.run(["sh", "-c", "echo why; exit 3"], timeout_s=10)
    assert (failed.value.status, failed.value.detail) == (3, "why")
    with pytest.raises(DeadlineExceeded):
        proc.run(["sleep", "100"], timeout_s=0.1)
    with pytest.raises(HostError):
        proc.run(["no-such-program-at-all"], timeout_s=1)
