"""A stopped process as a program that goes on where it stopped (x86-64): what QEMU's and the guest's server have in common.

Such a program is an ELF file that consists of system calls only, which put back memory, descriptors, signals and threads at the
addresses and numbers they had, and jump to where each thread was: a system call that begins anew. Memory is mapped from the file
itself. `checkpoint` makes one of QEMU, `serverprocess` one of the Deephaven server.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ..errors import MachineError
from . import ptrace
from .machinecode import R14, Program

PAGE = 4096
#: So many zero pages in a row, or fewer, are mapped from the file (where they are holes) with what is around them.
GAP = 16
#: Below the main thread's stack, for it to grow.
STACK_ROOM = 8 << 20
TRIES = 50
#: How much of glibc's struct pthread is looked at.
PTHREAD = 2048

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
#: Memory of nobody else's, in a certain place, and with nothing in it.
MAP_EMPTY = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE
# proc(5), pagemap.
PRESENT, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61
# x86-64's numbers of system calls.
NR_OPEN, NR_CLOSE, NR_MMAP, NR_RT_SIGACTION, NR_RT_SIGPROCMASK, NR_DUP = 2, 3, 9, 13, 14, 32
NR_PRCTL, NR_ARCH_PRCTL, NR_SET_TID_ADDRESS, NR_RESTART_SYSCALL, NR_EPOLL_WAIT = 157, 158, 218, 219, 232
NR_SET_ROBUST_LIST, NR_EPOLL_PWAIT, NR_EVENTFD2, NR_EPOLL_CREATE1, NR_RSEQ, NR_CLOSE_RANGE = (
    273,
    281,
    290,
    291,
    334,
    436,
)
#: What a signal ends instead of interrupting it: whoever calls it calls again (epoll_wait(2), signal(7)).
ENDED = (NR_EPOLL_WAIT, NR_EPOLL_PWAIT)
#: CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID, CHILD_SETTID: what glibc gives a thread.
CLONE_THREAD = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | 0x80000 | 0x100000 | 0x200000 | 0x1000000
PR_SET_NAME, ARCH_SET_FS = 15, 0x1002

T = TypeVar("T")


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


def at_rest(pid: int, use: Callable[[ptrace.Stopped, list[Thread]], T]) -> T:
    """Stop a process when each of its threads is in a system call, and call `use`; what that returns.

    Raises `HostError` where the host does not let us look, `MachineError` if a thread does not come to rest.
    """
    seen: dict[int, dict[str, int]] = {}
    for _ in range(TRIES):
        with ptrace.Stopped(pid) as stopped:
            threads = _threads(stopped, seen)
            if all(threads):
                return use(stopped, [thread for thread in threads if thread])
        time.sleep(0.1)
    raise MachineError(f"a thread of process {pid} does not come to rest")


def _threads(stopped: ptrace.Stopped, seen: dict[int, dict[str, int]]) -> list[Thread | None]:
    """The threads, each in a system call that it will begin anew; None for one that is not in any."""
    starts = [stopped.registers(tid)["fs_base"] for tid in stopped.tids]
    # glibc's struct pthread, to which fs points, has the thread's number, at the same place in all of them; the kernel clears it
    # there when the thread ends. It is the number that the process itself sees.
    numbers = [_number(stopped.pid, tid) for tid in stopped.tids]
    places = set(range(0, PTHREAD, 4))
    for tid, start in zip(numbers, starts, strict=True):
        words = struct.unpack(f"{PTHREAD // 4}i", stopped.read(start, PTHREAD))
        places &= {4 * number for number, word in enumerate(words) if word == tid}
    if len(places) != 1:
        raise MachineError(f"the threads have their numbers at {len(places)} places")
    place = places.pop()
    return [_thread(stopped, tid, start + place, seen) for tid, start in zip(stopped.tids, starts, strict=True)]


def _number(pid: int, tid: int) -> int:
    with open(f"/proc/{pid}/task/{tid}/status") as file:
        return next(int(line.split()[-1]) for line in file if line.startswith("NSpid:"))


def _thread(stopped: ptrace.Stopped, tid: int, tid_at: int, seen: dict[int, dict[str, int]]) -> Thread | None:
    registers = stopped.registers(tid)
    result = registers["rax"] - (1 << 64)
    if registers["orig_rax"] >> 63:
        return None
    if result not in ptrace.RESTARTS and not (result == -errno.EINTR and registers["orig_rax"] in ENDED):
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


class Memory:
    """The part of the file, from `at` on, that has what the memory had."""

    def __init__(self, fd: int, at: int) -> None:
        self._fd = fd
        self.at = at

    def add(self, data: bytes | bytearray) -> int:
        """Write pages, those that are zero as holes; where they begin."""
        at = self.at
        for begin, end in runs(data, gap=0):
            os.pwrite(self._fd, data[begin:end], at + begin)
        self.at += len(data)
        os.truncate(self._fd, self.at)
        return at


def runs(data: bytes | bytearray, *, gap: int) -> list[tuple[int, int]]:
    """Where pages that are not zero begin and end, in bytes; runs with no more than `gap` pages between them are one."""
    zero, found = bytes(PAGE), list[list[int]]()
    for at in range(0, len(data), PAGE):
        if data[at : at + PAGE] != zero:
            if found and at - found[-1][1] <= gap * PAGE:
                found[-1][1] = at + PAGE
            else:
                found.append([at, at + PAGE])
    return [(begin, end) for begin, end in found]


def is_own(entry: int) -> bool:
    """Whether a page, by its entry in the pagemap, is the process's own: it was written to."""
    return bool(entry & (PRESENT | SWAPPED)) and not entry & OF_FILE


def own_pages(
    read: Callable[[int, int], bytes], area: Area, entries: memoryview, memory: Memory, *, gap: int = GAP
) -> list[tuple[int, int, int, int]]:
    """Write down the pages of a mapping that are the process's own; the mappings that bring them back: address, size, protection
    and offset. Of memory that is of no file those that are zero are left out, but for runs of no more than `gap` pages."""
    spans = list[tuple[int, bytearray]]()
    at = 0
    while at < len(entries):
        if not is_own(entries[at]):
            at += 1
            continue
        end = at
        while end < len(entries) and is_own(entries[end]):
            end += 1
        start = area.begin + at * PAGE
        data = read(start, (end - at) * PAGE)
        for first, last in [(0, len(data))] if area.path.startswith("/") else runs(data, gap=gap):
            before = spans[-1][0] + len(spans[-1][1]) if spans else 0
            if spans and start + first - before <= gap * PAGE:
                spans[-1][1].extend(read(before, start + first - before) + data[first:last])
            else:
                spans.append((start + first, bytearray(data[first:last])))
        at = end
    return [(first, len(data), area.prot, memory.add(data)) for first, data in spans]


def fdinfo(pid: int, number: int) -> dict[str, str]:
    """What proc(5) says of a descriptor, by name; of what it says more than once the last."""
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        return dict(line.rstrip("\n").split(":", 1) for line in file if ":" in line)


def put_back_signals(program: Program, stopped: ptrace.Stopped) -> None:
    """What the process does at each signal."""
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


def go_on_first(program: Program, main: Thread) -> None:
    """The rest of the first thread, which the program itself is."""
    program.call(NR_SET_TID_ADDRESS, main.tid_at)
    program.set(R14, main.tid_at)
    program.add(b"\x41\x89\x06")  # mov [r14], eax
    go_on(program, main)


def go_on(program: Program, thread: Thread) -> None:
    """The rest of a thread: its registers, and the jump to where it was."""
    program.call(NR_SET_ROBUST_LIST, *thread.robust, check=False)
    if thread.rseq[0]:
        address, size, signature = thread.rseq
        program.call(NR_RSEQ, address, size, 0, signature, check=False)
    program.call(NR_RT_SIGPROCMASK, 2, struct.pack("<Q", thread.blocked), 0, 8)
    program.set(R14, thread.floating)
    program.add(b"\x41\x0f\xae\x0e")  # fxrstor [r14]
    program.go_on(thread.registers)
