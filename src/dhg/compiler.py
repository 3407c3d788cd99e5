"""Compiles a script on the host while its VM starts, where this Python's bytecode is the guest's. Imported once the VMM runs.

A guest under emulation has to translate CPython's compiler before it can run it, for a tenth of a hello; here it takes a
millisecond that nobody waits for. Compiling runs nothing of a script. But CPython's compiler was not made for sources that are
meant to harm: it may take long over a few lines, deaf to signals meanwhile, exhaust the stack, or have a bug. So it is a child that
compiles, and before it looks at the source it has given up everything but its memory and a pipe: a seccomp filter refuses
it all other system calls (seccomp(2)). What comes out of the pipe goes to the guest as it is, and nothing of it is looked at.

Whatever goes wrong, and whatever the compiler has to say, an error or a warning: then there is no code, and the guest compiles.
"""

from __future__ import annotations

import marshal
import os
import select
from _frozen_importlib_external import MAGIC_NUMBER  # `importlib.util` imports much more
from _struct import Struct

from . import config, proc, seccomp
from .wire.compiling import compiled

#: The largest source that is compiled here; it takes 0.6 to 1.2 us a byte.
MAX_SOURCE = 1 << 20
#: How long a request waits for its code once the VM is there: at 10 ms a guest would have compiled a line itself.
PATIENCE_MS, PATIENCE_US_BYTE = 10.0, 3.0
MAX_CPU_S = 5
MAX_MEMORY = 1 << 30

_SIZE = Struct("<I")

# linux/prctl.h, linux/seccomp.h.
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
#: x86-64's numbers of write, mmap, mprotect, munmap, brk, rt_sigreturn, mremap, madvise, exit, futex, exit_group.
ALLOWED = (1, 9, 10, 11, 12, 15, 25, 28, 60, 202, 231)


class Compilation:
    """A script that is being compiled in a child. `code` may be asked for once; `close`, as often as one likes, ends the child."""

    __slots__ = ("_child", "_patience_ms", "_pipe")

    def __init__(self, source: bytes, filename: str) -> None:
        self._patience_ms = PATIENCE_MS + len(source) * PATIENCE_US_BYTE / 1000
        self._pipe, write = os.pipe()
        try:
            self._child: proc.Process | None = proc.fork(lambda: _work(source, filename, write), fds=(write,))
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(write)

    def code(self) -> bytes:
        """The code as `marshal` writes it, or nothing if there is none in time. The child has ended then."""
        try:
            return self._received()
        finally:
            self.close()

    def _received(self) -> bytes:
        deadline = proc.Deadline(self._patience_ms / 1000)
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        data = b""
        # Its length comes first: what a child has written that died meanwhile is no code.
        while len(data) < _SIZE.size or len(data) < _SIZE.size + _SIZE.unpack_from(data)[0]:
            if not poller.poll(deadline.left() * 1000):
                return b""
            part = os.read(self._pipe, 1 << 20)
            if not part:
                return b""
            data += part
        return data[_SIZE.size :]

    def close(self) -> None:
        """End the child and reap it."""
        child, self._child = self._child, None
        if child is not None:
            os.close(self._pipe)
            child.kill()
            child.close()


def start(source: bytes, filename: str, bytecode: str) -> Compilation | None:
    """Begin to compile a script for a guest whose Python has that magic number of its bytecode, in hex digits ("" if not known).

    None where this cannot be, or must not (`DHG_VM_COMPILE`).
    """
    if (
        MAGIC_NUMBER.hex() != bytecode
        or os.uname().machine != "x86_64"
        or not source.strip()
        or len(source) > MAX_SOURCE
        # Code that was compiled so does not know its columns.
        or "PYTHONNODEBUGRANGES" in os.environ
        or config.compile_in_guest()
    ):
        return None
    try:
        return Compilation(source, filename)
    except OSError:
        return None


def _work(source: bytes, filename: str, pipe: int) -> None:
    """In the child."""
    import _warnings

    # What is a warning there is an error here, for which there is no code.
    _warnings.filters.insert(0, ("error", None, Warning, None, 0))
    _warnings._filters_mutated()  # type: ignore[attr-defined]
    _confine()
    data = marshal.dumps(compiled(source, filename))
    data = _SIZE.pack(len(data)) + data
    while data:
        data = data[os.write(pipe, data) :]


def _confine() -> None:
    """Give up everything but memory and descriptors that are open, for good. Raises `OSError`."""
    import ctypes

    proc.limit(os.getpid(), address_space_bytes=MAX_MEMORY, files=False, cpu_s=MAX_CPU_S)
    code = seccomp.program(ALLOWED)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: how many instructions, and where.
    fprog = ctypes.create_string_buffer(Struct("@HP").pack(len(code) // 8, ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    for option, value, more in (
        (PR_SET_PDEATHSIG, proc.SIGKILL, 0),
        (PR_SET_NO_NEW_PRIVS, 1, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog)),
    ):
        if prctl(option, value, more, 0, 0):
            raise OSError("no seccomp")
