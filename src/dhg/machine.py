"""A restored VM as a context manager: restore, run, close. Engine-neutral; on the hot path."""

from __future__ import annotations

import os
import time

from . import config, proc
from .engine import qmp
from .errors import DeadlineExceeded, HostError, MachineError
from .snapshot import readahead, store
from .wire import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import Protocol

    from .share.start import FileServer, Shares
    from .wire import client

    class Vm(Protocol):
        """What every engine's running VM has: the seam between engines and the rest.

        The channels may be used once `wait_resumed` has returned: the wall clock when the VMM was up and began to load, and before
        and after the guest's clock went on, in ns since the epoch. It raises `MachineError` or `DeadlineExceeded`. `said` is
        the last that the VMM said of itself. `close` kills the VMM, reaps it and leaves nothing behind.
        """

        process: proc.Process
        control: _socket.socket
        stdout: _socket.socket
        stderr: _socket.socket
        stdin: _socket.socket
        files: _socket.socket

        def wait_resumed(self, *, deadline: proc.Deadline) -> tuple[int, int, int]: ...
        def said(self) -> str | None: ...
        def close(self) -> None: ...


#: How long a restore may take before it counts as hung.
RESTORE_TIMEOUT_S = 60.0

#: How closely the moment of the resume must be known. On a busy host QEMU may lose the CPU just then: then the guest is asked.
RESUME_WITHIN_NS = 10_000_000


class Machine:
    """A VM restored from `snapshot`. Made by `restore`; leaving the context kills it."""

    def __init__(self, snapshot: store.Snapshot, start: Callable[[store.Snapshot], Vm] | None = None) -> None:
        """Start restoring `snapshot` with its engine (or with `start`); does not wait."""
        #: Phases in milliseconds, in order.
        self.phases: dict[str, float] = {}
        self.snapshot = snapshot
        self.version = snapshot.version
        self.engine = snapshot.engine
        self.acceleration = snapshot.accel
        self._resumed = (0, 0)
        self._session: client.Session | None = None
        self._server: FileServer | None = None
        #: Whether the script tried to write where it may not; known after `close`.
        self.refused_write = False
        #: Why the host's files were not to be had; known after `close`.
        self.files_error: str | None = None
        #: When the restore began, on the monotonic clock.
        self.began_ns = self._clock = time.monotonic_ns()
        #: Why the checkpoint could not be used, if it could not.
        self.fallback: str | None = None
        try:
            self.vm: Vm = (start or _start)(snapshot)
        except HostError as error:
            # One that may not be started, say from a file system without programs (noexec).
            if start is not None or not snapshot.checkpoint:
                raise
            self._start_from_state(str(error), snapshot.lock)
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
        shares: Shares = (),
    ) -> client.Result:
        """Wait until the VM runs, and run `request` in it; once only. `stdin` is a descriptor to pass on if the request says so.

        `shares` are directories of the host's and what the script may do there (share.start: READ_ONLY, WRITABLE, TEMPORARY): the
        first is /workspace ("" for none), the others those of the request's `mounts` and `outputs`. Without any, /workspace is the
        VM's own and empty.

        Raises `MachineError` if the VM cannot be restored (the script has not run), and what `client.Session.run` raises.
        """
        session = self._settle(deadline)
        source = None if stdin is None or not request.stdin else (stdin, self.vm.stdin)
        clock = self._clock_of(session, deadline)
        if not shares:
            # Nobody answers there: a script that looks for a module in its working directory would end with ESTALE.
            request.flags |= frames.FLAG_NO_WORKSPACE
        result = session.run(
            request,
            stdout=stdout,
            stderr=stderr,
            deadline=deadline,
            stdin=source,
            clock=clock,
            files=(self.vm.files, lambda: self._serve_files(shares)),
        )
        now = time.monotonic_ns()
        whole = (now - self._clock) / 1e6
        ready, script = result.ready_ns / 1e6, result.script_ns / 1e6
        woken = min(max(0.0, result.woken_ns / 1e6), max(0.0, whole - ready - script))
        self.phases.update({"wake-up": woken, "guest ready": ready, "script": script})
        # Not below zero: what is left of floats, or of the guest's clock against the host's, is no time.
        self.phases["result"] = max(0.0, whole - woken - ready - script)
        self._clock = now
        return result

    def _settle(self, deadline: proc.Deadline | None) -> client.Session:
        from .wire import client  # the VMM starts meanwhile

        vm = self.vm
        limit = RESTORE_TIMEOUT_S if deadline is None else min(deadline.left(), RESTORE_TIMEOUT_S)
        try:
            began_ns = time.time_ns() - (time.monotonic_ns() - self._clock)
            whole = proc.Deadline(limit)
            try:
                first = proc.Deadline(limit / 2 if self.snapshot.checkpoint else limit)
                up_ns, *resumed = vm.wait_resumed(deadline=first)
            except (MachineError, DeadlineExceeded) as error:
                if not self.snapshot.checkpoint:
                    raise
                # A host that has changed in a way that nobody has thought of: the slow way works wherever QEMU does.
                vm = self._start_anew(str(error))
                up_ns, *resumed = vm.wait_resumed(deadline=whole)
        except (MachineError, DeadlineExceeded) as error:
            if deadline is not None and deadline.left() == 0.0:
                raise DeadlineExceeded(
                    f"timed out after {deadline.timeout_s:g} s", hint="the script did not run"
                ) from error
            command = store.prepare_command(self.snapshot.version, engine=self.snapshot.engine)
            hint = f"the script did not run; `{command} --force` makes the snapshot anew"
            if self.snapshot.engine == "qemu" and not os.access(f"{self.snapshot.path}/ram", os.W_OK):
                hint = f"the script did not run; QEMU needs a snapshot that can be written: {config.HOME_HINT}"
            raise MachineError(
                f"the VM could not be restored: {error}", hint=hint, detail=error.detail or vm.said()
            ) from error
        self._resumed = (resumed[0], resumed[1])
        self._phase("state load")
        # When the VMM was up it says on the wall clock, which may step meanwhile: for show only.
        start = min(max(0.0, (up_ns - began_ns) / 1e6), self.phases["state load"])
        self.phases["VMM start"], self.phases["state load"] = start, self.phases.pop("state load") - start
        self._session = session = client.Session(vm.control, vm.stdout, vm.stderr)
        return session

    def _start_anew(self, why: str) -> Vm:
        """Start QEMU itself in place of a checkpoint that did not go on."""
        before = self.vm
        lock = store.lock_shared(self.snapshot.path)
        try:
            self._start_from_state(why, lock)
        finally:
            os.close(lock)
        before.close()
        return self.vm

    def _start_from_state(self, why: str, lock: int) -> None:
        self.fallback, self.snapshot.checkpoint = why, None
        given, self.snapshot.lock = self.snapshot.lock, lock
        try:
            self.vm = _start(self.snapshot)
        finally:
            self.snapshot.lock = given

    def _clock_of(self, session: client.Session, deadline: proc.Deadline | None) -> client.Clock:
        from .wire import client

        before, after = self._resumed
        if self.snapshot.base_ns and after - before <= RESUME_WITHIN_NS:
            return client.Clock((before + after) // 2, self.snapshot.base_ns)
        return session.ask_clock(deadline=deadline)

    def measure_base(self, *, rounds: int, timeout_s: float) -> tuple[int, int]:
        """The guest's monotonic clock at the moment of the resume, and by how much that may be off, both in ns.

        It is the same for every clone of a snapshot. Instead of `run`; the VM cannot run anything afterwards but what `run` would.
        """
        deadline = proc.Deadline(timeout_s)
        session = self._settle(deadline)
        before, after = self._resumed
        clock = session.ask_clock(deadline=deadline, rounds=rounds)
        return clock.base_ns - (clock.resumed_ns - (before + after) // 2), after - before

    def _serve_files(self, shares: Shares) -> int:
        from .share.start import FileServer

        self._server = FileServer(self.vm.files.fileno(), shares)
        return self._server.process.pidfd

    def interrupt(self) -> bool:
        """Raise KeyboardInterrupt in the script; False if none runs. May be called from a signal handler."""
        return self._session is not None and self._session.interrupt()

    @property
    def released(self) -> bool:
        """Whether the script has been handed over: it may have run."""
        return self._session is not None and self._session.released

    @property
    def command(self) -> list[str]:
        """The VMM's command line."""
        return self.snapshot.argv

    def usage(self) -> dict[str, int]:
        """What the VM has cost so far: pages faulted and bytes read from disk. Call it before `close`."""
        return proc.usage(self.vm.process.pid)

    def close(self) -> None:
        """Kill the VM and reap it, and what served it files."""
        server, self._server = self._server, None
        if server is not None:
            server.leave()
        self.vm.close()
        if server is not None:
            self.refused_write, self.files_error = server.end()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _start(snapshot: store.Snapshot) -> Vm:
    if snapshot.engine == "firecracker":
        from .engine import firecracker

        version, memory_mib = snapshot.engine_version, snapshot.memory_mib
        return firecracker.start(
            snapshot.path, snapshot.argv[0], version=version, lock=snapshot.lock, memory_mib=memory_mib
        )
    files = [(f"{snapshot.path}/ram", snapshot.ahead)]
    if snapshot.checkpoint:
        files.insert(0, (snapshot.checkpoint, snapshot.ahead_own))
    # Before QEMU looks for its pages: one that is not there it gets with all that the disk reads ahead, 8 MB on some.
    reading = readahead.start(files)
    if snapshot.checkpoint:
        argv, memory_mib = snapshot.argv, snapshot.memory_mib
        return qmp.go_on(snapshot.checkpoint, argv, lock=snapshot.lock, memory_mib=memory_mib, single=reading)
    state = os.open(snapshot.state, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return qmp.start(snapshot.argv, state=state, lock=snapshot.lock, memory_mib=snapshot.memory_mib)
    finally:
        os.close(state)


def restore(version: str | None = None, *, engine: str | None = None, accel: str | None = None) -> Machine:
    """Start restoring the snapshot of `version` (default: `DHG_VERSION`, then the newest); does not wait for it.

    `engine` is qemu or firecracker; by default whichever has a snapshot, QEMU first.
    With `accel` (kvm or tcg) a snapshot that was made under the other is refused.

    Raises `SnapshotMissing`, `SnapshotError`, `HostError`.
    """
    snapshot = store.open_snapshot(version, engine=engine, accel=accel)
    try:
        return Machine(snapshot)
    finally:
        os.close(snapshot.lock)
