"""A stopped QEMU as a program that goes on where it stopped, with all that it has translated (x86-64).

What a clone's first script costs under software emulation is the translation of what it executes, and QEMU has no way to keep
translations. But they are memory of its process. So `prepare` stops a QEMU that has translated what scripts need, and writes its
process down: `write` makes an ELF program that consists of system calls only, which put back memory, descriptors, signals and threads
at the addresses and numbers they had, and jump to where each thread was. The guest's memory is mapped private from the snapshot as in
any restore; QEMU's own from the file; its program and libraries from theirs.

That holds for one kernel (its vdso), one CPU (what glibc and QEMU have chosen for it) and the very files that were mapped; the caller
records these. The addresses are those of the process that was stopped, in every clone.
"""

from __future__ import annotations

import fcntl
import os
import struct

from .. import seccomp
from ..errors import HostError, MachineError
from . import ptrace, qmp, resume
from .machinecode import BASE, HEAD, R12, R13, R14, RAX, RSP, In, Program, elf

#: Where the vdso is while everything else is mapped. Programs and libraries are far above.
ASIDE = 0x1000_0000
#: Descriptors from here on are the client's business (`qmp`), those below QEMU's own.
OURS = 200

MREMAP = 1 | 2  # MAYMOVE, FIXED
MADV_RANDOM = 1
SPECIAL = ("[vvar]", "[vvar_vclock]", "[vdso]")
# x86-64's numbers of system calls.
NR_READ, NR_MREMAP, NR_MADVISE, NR_FCNTL, NR_CLONE, NR_SETGROUPS = 0, 25, 28, 72, 56, 116
NR_SETRESUID, NR_SETRESGID, NR_SIGNALFD4, NR_SECCOMP = 117, 119, 289, 317
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER = 1

#: Where the file's memory begins, after the program.
MEMORY_AT = 1 << 18
#: x86-64's numbers of what a QEMU that runs has use for: no files to open, no sockets, no programs, no processes.
# fmt: off
ALLOWED = (
    0, 1, 17, 18, 19, 20, 295, 296, 8,  # read, write, pread64, pwrite64, readv, writev, preadv, pwritev, lseek
    3, 5, 262, 16, 32, 72, 74, 75, 285, 290,  # close, fstat, newfstatat, ioctl, dup, fcntl, fsync, fdatasync, fallocate, eventfd2
    7, 271,  # poll, ppoll
    44, 45, 46, 47, 48, 51, 52, 54, 55,  # send and receive, shutdown, names and options of the sockets that it has
    9, 10, 11, 12, 25, 27, 28,  # mmap, mprotect, munmap, brk, mremap, mincore, madvise
    13, 14, 15, 131, 234,  # rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack, tgkill
    24, 202, 204, 218, 273, 309, 324, 334,  # sched_yield, futex, its CPUs, tid address, robust list, getcpu, membarrier, rseq
    35, 96, 201, 228, 229, 230, 219,  # nanosleep, gettimeofday, time, clock_gettime, clock_getres, clock_nanosleep, restart_syscall
    39, 98, 99, 157, 186, 318,  # getpid, getrusage, sysinfo, prctl, gettid, getrandom
    60, 231,  # exit, exit_group
)
# fmt: on
QEMU_NAME = b"qemu-system-x86\0"


def file_of(fd: int) -> tuple[int, int]:
    """Device and inode of the file behind a descriptor."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def write(pid: int, target: str, *, ram: tuple[int, int], ram_later: str) -> list[str]:
    """Write the QEMU `pid`, whose VM is stopped, as a program to `target`; the files that it maps besides.

    `ram` is the guest's memory in QEMU's memory (device and inode of the file), `ram_later` the file that takes its place.
    Raises `HostError` where the host does not let us look, `MachineError` if QEMU has something that is not known here.
    """
    if os.uname().machine != "x86_64":
        raise HostError("checkpoints are programs for x86-64")
    return resume.at_rest(pid, lambda stopped, threads: _write(stopped, threads, target, ram=ram, ram_later=ram_later))


def _write(
    stopped: ptrace.Stopped, threads: list[resume.Thread], target: str, *, ram: tuple[int, int], ram_later: str
) -> list[str]:
    mapped: list[str] = []
    mappings = resume.areas(stopped.pid)
    program = Program(BASE + HEAD)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o700)
    try:
        program.find_vdso()
        for first, last in ((3, OURS - 1), (qmp.FD_STATE, qmp.FD_CONSOLE), (qmp.FD_RAM, (1 << 32) - 1)):
            program.call(resume.NR_CLOSE_RANGE, first, last, 0)
        _take_user(program)
        special = [area for area in mappings if area.path in SPECIAL]
        [vdso] = [area for area in special if area.path == "[vdso]"]
        for area in special:
            _move(program, area, In(R12, area.begin - vdso.begin), ASIDE + area.begin - special[0].begin)
        _map(program, stopped, mappings, resume.Memory(fd, MEMORY_AT), mapped, ram=ram, ram_later=ram_later)
        for area in special:
            _move(program, area, ASIDE + area.begin - special[0].begin, area.begin)
        _descriptors(program, stopped.pid, ram=ram, ram_later=ram_later)
        resume.put_back_signals(program, stopped)
        main = threads[0]
        program.call(resume.NR_ARCH_PRCTL, resume.ARCH_SET_FS, main.registers["fs_base"])
        _confine(program, main)
        program.call(resume.NR_PRCTL, resume.PR_SET_NAME, QEMU_NAME, 0, 0, 0)
        for thread in threads[1:]:
            child = Program(0)
            resume.go_on(child, thread)
            at = thread.tid_at
            program.call(NR_CLONE, resume.CLONE_THREAD, thread.registers["rsp"], at, at, thread.registers["fs_base"])
            program.where(b"\x48\x85\xc0", b"\x85", child)  # test rax, rax; jnz
        resume.go_on_first(program, main)
        code = elf(program.finish(), BASE)
        if len(code) > MEMORY_AT:
            raise MachineError(f"{len(code)} bytes of program")
        os.pwrite(fd, code, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    return mapped


def _take_user(program: Program) -> None:
    """Wait for the client's word, which has the user to change to."""
    program.call(NR_READ, qmp.FD_GO, In(RSP, -64), 8)
    program.add(b"\x48\x83\xf8\x08")  # cmp rax, 8
    program.fail_if(b"\x85")  # jne
    program.add(b"\x4c\x8b\x6c\x24\xc0")  # mov r13, [rsp - 64]


def _move(program: Program, area: resume.Area, source: int, target: int) -> None:
    size = area.end - area.begin
    program.call(NR_MREMAP, source, size, size, MREMAP, target)


def _map(
    program: Program,
    stopped: ptrace.Stopped,
    mappings: list[resume.Area],
    memory: resume.Memory,
    mapped: list[str],
    *,
    ram: tuple[int, int],
    ram_later: str,
) -> None:
    pagemap = os.open(f"/proc/{stopped.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    own: list[tuple[int, int, int, int]] = []
    opened, hidden = "", 0
    heap_end = max(area.end for area in mappings if area.path == "[heap]")
    libc = _with_its_zeros(mappings, "libc.so")

    def read(begin: int, size: int) -> bytes:
        nonlocal hidden
        data = stopped.read(begin, size)
        if begin in libc:
            data, found = _hide_heap(data, heap_end)
            hidden += found
        return data

    try:
        for area in mappings:
            if area.path in SPECIAL or area.path == "[vsyscall]":
                continue
            size = area.end - area.begin
            entries = memoryview(os.pread(pagemap, size // resume.PAGE * 8, area.begin // resume.PAGE * 8)).cast("Q")
            if area.file == ram:
                path, changed = ram_later, False
            else:
                path = area.path if area.path.startswith("/") else ""
                changed = any(
                    entry & (resume.PRESENT | resume.SWAPPED) and not entry & resume.OF_FILE for entry in entries
                )
                if path and area.perms[3] == "s":
                    raise MachineError(f"QEMU shares memory: {area.path}")
            if path and not changed:
                if path != opened:
                    if opened:
                        program.call(resume.NR_CLOSE, 3)
                    program.call(resume.NR_OPEN, os.fsencode(path) + b"\0", os.O_RDONLY | os.O_CLOEXEC)
                    opened = path
                    mapped.append(path)
                program.call(
                    resume.NR_MMAP, area.begin, size, area.prot, resume.MAP_PRIVATE | resume.MAP_FIXED, 3, area.offset
                )
                continue
            if path:
                own.append((area.begin, size, area.prot, memory.add(read(area.begin, size))))
                continue
            begin = area.begin - resume.STACK_ROOM if area.path == "[stack]" else area.begin
            program.call(resume.NR_MMAP, begin, area.end - begin, area.prot, resume.MAP_EMPTY, -1, 0)
            if changed:
                own += resume.own_pages(read, area, entries, memory)
    finally:
        os.close(pagemap)
    if hidden != 1:
        raise MachineError("glibc does not have the end of the heap where it is looked for")
    program.call(resume.NR_CLOSE, 3)
    program.call(resume.NR_OPEN, b"/proc/self/exe\0", os.O_RDONLY | os.O_CLOEXEC)
    for begin, size, prot, offset in own:
        program.call(resume.NR_MMAP, begin, size, prot, resume.MAP_PRIVATE | resume.MAP_FIXED, 3, offset)
    program.call(resume.NR_CLOSE, 3)
    # To see which pages are used no others may be read with them.
    alone = Program(0)
    for begin, size in [
        *((area.begin, area.end - area.begin) for area in mappings if area.file == ram),
        *((begin, size) for begin, size, _, _ in own),
    ]:
        alone.call(NR_MADVISE, begin, size, MADV_RANDOM)
    program.where(b"\x49\x0f\xba\xf5" + bytes((qmp.SINGLE_BIT,)), b"\x83", alone)  # btr r13, bit; jnc


def _with_its_zeros(mappings: list[resume.Area], name: str) -> range:
    """The addresses of a library, with the variables that its file has nothing of."""
    begin = end = 0
    for area in mappings:
        if os.path.basename(area.path).startswith(name):
            begin, end = begin or area.begin, area.end
        elif area.begin == end and not area.path:
            end = area.end
    return range(begin, end)


def _hide_heap(data: bytes, end: int) -> tuple[bytes, int]:
    """What glibc's variables have, with another end of the heap (__curbrk); how many had it.

    A clone's kernel knows another `brk`, which only a privileged process can set. If glibc asks for more, it is refused, and maps
    memory from then on. But if it gave something back, it would take the kernel's answer for the end, and the heap for as much
    smaller. It gives nothing back where the end is not that of the heap (malloc.c: systrim).
    """
    word, other = end.to_bytes(8, "little"), (end - 16).to_bytes(8, "little")
    found = [at for at in range(0, len(data) - 7, 8) if data[at : at + 8] == word]
    changed = bytearray(data)
    for at in found:
        changed[at : at + 8] = other
    return bytes(changed), len(found)


def _descriptors(program: Program, pid: int, *, ram: tuple[int, int], ram_later: str) -> None:
    """QEMU's own descriptors, by the numbers they had: in ascending order, so each gets the lowest that is free."""
    wanted = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in map(int, os.listdir(f"/proc/{pid}/fd"))}
    wanted = {number: what for number, what in wanted.items() if 2 < number < OURS}
    for number in range(3, max(wanted, default=2) + 1):
        if number not in wanted:
            program.call(resume.NR_DUP, 0)
            continue
        info = resume.fdinfo(pid, number)
        flags, what = int(info["flags"], 8), wanted[number]
        status = os.stat(f"/proc/{pid}/fd/{number}")
        if what == "anon_inode:[eventfd]":
            flags &= os.O_CLOEXEC | os.O_NONBLOCK
            program.call(resume.NR_EVENTFD2, int(info["eventfd-count"], 16), flags)
        elif what == "anon_inode:[eventpoll]" and "tfd" not in info:
            # Made where io_uring may not be used, and left empty as long as there are few descriptors.
            program.call(resume.NR_EPOLL_CREATE1, flags & os.O_CLOEXEC)
        elif what == "anon_inode:[signalfd]":
            mask = struct.pack("<Q", int(info["sigmask"], 16))
            program.call(NR_SIGNALFD4, -1, mask, 8, flags & (os.O_CLOEXEC | os.O_NONBLOCK))
        elif (status.st_dev, status.st_ino) == ram:
            program.call(resume.NR_OPEN, os.fsencode(ram_later) + b"\0", os.O_RDONLY | os.O_CLOEXEC)
        elif what.startswith("/") and not what.endswith(" (deleted)"):
            program.call(resume.NR_OPEN, os.fsencode(what) + b"\0", flags)
        else:
            raise MachineError(f"QEMU has {what} open")
    for number in range(3, max(wanted, default=2) + 1):
        if number not in wanted:
            program.call(resume.NR_CLOSE, number)
    # The channels are new sockets, of which QEMU takes for granted that they do not block.
    for number in (qmp.FD_QMP, *(fd for _, fd in qmp.CHANNELS)):
        if int(resume.fdinfo(pid, number)["flags"], 8) & os.O_NONBLOCK:
            program.call(NR_FCNTL, number, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK)


def _confine(program: Program, main: resume.Thread) -> None:
    """Another user, if the client is root; a filter of system calls."""
    child = Program(0)
    child.call(NR_SETGROUPS, 0, 0)
    child.call(NR_SETRESGID, In(R13), In(R13), In(R13))
    child.call(NR_SETRESUID, In(R13), In(R13), In(R13))
    program.where(b"\x4d\x85\xed", b"\x84", child)  # test r13, r13; jz
    program.call(resume.NR_PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    code = seccomp.program(ALLOWED, threads=True)
    # struct sock_fprog, below what the main thread has on its stack.
    scratch = main.registers["rsp"] - 8192 & ~15
    program.set(R14, scratch)
    program.set(RAX, code)
    program.add(b"\x49\x89\x46\x08")  # mov [r14 + 8], rax
    program.add(b"\x41\xc7\x06" + struct.pack("<I", len(code) // 8))  # mov dword [r14], its length
    # Before there are threads: each is born with it.
    program.call(NR_SECCOMP, SECCOMP_SET_MODE_FILTER, 0, scratch)
