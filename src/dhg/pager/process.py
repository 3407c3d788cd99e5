"""Starts the pager's process, and ties its life to the VMM's and to ours.

we die      the kernel kills pager and VMM (proc.kill_with_us, a pipe each)
VMM dies    the pager sees it (pidfd) and ends
pager dies  the kernel kills the VMM, whose leash only the pager holds: a guest whose faults nobody answers hangs for good
"""

from __future__ import annotations

import _socket
import os
import select
import sys

from .. import proc
from ..errors import DeadlineExceeded, MachineError

# Descriptor numbers in the pager.
_FD_LISTENER, _FD_STATUS, _FD_LEASH, _FD_VMM_LEASH = range(200, 204)

# Without site and environment: half the start of an interpreter. Not a script file, which would be compiled every time.
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from dhg.pager.__main__ import main; main()"

LAZY, EAGER, SET, RECORD = "lazy", "eager", "set", "record"


class PagerProcess:
    """A pager that listens for its VMM. A context manager: leaving it kills the pager, and so the VMM.

    Give `vmm_leash` to the VMM as an inherited descriptor, and call `tie` when it runs.
    """

    __slots__ = ("_leash", "_log", "_said", "_status", "process", "vmm_leash")

    def __init__(
        self,
        listener: _socket.socket,
        memory: str,
        *,
        mode: str = LAZY,
        chunk: int | None = None,
        working_set: str | None = None,
    ) -> None:
        """Start serving the file `memory` to the VMM that connects to `listener`. Does not wait. Raises `HostError`.

        `chunk` is in bytes, a power of two; `working_set` is the file that mode SET reads and RECORD writes.
        """
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        argv = [sys.executable, "-I", "-S", "-c", _BOOT, package, f"memory={memory}", f"socket=fd:{_FD_LISTENER}"]
        argv += [f"mode={mode}", f"status={_FD_STATUS}"]
        if chunk is not None:
            argv.append(f"chunk={chunk}")
        if working_set is not None:
            argv.append(f"set={working_set}")
        self._said = b""
        self._log = os.memfd_create("dhg-pager-log")
        leash, self._leash = os.pipe2(os.O_CLOEXEC)
        self.vmm_leash, vmm_leash = os.pipe2(os.O_CLOEXEC)
        self._status, status = os.pipe2(os.O_CLOEXEC)
        fds = {_FD_LISTENER: listener.fileno(), _FD_STATUS: status, _FD_LEASH: leash, _FD_VMM_LEASH: vmm_leash}
        try:
            self.process = proc.spawn(argv, fds=fds | {1: self._log, 2: self._log})
            proc.kill_with_us(self.process.pid, leash)
        except BaseException:
            for fd in (self._log, self._leash, self._status, self.vmm_leash):
                os.close(fd)
            raise
        finally:
            for fd in (leash, vmm_leash, status):
                os.close(fd)

    @property
    def status_fd(self) -> int:
        """Where `ready` is said, for another process to wait for; then `wait_ready` and `counts` must not be."""
        return self._status

    def tie(self, vmm: int) -> None:
        """From now on the process `vmm`, which has inherited `vmm_leash`, dies with the pager."""
        proc.kill_with_us(vmm, self.vmm_leash)
        os.close(self.vmm_leash)
        self.vmm_leash = -1

    def wait_ready(self, deadline: proc.Deadline) -> None:
        """Wait until all that is to be there before the guest resumes is there.

        Raises `MachineError` if the pager ends before, `DeadlineExceeded`.
        """
        while b"ready\n" not in self._said:
            if not self._read(deadline.left()):
                raise MachineError("the pager ended", detail=self.said())

    def counts(self, timeout_s: float = 10.0) -> bytes:
        """What the pager has done, one line of JSON; to be asked for when the VMM has ended. Empty if the pager failed."""
        deadline = proc.Deadline(timeout_s)
        while self._read(deadline.left()):
            pass
        return self._said.removeprefix(b"ready\n")

    def _read(self, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(self._status, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            raise DeadlineExceeded("the pager did not say that the memory is ready in time", detail=self.said())
        data = os.read(self._status, 65536)
        self._said += data
        return bool(data)

    def said(self) -> str | None:
        """The last that the pager wrote to stderr."""
        return proc.tail(os.pread(self._log, 65536, 0).decode("utf-8", "replace")) or None

    def close(self) -> None:
        """Kill the pager and reap it; call it after the VMM was killed."""
        self.process.kill()
        self.process.close()
        for fd in (self._log, self._leash, self._status, self.vmm_leash):
            if fd >= 0:
                os.close(fd)
        self.vmm_leash = -1

    def __enter__(self) -> PagerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
