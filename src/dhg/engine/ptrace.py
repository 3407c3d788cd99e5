"""Stopping the threads of a process and reading what they are made of (ptrace(2), x86-64). For `checkpoint`; not on the hot path."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time

from ..errors import HostError, MachineError

SEIZE, INTERRUPT, GETREGSET, SETREGSET, GETSIGMASK, GET_RSEQ = 0x4206, 0x4207, 0x4204, 0x4205, 0x420A, 0x420F
SINGLESTEP, DETACH = 9, 17
NT_PRSTATUS, NT_PRFPREG = 1, 2
WALL = 0x4000_0000
#: struct user_regs_struct (sys/user.h).
REGISTERS = (
    *(
        "r15",
        "r14",
        "r13",
        "r12",
        "rbp",
        "rbx",
        "r11",
        "r10",
        "r9",
        "r8",
        "rax",
        "rcx",
        "rdx",
        "rsi",
        "rdi",
        "orig_rax",
    ),
    *("rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
SYSCALL = b"\x0f\x05"
#: What a system call that a signal interrupts "returns" before it is restarted (linux/errno.h: ERESTARTSYS and the like).
RESTARTS = (-512, -513, -514, -516)
NR_RT_SIGACTION, NR_GET_ROBUST_LIST = 13, 274
#: Of a kernel's struct sigaction: handler, flags, restorer, mask.
SIGACTION_SIZE = 32
#: How long a thread may take to stop.
STOP_S = 5.0


def _ptrace(request: int, tid: int, addr: int = 0, data: object = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    value = ctypes.c_long(data) if isinstance(data, int) else data
    result: int = libc.ptrace(ctypes.c_long(request), ctypes.c_long(tid), ctypes.c_void_p(addr), value)
    if result < 0:
        number = ctypes.get_errno()
        raise HostError(f"ptrace {request:#x} of {tid}: {os.strerror(number)}")
    return result


class Stopped:
    """The threads of a process, stopped while the context lasts; they go on as if nothing had been. Raises `HostError` where the
    host does not let us, `MachineError` if a thread does not stop."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        #: In the order they were made; the first is the main thread.
        self.tids: list[int] = []
        self._memory = -1

    def __enter__(self) -> Stopped:
        try:
            self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            while found := [tid for tid in self._threads() if tid not in self.tids]:
                for tid in found:
                    _ptrace(SEIZE, tid)
                    self.tids.append(tid)
                    _ptrace(INTERRUPT, tid)
                    _await_stop(tid)
        except BaseException as error:
            self._leave()
            if isinstance(error, OSError):
                raise HostError(f"cannot look into process {self.pid}: {error.strerror}") from error
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave()

    def _leave(self) -> None:
        for tid in self.tids:
            try:
                _ptrace(DETACH, tid)
            except HostError:
                # It has ended; or it runs, as it did not stop in time, and would stay traced.
                try:
                    _await_stop(tid)
                    _ptrace(DETACH, tid)
                except (HostError, MachineError):
                    pass
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _threads(self) -> list[int]:
        return sorted(int(name) for name in os.listdir(f"/proc/{self.pid}/task"))

    def read(self, address: int, size: int) -> bytes:
        """The contents of its memory, whatever the protection."""
        data = b""
        while len(data) < size:
            part = os.pread(self._memory, size - len(data), address + len(data))
            if not part:
                raise MachineError(f"process {self.pid} has no memory at {address + len(data):#x}")
            data += part
        return data

    def registers(self, tid: int) -> dict[str, int]:
        """The registers of a thread, by name."""
        return dict(zip(REGISTERS, struct.unpack("27Q", self._regset(tid)), strict=True))

    def _regset(self, tid: int) -> bytes:
        buffer = ctypes.create_string_buffer(27 * 8)
        _ptrace(GETREGSET, tid, NT_PRSTATUS, ctypes.byref(_iovec(buffer)))
        return buffer.raw

    def floating(self, tid: int) -> bytes:
        """The registers for floating point and vectors, the lower halves, as `fxsave` writes them."""
        buffer = ctypes.create_string_buffer(512)
        _ptrace(GETREGSET, tid, NT_PRFPREG, ctypes.byref(_iovec(buffer)))
        return buffer.raw

    def _set_regset(self, tid: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        _ptrace(SETREGSET, tid, NT_PRSTATUS, ctypes.byref(_iovec(buffer)))

    def blocked(self, tid: int) -> int:
        """The signals that a thread blocks, as a mask."""
        mask = ctypes.c_uint64()
        _ptrace(GETSIGMASK, tid, 8, ctypes.byref(mask))
        return mask.value

    def rseq(self, tid: int) -> tuple[int, int, int]:
        """Address, size and signature of a thread's restartable sequences (rseq(2)); zeros where it has none."""
        buffer = ctypes.create_string_buffer(24)
        try:
            _ptrace(GET_RSEQ, tid, 24, buffer)
        except HostError:
            return 0, 0, 0
        address, size, signature = struct.unpack_from("QII", buffer.raw)
        return address, size, signature

    def handlers(self, signals: list[int]) -> dict[int, bytes]:
        """What the process does at these signals, as the kernel's struct sigaction: it is made to ask itself."""
        tid = self.tids[0]
        saved = self._regset(tid)
        registers = self.registers(tid)
        scratch = registers["rsp"] - 4096 & ~15
        if self.read(registers["rip"] - 2, 2) != SYSCALL:
            raise MachineError(f"thread {tid} is in no system call")
        kept, found = self.read(scratch, SIGACTION_SIZE), {}
        try:
            for number in signals:
                call = dict(registers, rip=registers["rip"] - 2, rax=NR_RT_SIGACTION, orig_rax=(1 << 64) - 1)
                call.update(rdi=number, rsi=0, rdx=scratch, r10=8)
                self._set_regset(tid, struct.pack("27Q", *call.values()))
                _ptrace(SINGLESTEP, tid)
                _await_stop(tid)
                if self.registers(tid)["rax"]:
                    raise MachineError(f"rt_sigaction of signal {number} failed")
                found[number] = self.read(scratch, SIGACTION_SIZE)
        finally:
            os.pwrite(self._memory, kept, scratch)
            self._set_regset(tid, saved)
        return found


def robust_list(tid: int) -> tuple[int, int]:
    """Address and size of the head of a thread's list of robust futexes (get_robust_list(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, size = ctypes.c_uint64(), ctypes.c_uint64()
    if libc.syscall(ctypes.c_long(NR_GET_ROBUST_LIST), ctypes.c_long(tid), ctypes.byref(head), ctypes.byref(size)):
        raise HostError(f"get_robust_list of {tid}: {os.strerror(ctypes.get_errno())}")
    return head.value, size.value


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _iovec(buffer: ctypes.Array[ctypes.c_char]) -> _IoVec:
    return _IoVec(ctypes.addressof(buffer), len(buffer))


def _await_stop(tid: int) -> None:
    end = time.monotonic() + STOP_S
    while True:
        try:
            pid, status = os.waitpid(tid, WALL | os.WNOHANG)
        except OSError as error:
            if error.errno == errno.ECHILD:
                raise MachineError(f"thread {tid} has ended") from error
            raise
        if pid:
            if os.WIFSTOPPED(status):
                return
            raise MachineError(f"thread {tid} has ended")
        if time.monotonic() > end:
            raise MachineError(f"thread {tid} did not stop within {STOP_S:g} s")
        time.sleep(0.001)
