"""The Deephaven server's process, started natively, as a program that goes on in a guest (x86-64).

Under emulation the start of a server and its warm-up take most of a `prepare`; natively they take seconds. So it is started natively
in the guest's root file system (image/server.py), stopped, and written down (`resume`), and the guest starts the program.

What the guest has of its own: the kernel, so another vdso (guest/vdso.py); privileges, with which the numbers of the threads and the
end of the heap are put back; and clocks, which are behind those that the process has seen: a time namespace makes up for that.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time

from ..errors import MachineError
from ..guest import vdso
from . import ptrace, resume
from .machinecode import HEAD, RSP, In, Program, elf

#: Where the program is mapped: below Debian's Python, which is at 0x400000.
BASE = 0x10_0000
#: Where the file's memory begins, after the program; BASE and this end before the Python, too.
MEMORY_AT = 1 << 20
#: Mappings are few, as each `fork` copies them: pages with no more than so many between them are in one, whatever those have.
GAP = 64
#: The kernel's own; only the vdso has a successor.
KERNELS = ("[vvar]", "[vvar_vclock]", "[vsyscall]")

# x86-64's numbers of system calls.
NR_READ, NR_LSEEK, NR_DUP2, NR_SOCKET, NR_BIND, NR_LISTEN, NR_SOCKETPAIR, NR_SETSOCKOPT = 0, 8, 33, 41, 49, 50, 53, 54
NR_EPOLL_CTL, NR_PIPE2, NR_MEMFD_CREATE, NR_CLONE3, NR_PIDFD_GETFD = 233, 293, 319, 435, 438
NR_WRITE, NR_UNSHARE, NR_SETNS, CLONE_NEWTIME = 1, 272, 308, 0x80
PR_SET_MM, PR_SET_MM_START_BRK, PR_SET_MM_BRK = 35, 6, 7
EPOLL_CTL_ADD, MFD_CLOEXEC, PROT_NONE = 1, 1, 0
BACKLOG = 128
#: Below the stack pointer, for what a system call returns in memory.
SCRATCH = In(RSP, -64)


def write(pid: int, target: str, root: str) -> None:
    """Write the process `pid`, whose root directory is `root`, as a program to `target`.

    Its main thread waits in a read of an eventfd, which will have something to read.
    Raises `HostError` where the host does not let us look, `MachineError` if the process has something that is not known here.
    """
    resume.at_rest(pid, lambda stopped, threads: _write(stopped, threads, target, root))


def _write(stopped: ptrace.Stopped, threads: list[resume.Thread], target: str, root: str) -> None:
    program = Program(BASE + HEAD)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o700)
    try:
        program.call(resume.NR_CLOSE_RANGE, 3, (1 << 32) - 1, 0)
        _enter_time(program, stopped.pid)
        _map(program, stopped, resume.Memory(fd, MEMORY_AT), root)
        main = threads[0]
        go = main.registers["rdi"] if main.registers["rax"] == NR_READ else -1
        _Descriptors(program, stopped.pid, root, go).put_back()
        resume.put_back_signals(program, stopped)
        program.call(resume.NR_ARCH_PRCTL, resume.ARCH_SET_FS, main.registers["fs_base"])
        for tid, thread in list(zip(stopped.tids, threads, strict=True))[1:]:
            child = Program(0)
            child.call(resume.NR_PRCTL, resume.PR_SET_NAME, _name(stopped.pid, tid), 0, 0, 0)
            resume.go_on(child, thread)
            # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size,
            # cgroup. The number it is to have is where the kernel will write it.
            at, stack = thread.tid_at, thread.registers["rsp"]
            fields = (resume.CLONE_THREAD, 0, at, at, 0, stack - 4096, 4096, thread.registers["fs_base"], at, 1, 0)
            program.call(NR_CLONE3, struct.pack("<11Q", *fields), 88)
            program.where(b"\x48\x85\xc0", b"\x85", child)  # test rax, rax; jnz
        program.call(resume.NR_PRCTL, resume.PR_SET_NAME, _name(stopped.pid, stopped.tids[0]), 0, 0, 0)
        resume.go_on_first(program, main)
        code = elf(program.finish(), BASE)
        if len(code) > MEMORY_AT:
            raise MachineError(f"{len(code)} bytes of program")
        os.pwrite(fd, code, 0)
    finally:
        os.close(fd)


def _name(pid: int, tid: int) -> bytes:
    with open(f"/proc/{pid}/task/{tid}/comm", "rb") as file:
        return file.read().rstrip(b"\n") + b"\0"


def _enter_time(program: Program, pid: int) -> None:
    """Have the clocks go on where the process has seen them last, or later: threads wait for moments of theirs."""
    offsets = "".join(f"{name} {seconds} 0\n" for name, seconds in _clocks(pid).items()).encode()
    program.call(NR_UNSHARE, CLONE_NEWTIME)
    program.call(resume.NR_OPEN, b"/proc/self/timens_offsets\0", os.O_WRONLY | os.O_CLOEXEC)
    program.call(NR_WRITE, 3, offsets, len(offsets))
    program.call(resume.NR_CLOSE, 3)
    # What was unshared is for children; one that has no threads yet may follow them.
    program.call(resume.NR_OPEN, b"/proc/self/ns/time_for_children\0", os.O_RDONLY | os.O_CLOEXEC)
    program.call(NR_SETNS, 3, CLONE_NEWTIME)
    program.call(resume.NR_CLOSE, 3)


def _clocks(pid: int) -> dict[str, int]:
    """What the clocks of a process say, by the names that time_namespaces(7) has for them, rounded up to seconds."""
    now = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}
    with open(f"/proc/{pid}/timens_offsets") as file:
        offsets = {name: int(seconds) for name, seconds, _ in map(str.split, file)}
    # One second for nanoseconds of the offset, and one for rounding.
    return {name: int(time.clock_gettime(clock)) + offsets[name] + 2 for name, clock in now.items()}


def _inside(path: str, root: str) -> str:
    """A path as the process sees it, whose root directory is `root`; devices are mounted there."""
    return path.removeprefix(root)


def _map(program: Program, stopped: ptrace.Stopped, memory: resume.Memory, root: str) -> None:
    pagemap = os.open(f"/proc/{stopped.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    own: list[tuple[int, int, int, int]] = []
    opened, heap = "", (0, 0)
    try:
        for area in resume.areas(stopped.pid):
            size = area.end - area.begin
            if area.path in KERNELS:
                continue
            if area.path == "[vdso]":
                try:
                    image = vdso.stand_in(stopped.read(area.begin, size), area.begin)
                except ValueError as error:
                    raise MachineError(str(error)) from error
                own.append((area.begin, size, area.prot, memory.add(image)))
                continue
            if area.path == "[heap]":
                heap = (area.begin, area.end)
            entries = memoryview(os.pread(pagemap, size // resume.PAGE * 8, area.begin // resume.PAGE * 8)).cast("Q")
            changed = any(resume.is_own(entry) for entry in entries)
            if area.path.startswith("/"):
                shared = area.perms[3] == "s"
                if shared and area.prot & resume.PROT_WRITE:
                    raise MachineError(f"the server shares memory: {area.path}")
                if area.path != opened:
                    if opened:
                        program.call(resume.NR_CLOSE, 3)
                    name = os.fsencode(_inside(area.path, root)) + b"\0"
                    program.call(resume.NR_OPEN, name, os.O_RDONLY | os.O_CLOEXEC)
                    opened = area.path
                flags = (resume.MAP_SHARED if shared else resume.MAP_PRIVATE) | resume.MAP_FIXED
                program.call(resume.NR_MMAP, area.begin, size, area.prot, flags, 3, area.offset)
            else:
                begin = area.begin - resume.STACK_ROOM if area.path == "[stack]" else area.begin
                program.call(resume.NR_MMAP, begin, area.end - begin, area.prot, resume.MAP_EMPTY, -1, 0)
            if changed:
                own += resume.own_pages(stopped.read, area, entries, memory, gap=GAP)
    finally:
        os.close(pagemap)
    program.call(resume.NR_CLOSE, 3)
    program.call(resume.NR_OPEN, b"/proc/self/exe\0", os.O_RDONLY | os.O_CLOEXEC)
    for begin, size, prot, offset in own:
        program.call(resume.NR_MMAP, begin, size, prot, resume.MAP_PRIVATE | resume.MAP_FIXED, 3, offset)
    program.call(resume.NR_CLOSE, 3)
    # The kernel refuses a beginning beyond the end, and where its own is, compared with ours, is a matter of chance.
    program.call(resume.NR_PRCTL, PR_SET_MM, PR_SET_MM_BRK, heap[1], 0, 0, check=False)
    program.call(resume.NR_PRCTL, PR_SET_MM, PR_SET_MM_START_BRK, heap[0], 0, 0)
    program.call(resume.NR_PRCTL, PR_SET_MM, PR_SET_MM_BRK, heap[1], 0, 0)


class _Descriptors:
    """The descriptors from 3 on, by the numbers they had: in ascending order, so each gets the lowest that is free."""

    def __init__(self, program: Program, pid: int, root: str, go: int) -> None:
        self._program, self._pid, self._root, self._go = program, pid, root, go
        self._numbers = sorted(number for number in map(int, os.listdir(f"/proc/{pid}/fd")) if number > 2)
        self._polled: list[tuple[int, int, bytes]] = []

    def put_back(self) -> None:
        """Add to the program what makes them."""
        holes = sorted(set(range(3, max(self._numbers, default=2))) - set(self._numbers))
        for number in sorted((*self._numbers, *holes)):
            if number in holes:
                self._program.call(resume.NR_DUP, 0)
            else:
                self._make(number)
        for number in holes:
            self._program.call(resume.NR_CLOSE, number)
        for poll, number, event in self._polled:
            self._program.call(NR_EPOLL_CTL, poll, EPOLL_CTL_ADD, number, event)

    def _make(self, number: int) -> None:
        call = self._program.call
        what = os.readlink(f"/proc/{self._pid}/fd/{number}")
        info = resume.fdinfo(self._pid, number)
        flags = int(info["flags"], 8)
        extra = flags & (os.O_CLOEXEC | os.O_NONBLOCK)
        if what == "anon_inode:[eventfd]":
            call(resume.NR_EVENTFD2, 1 if number == self._go else int(info["eventfd-count"], 16), extra)
        elif what == "anon_inode:[eventpoll]":
            call(resume.NR_EPOLL_CREATE1, extra & os.O_CLOEXEC)
            self._remember_polled(number)
        elif what.startswith("pipe:"):
            # Whoever had the other end is not of this process.
            call(NR_PIPE2, SCRATCH, extra)
            if flags & os.O_ACCMODE == os.O_WRONLY:
                call(NR_DUP2, number + 1, number)
            call(resume.NR_CLOSE, number + 1)
        elif what.startswith("socket:"):
            self._make_socket(number, extra)
        elif what.startswith("/") and what.endswith(" (deleted)"):
            # Left open by something of the warm-up, which nobody reads any more.
            call(NR_MEMFD_CREATE, b"deleted\0", MFD_CLOEXEC)
        elif what.startswith("/"):
            call(resume.NR_OPEN, os.fsencode(_inside(what, self._root)) + b"\0", flags)
            if int(info["pos"]):
                call(NR_LSEEK, number, int(info["pos"]), os.SEEK_SET)
        else:
            raise MachineError(f"the server has {what} open")

    def _remember_polled(self, number: int) -> None:
        with open(f"/proc/{self._pid}/fdinfo/{number}") as file:
            for words in (line.split() for line in file if line.startswith("tfd:")):
                event = struct.pack("<IQ", int(words[3], 16), int(words[5], 16))
                self._polled.append((number, int(words[1]), event))

    def _make_socket(self, number: int, extra: int) -> None:
        call = self._program.call
        with _copy(self._pid, number) as found:
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            kind = found.type | extra
            if found.family == socket.AF_UNIX and not listens:
                # Of a pair whose other half is closed; HotSpot's own, to make descriptors of that are closed.
                call(NR_SOCKETPAIR, found.family, kind, 0, SCRATCH)
                call(resume.NR_CLOSE, number + 1)
                return
            if not listens or found.family not in (socket.AF_INET, socket.AF_INET6):
                raise MachineError(f"the server has a socket of family {found.family} open")
            call(NR_SOCKET, found.family, kind, 0)
            one = struct.pack("<i", 1)
            call(NR_SETSOCKOPT, number, socket.SOL_SOCKET, socket.SO_REUSEADDR, one, len(one))
            if found.family == socket.AF_INET6:
                host, port, flow, scope = found.getsockname()
                only = struct.pack("<i", found.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
                call(NR_SETSOCKOPT, number, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only, len(only))
                rest = struct.pack("<I", flow) + socket.inet_pton(found.family, host) + struct.pack("<I", scope)
            else:
                host, port = found.getsockname()
                rest = socket.inet_pton(found.family, host) + bytes(8)
            name = struct.pack("<H", found.family) + struct.pack(">H", port) + rest
            call(NR_BIND, number, name, len(name))
            call(NR_LISTEN, number, BACKLOG)


def _copy(pid: int, number: int) -> socket.socket:
    """A socket of another process, as one of ours (pidfd_getfd(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        fd = libc.syscall(ctypes.c_long(NR_PIDFD_GETFD), pidfd, number, 0)
    finally:
        os.close(pidfd)
    if fd < 0:
        raise MachineError(f"cannot look at descriptor {number}: {os.strerror(ctypes.get_errno())}")
    return socket.socket(fileno=fd)
