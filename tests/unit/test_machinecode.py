"""Programs that consist of system calls, run."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from dhg import seccomp
from dhg.engine import machinecode
from dhg.engine.machinecode import BASE, FAILED, HEAD, NUMBERS, R12, R14, RAX, RSP, In, Program

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="these are programs for x86-64")

READ, WRITE, OPEN, CLOSE, MMAP, GETPID, EXIT, PRCTL, SECCOMP = 0, 1, 2, 3, 9, 39, 60, 157, 317


def run(program: Program, folder: Path, *, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    path = folder / "program"
    path.write_bytes(machinecode.elf(program.finish(), BASE))
    path.chmod(0o700)
    return subprocess.run([path, "an argument"], input=given, capture_output=True, timeout=20, check=False)


def new() -> Program:
    return Program(BASE + HEAD)


def test_system_calls_and_their_data(tmp_path: Path) -> None:
    program = new()
    program.call(WRITE, 1, b"one ", 4)
    program.call(WRITE, 1, b"two", 3)
    program.call(EXIT, 7)
    done = run(program, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"one two", b"")


def test_a_call_that_fails_ends_the_program_unless_it_may(tmp_path: Path) -> None:
    program = new()
    program.call(CLOSE, 99, check=False)
    program.call(WRITE, 1, b"on", 2)
    program.call(OPEN, b"/nowhere/at/all\0", 0)
    program.call(WRITE, 1, b"never", 5)
    done = run(program, tmp_path)
    assert (done.returncode, done.stdout) == (FAILED, b"on")


@pytest.mark.parametrize("value", [0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1, -1])
@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"rsp"}))
def test_registers_are_loaded_with_any_number(name: str, value: int, tmp_path: Path) -> None:
    # What a register has goes through r14 to the stack, and from there to stdout.
    program = new()
    program.set(NUMBERS[name], value)
    program.set(R14, In(NUMBERS[name]))
    program.add(b"\x4c\x89\x74\x24\xc0")  # mov [rsp - 64], r14
    program.call(WRITE, 1, In(RSP, -64), 8)
    program.call(EXIT, 0)
    assert run(program, tmp_path).stdout == struct.pack("<Q", value & (1 << 64) - 1)


def test_a_branch_is_taken_where_its_condition_holds(tmp_path: Path) -> None:
    program = new()
    for value in 0, 5:
        child = Program(0)
        child.call(WRITE, 1, b"zero", 4)
        program.set(RAX, value)
        program.where(b"\x48\x85\xc0", b"\x85", child)  # test rax, rax; jnz
    program.call(WRITE, 1, b" end", 4)
    program.call(EXIT, 0)
    assert run(program, tmp_path).stdout == b"zero end"


def test_the_vdso_is_found(tmp_path: Path) -> None:
    program = new()
    program.find_vdso()
    program.call(WRITE, 1, In(R12), 4)
    program.call(EXIT, 0)
    assert run(program, tmp_path).stdout == b"\x7fELF"


def test_it_goes_on_with_the_registers_it_is_given(tmp_path: Path) -> None:
    # Where it goes on is code that it has mapped itself: exit(rdi + rbx) by lea and syscall.
    code = b"\x8d\x3c\x1f\x0f\x05"
    source = tmp_path / "code"
    source.write_bytes(code.ljust(4096, b"\xcc"))
    program = new()
    program.call(OPEN, os.fsencode(source) + b"\0", 0)
    program.call(MMAP, 0x7000_0000, 4096, 5, 0x12, 3, 0)
    program.go_on({**dict.fromkeys(NUMBERS, 0), "rax": EXIT, "rdi": 30, "rbx": 12, "rip": 0x7000_0000})
    assert run(program, tmp_path).returncode == 42


def test_the_filter_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    program = new()
    code = seccomp.program((WRITE, EXIT), threads=True)
    program.call(PRCTL, 38, 1, 0, 0, 0)
    program.set(RAX, code)
    program.add(
        b"\x48\x89\x44\x24\xc8\xc7\x44\x24\xc0" + struct.pack("<I", len(code) // 8)
    )  # struct sock_fprog at rsp - 64
    program.call(SECCOMP, 1, 0, In(RSP, -64))
    results = []
    for number, arguments in (
        (GETPID, ()),
        (seccomp.NR_CLONE, (0,)),  # a process
        (seccomp.NR_CLONE, (seccomp.CLONE_THREAD,)),  # a thread, if it said all else that it must
        (seccomp.NR_CLONE3, (0, 0)),
    ):
        program.call(number, *arguments, check=False)
        program.set(R14, In(RAX))
        program.add(b"\x4c\x89\x74\x24\xc0")
        program.call(WRITE, 1, In(RSP, -64), 8)
        results.append(number)
    program.call(EXIT, 0)
    done = run(program, tmp_path)
    assert done.returncode == 0
    # EPERM, EPERM, the kernel's own EINVAL, ENOSYS.
    assert [-value for value in struct.unpack(f"<{len(results)}q", done.stdout)] == [1, 1, 22, 38]
