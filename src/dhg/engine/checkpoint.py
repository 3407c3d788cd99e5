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
import time
from collections.abc import Callable
from typing import NamedTuple

from .. import seccomp
from ..errors import HostError, MachineError
from . import ptrace, qmp
from .machinecode import BASE, HEAD, R12, R13, R14, RAX, RSP, In, Program, elf

PAGE = 4096
#: So many zero pages in a row, or fewer, are mapped from the file (where they are holes) with what is around them.
GAP = 16
#: Below the main thread's stack, for it to grow.
STACK_ROOM = 8 << 20
#: Where the vdso is while everything else is mapped. Programs and libraries are far above.
ASIDE = 0x1000_0000
#: Descriptors from here on are the client's business (`qmp`), those below QEMU's own.
OURS = 200
TRIES = 50
#: How much of glibc's struct pthread is looked at.
PTHREAD = 2048

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x02, 0x10, 0x20, 0x4000
MREMAP = 1 | 2  # MAYMOVE, FIXED
MADV_RANDOM = 1
# proc(5), pagemap.
PRESENT, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61
SPECIAL = ("[vvar]", "[vvar_vclock]", "[vdso]")
# x86-64's numbers of system calls.
NR_READ, NR_OPEN, NR_CLOSE, NR_MMAP, NR_RT_SIGACTION, NR_RT_SIGPROCMASK = 0, 2, 3, 9, 13, 14
NR_MREMAP, NR_MADVISE, NR_DUP, NR_FCNTL = 25, 28, 32, 72
NR_CLONE, NR_SETGROUPS, NR_SETRESUID, NR_SETRESGID, NR_PRCTL, NR_ARCH_PRCTL = 56, 116, 117, 119, 157, 158
NR_SET_TID_ADDRESS, NR_RESTART_SYSCALL, NR_SET_ROBUST_LIST, NR_SIGNALFD4, NR_EVENTFD2 = 218, 219, 273, 289, 290
NR_EPOLL_CREATE1, NR_SECCOMP, NR_RSEQ, NR_CLOSE_RANGE = 291, 317, 334, 436
#: CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID, CHILD_SETTID: what glibc gives a thread.
CLONE_THREAD = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | 0x80000 | 0x100000 | 0x200000 | 0x1000000
PR_SET_NAME, PR_SET_NO_NEW_PRIVS = 15, 38
ARCH_SET_FS = 0x1002
SECCOMP_SET_MODE_FILTER = 1


class Area(NamedTuple):
    """A line of /proc/pid/maps."""

    begin: int
    end: int
    perms: str
    offset: int
    path: str
    #: Device and inode of what is mapped.
    file: tuple[int, int]

    @property
    def prot(self) -> int:
        return sum(
            bit for letter, bit in zip("rwx", (PROT_READ, PROT_WRITE, PROT_EXEC), strict=True) if letter in self.perms
        )


class Thread(NamedTuple):
    """What a thread needs to go on."""

    registers: dict[str, int]
    #: As `fxsave` writes them.
    floating: bytes
    blocked: int
    tid_at: int
    robust: tuple[int, int]
    rseq: tuple[int, int, int]


def areas(pid: int) -> list[Area]:
    """The mappings of a process, by address."""
    found = []
    with open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
        for line in file:
            words = line.rstrip("\n").split(maxsplit=5)
            begin, end = (int(word, 16) for word in words[0].split("-"))
            major, minor = (int(word, 16) for word in words[3].split(":"))
            path = words[5] if len(words) == 6 else ""
            found.append(Area(begin, end, words[1], int(words[2], 16), path, (os.makedev(major, minor), int(words[4]))))
    return found


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
    seen: dict[int, dict[str, int]] = {}
    for _ in range(TRIES):
        with ptrace.Stopped(pid) as stopped:
            threads = _threads(stopped, seen)
            if all(threads):
                return _write(stopped, [thread for thread in threads if thread], target, ram=ram, ram_later=ram_later)
        time.sleep(0.1)
    raise MachineError("a thread of QEMU's does not come to rest")


def _threads(stopped: ptrace.Stopped, seen: dict[int, dict[str, int]]) -> list[Thread | None]:
    """The threads, each in a system call that it will begin anew; None for one that is not in any."""
    starts = [stopped.registers(tid)["fs_base"] for tid in stopped.tids]
    # glibc's struct pthread, to which fs points, has the thread's number, at the same place in all of them; the kernel clears it
    # there when the thread ends.
    places = set(range(0, PTHREAD, 4))
    for tid, start in zip(stopped.tids, starts, strict=True):
        words = struct.unpack(f"{PTHREAD // 4}i", stopped.read(start, PTHREAD))
        places &= {4 * number for number, word in enumerate(words) if word == tid}
    if len(places) != 1:
        raise MachineError(f"QEMU's threads have their numbers at {len(places)} places")
    place = places.pop()
    return [_thread(stopped, tid, start + place, seen) for tid, start in zip(stopped.tids, starts, strict=True)]


def _thread(stopped: ptrace.Stopped, tid: int, tid_at: int, seen: dict[int, dict[str, int]]) -> Thread | None:
    registers = stopped.registers(tid)
    result = registers["rax"] - (1 << 64)
    if registers["orig_rax"] >> 63 or result not in ptrace.RESTARTS:
        return None
    if stopped.read(registers["rip"] - 2, 2) != ptrace.SYSCALL:
        return None
    registers["rip"] -= 2
    registers["rax"] = registers["orig_rax"]
    if registers["rax"] == NR_RESTART_SYSCALL:
        # Stopped for the second time in the same wait: the kernel knows for which call, and we from the first time.
        registers = seen.get(tid, registers)
    seen[tid] = registers
    return Thread(
        registers, stopped.floating(tid), stopped.blocked(tid), tid_at, ptrace.robust_list(tid), stopped.rseq(tid)
    )


class _Memory:
    """The part of the file that has what QEMU's memory had."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.at = MEMORY_AT

    def add(self, data: bytes) -> int:
        """Write pages, those that are zero as holes; where they begin."""
        at = self.at
        for begin, end in _runs(data, gap=0):
            os.pwrite(self._fd, data[begin:end], at + begin)
        self.at += len(data)
        os.truncate(self._fd, self.at)
        return at


def _runs(data: bytes, *, gap: int) -> list[tuple[int, int]]:
    """Where pages that are not zero begin and end, in bytes; runs with no more than `gap` pages between them are one."""
    zero, runs = bytes(PAGE), list[list[int]]()
    for at in range(0, len(data), PAGE):
        if data[at : at + PAGE] != zero:
            if runs and at - runs[-1][1] <= gap * PAGE:
                runs[-1][1] = at + PAGE
            else:
                runs.append([at, at + PAGE])
    return [(begin, end) for begin, end in runs]


def _write(
    stopped: ptrace.Stopped, threads: list[Thread], target: str, *, ram: tuple[int, int], ram_later: str
) -> list[str]:
    mapped: list[str] = []
    mappings = areas(stopped.pid)
    program = Program(BASE + HEAD)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o700)
    try:
        program.find_vdso()
        for first, last in ((3, OURS - 1), (qmp.FD_STATE, qmp.FD_CONSOLE), (qmp.FD_RAM, (1 << 32) - 1)):
            program.call(NR_CLOSE_RANGE, first, last, 0)
        _take_user(program)
        special = [area for area in mappings if area.path in SPECIAL]
        [vdso] = [area for area in special if area.path == "[vdso]"]
        for area in special:
            _move(program, area, In(R12, area.begin - vdso.begin), ASIDE + area.begin - special[0].begin)
        _map(program, stopped, mappings, _Memory(fd), mapped, ram=ram, ram_later=ram_later)
        for area in special:
            _move(program, area, ASIDE + area.begin - special[0].begin, area.begin)
        _descriptors(program, stopped.pid, ram=ram, ram_later=ram_later)
        _signals(program, stopped)
        main = threads[0]
        program.call(NR_ARCH_PRCTL, ARCH_SET_FS, main.registers["fs_base"])
        _confine(program, main)
        program.call(NR_PRCTL, PR_SET_NAME, QEMU_NAME, 0, 0, 0)
        for thread in threads[1:]:
            child = Program(0)
            _go_on(child, thread)
            at = thread.tid_at
            program.call(NR_CLONE, CLONE_THREAD, thread.registers["rsp"], at, at, thread.registers["fs_base"])
            program.where(b"\x48\x85\xc0", b"\x85", child)  # test rax, rax; jnz
        program.call(NR_SET_TID_ADDRESS, main.tid_at)
        program.set(R14, main.tid_at)
        program.add(b"\x41\x89\x06")  # mov [r14], eax
        _go_on(program, main)
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


def _move(program: Program, area: Area, source: int, target: int) -> None:
    size = area.end - area.begin
    program.call(NR_MREMAP, source, size, size, MREMAP, target)


def _map(
    program: Program,
    stopped: ptrace.Stopped,
    mappings: list[Area],
    memory: _Memory,
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
            entries = memoryview(os.pread(pagemap, size // PAGE * 8, area.begin // PAGE * 8)).cast("Q")
            if area.file == ram:
                path, changed = ram_later, False
            else:
                path = area.path if area.path.startswith("/") else ""
                changed = any(entry & (PRESENT | SWAPPED) and not entry & OF_FILE for entry in entries)
                if path and area.perms[3] == "s":
                    raise MachineError(f"QEMU shares memory: {area.path}")
            if path and not changed:
                if path != opened:
                    if opened:
                        program.call(NR_CLOSE, 3)
                    program.call(NR_OPEN, os.fsencode(path) + b"\0", os.O_RDONLY | os.O_CLOEXEC)
                    opened = path
                    mapped.append(path)
                program.call(NR_MMAP, area.begin, size, area.prot, MAP_PRIVATE | MAP_FIXED, 3, area.offset)
                continue
            if path:
                own.append((area.begin, size, area.prot, memory.add(read(area.begin, size))))
                continue
            begin = area.begin - STACK_ROOM if area.path == "[stack]" else area.begin
            flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE
            program.call(NR_MMAP, begin, area.end - begin, area.prot, flags, -1, 0)
            if changed:
                own += _anonymous(read, area, entries, memory)
    finally:
        os.close(pagemap)
    if hidden != 1:
        raise MachineError("glibc does not have the end of the heap where it is looked for")
    program.call(NR_CLOSE, 3)
    program.call(NR_OPEN, b"/proc/self/exe\0", os.O_RDONLY | os.O_CLOEXEC)
    for begin, size, prot, offset in own:
        program.call(NR_MMAP, begin, size, prot, MAP_PRIVATE | MAP_FIXED, 3, offset)
    program.call(NR_CLOSE, 3)
    # To see which pages are used no others may be read with them.
    alone = Program(0)
    for begin, size in [
        *((area.begin, area.end - area.begin) for area in mappings if area.file == ram),
        *((begin, size) for begin, size, _, _ in own),
    ]:
        alone.call(NR_MADVISE, begin, size, MADV_RANDOM)
    program.where(b"\x49\x0f\xba\xf5" + bytes((qmp.RECORD_BIT,)), b"\x83", alone)  # btr r13, bit; jnc


def _with_its_zeros(mappings: list[Area], name: str) -> range:
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


def _anonymous(
    read: Callable[[int, int], bytes], area: Area, entries: memoryview, memory: _Memory
) -> list[tuple[int, int, int, int]]:
    """Write down what an anonymous mapping has that is not zero; the mappings that bring it back."""
    found = []
    there = [bool(entry & (PRESENT | SWAPPED)) for entry in entries]
    at = 0
    while at < len(there):
        if not there[at]:
            at += 1
            continue
        end = at
        while end < len(there) and there[end]:
            end += 1
        start = area.begin + at * PAGE
        data = read(start, (end - at) * PAGE)
        for first, last in _runs(data, gap=GAP):
            found.append((start + first, last - first, area.prot, memory.add(data[first:last])))
        at = end
    return found


def _descriptors(program: Program, pid: int, *, ram: tuple[int, int], ram_later: str) -> None:
    """QEMU's own descriptors, by the numbers they had: in ascending order, so each gets the lowest that is free."""
    wanted = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in map(int, os.listdir(f"/proc/{pid}/fd"))}
    wanted = {number: what for number, what in wanted.items() if 2 < number < OURS}
    for number in range(3, max(wanted, default=2) + 1):
        if number not in wanted:
            program.call(NR_DUP, 0)
            continue
        info = _fdinfo(pid, number)
        flags, what = int(info["flags"], 8), wanted[number]
        status = os.stat(f"/proc/{pid}/fd/{number}")
        if what == "anon_inode:[eventfd]":
            flags &= os.O_CLOEXEC | os.O_NONBLOCK
            program.call(NR_EVENTFD2, int(info["eventfd-count"], 16), flags)
        elif what == "anon_inode:[eventpoll]" and "tfd" not in info:
            # Made where io_uring may not be used, and left empty as long as there are few descriptors.
            program.call(NR_EPOLL_CREATE1, flags & os.O_CLOEXEC)
        elif what == "anon_inode:[signalfd]":
            mask = struct.pack("<Q", int(info["sigmask"], 16))
            program.call(NR_SIGNALFD4, -1, mask, 8, flags & (os.O_CLOEXEC | os.O_NONBLOCK))
        elif (status.st_dev, status.st_ino) == ram:
            program.call(NR_OPEN, os.fsencode(ram_later) + b"\0", os.O_RDONLY | os.O_CLOEXEC)
        elif what.startswith("/") and not what.endswith(" (deleted)"):
            program.call(NR_OPEN, os.fsencode(what) + b"\0", flags)
        else:
            raise MachineError(f"QEMU has {what} open")
    for number in range(3, max(wanted, default=2) + 1):
        if number not in wanted:
            program.call(NR_CLOSE, number)
    # The channels are new sockets, of which QEMU takes for granted that they do not block.
    for number in (qmp.FD_QMP, *(fd for _, fd in qmp.CHANNELS)):
        if int(_fdinfo(pid, number)["flags"], 8) & os.O_NONBLOCK:
            program.call(NR_FCNTL, number, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK)


def _fdinfo(pid: int, number: int) -> dict[str, str]:
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        return dict(line.rstrip("\n").split(":", 1) for line in file if ":" in line)


def _signals(program: Program, stopped: ptrace.Stopped) -> None:
    with open(f"/proc/{stopped.pid}/status") as file:
        masks = {
            name: int(value, 16)
            for name, value in (line.split(":", 1) for line in file if line.startswith("Sig"))
            if name != "SigQ"
        }
    caught = [number for number in range(1, 65) if masks["SigCgt"] >> number - 1 & 1]
    actions = stopped.handlers(caught)
    ignored = struct.pack("<4Q", 1, 0, 0, 0)
    actions.update({number: ignored for number in range(1, 65) if masks["SigIgn"] >> number - 1 & 1})
    for number, action in actions.items():
        program.call(NR_RT_SIGACTION, number, action, 0, 8)


def _confine(program: Program, main: Thread) -> None:
    """Another user, if the client is root; a filter of system calls."""
    child = Program(0)
    child.call(NR_SETGROUPS, 0, 0)
    child.call(NR_SETRESGID, In(R13), In(R13), In(R13))
    child.call(NR_SETRESUID, In(R13), In(R13), In(R13))
    program.where(b"\x4d\x85\xed", b"\x84", child)  # test r13, r13; jz
    program.call(NR_PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    code = seccomp.program(ALLOWED, threads=True)
    # struct sock_fprog, below what the main thread has on its stack.
    scratch = main.registers["rsp"] - 8192 & ~15
    program.set(R14, scratch)
    program.set(RAX, code)
    program.add(b"\x49\x89\x46\x08")  # mov [r14 + 8], rax
    program.add(b"\x41\xc7\x06" + struct.pack("<I", len(code) // 8))  # mov dword [r14], its length
    # Before there are threads: each is born with it.
    program.call(NR_SECCOMP, SECCOMP_SET_MODE_FILTER, 0, scratch)


def _go_on(program: Program, thread: Thread) -> None:
    program.call(NR_SET_ROBUST_LIST, *thread.robust, check=False)
    if thread.rseq[0]:
        address, size, signature = thread.rseq
        program.call(NR_RSEQ, address, size, 0, signature, check=False)
    program.call(NR_RT_SIGPROCMASK, 2, struct.pack("<Q", thread.blocked), 0, 8)
    program.set(R14, thread.floating)
    program.add(b"\x41\x0f\xae\x0e")  # fxrstor [r14]
    program.go_on(thread.registers)
