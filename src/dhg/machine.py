"""A restored VM as a context manager: restore, run, close. Engine-neutral; on the hot path."""

from __future__ import annotations

import os
import time

from . import proc
from .engine import qmp
from .errors import DeadlineExceeded, MachineError
from .snapshot import store
from .wire import client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .share import start

#: How long a restore may take before it counts as hung.
RESTORE_TIMEOUT_S = 60.0


class Machine:
    """A VM restored from `snapshot`. Made by `restore`; leaving the context kills it."""

    def __init__(self, snapshot: store.Snapshot) -> None:
        #: Phases in milliseconds, in order.
        self.phases: dict[str, float] = {}
        self.snapshot = snapshot
        self.version = snapshot.version
        self.engine = snapshot.engine
        self.acceleration = snapshot.accel
        #: The wall clock at the resume, in ns since the epoch; 0 before it.
        self.resumed_ns = 0
        self._session: client.Session | None = None
        self._server: start.FileServer | None = None
        #: Whether the script tried to write where it may not; known after `close`.
        self.refused_write = False
        #: Why the host's files were not to be had; known after `close`.
        self.files_error: str | None = None
        #: When the restore began, on the monotonic clock.
        self.began_ns = self._clock = time.monotonic_ns()
        state = os.open(snapshot.state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._vm = qmp.start(snapshot.argv, state=state, lock=snapshot.lock, memory_mib=snapshot.memory_mib)
        finally:
            os.close(state)
        self._phase("spawn")

    def _phase(self, name: str) -> None:
        now = time.monotonic_ns()
        self.phases[name] = (now - self._clock) / 1e6
        self._clock = now

    def run(
        self,
        request: client.Request,
        *,
        stdout: client.Sink,
        stderr: client.Sink,
        deadline: proc.Deadline | None = None,
        stdin: int | None = None,
        shares: start.Shares = (),
    ) -> client.Result:
        """Wait until the VM runs, and run `request` in it; once only. `stdin` is a descriptor to pass on if the request says so.

        `shares` are directories of the host's and what the script may do there (share.start: READ_ONLY, WRITABLE, TEMPORARY): the
        first is /workspace ("" for none), the others those of the request's `mounts` and `outputs`.

        Raises `MachineError` if the VM cannot be restored (the script has not run), and what `client.Session.run` raises.
        """
        vm = self._vm
        limit = RESTORE_TIMEOUT_S if deadline is None else min(deadline.left(), RESTORE_TIMEOUT_S)
        try:
            resumed_ns = qmp.wait_resumed(vm, deadline=proc.Deadline(limit))
        except (MachineError, DeadlineExceeded) as error:
            if deadline is not None and deadline.left() == 0.0:
                raise DeadlineExceeded(
                    f"timed out after {deadline.timeout_s:g} s", hint="the script did not run"
                ) from error
            hint = f"the script did not run; {store.prepare_hint(self.snapshot.version)[:-1]} --force` makes the snapshot anew"
            raise MachineError(
                f"the VM could not be restored: {error}", hint=hint, detail=error.detail or vm.said()
            ) from error
        self._phase("load and resume")
        self._session = session = client.Session(vm.control, vm.stdout, vm.stderr)
        source = None if stdin is None or not request.stdin else (stdin, vm.stdin)
        self.resumed_ns = resumed_ns
        base_ns = self.snapshot.base_ns
        clock = client.Clock(resumed_ns, base_ns) if base_ns else None
        result = session.run(
            request,
            stdout=stdout,
            stderr=stderr,
            deadline=deadline,
            stdin=source,
            clock=clock,
            files=(vm.files, lambda: self._serve_files(shares)),
        )
        now = time.monotonic_ns()
        whole = (now - self._clock) / 1e6
        self.phases["guest ready"] = result.ready_ns / 1e6
        self.phases["script"] = result.script_ns / 1e6
        self.phases["wake-up and result"] = whole - (result.ready_ns + result.script_ns) / 1e6
        self._clock = now
        return result

    def _serve_files(self, shares: start.Shares) -> int:
        from .share import start

        self._server = start.FileServer(self._vm.files.fileno(), shares)
        return self._server.process.pidfd

    def interrupt(self) -> bool:
        """Raise KeyboardInterrupt in the script; False if none runs. May be called from a signal handler."""
        return self._session is not None and self._session.interrupt()

    @property
    def command(self) -> list[str]:
        """The VMM's command line."""
        return self.snapshot.argv

    def usage(self) -> dict[str, int]:
        """What the VM has cost so far: pages faulted and bytes read from disk. Call it before `close`."""
        return proc.usage(self._vm.process.pid)

    def close(self) -> None:
        """Kill the VM and reap it, and what served it files."""
        server, self._server = self._server, None
        if server is not None:
            server.leave()
        self._vm.close()
        if server is not None:
            self.refused_write, self.files_error = server.end()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def restore(version: str | None = None, *, engine: str = "qemu") -> Machine:
    """Start restoring the snapshot of `version` (default: `DHG_VERSION`, then the newest); does not wait for it.

    Raises `SnapshotMissing`, `SnapshotError`, `HostError`.
    """
    snapshot = store.open_snapshot(version, engine=engine)
    try:
        return Machine(snapshot)
    finally:
        os.close(snapshot.lock)
