"""A running QEMU: its process, its channels, QMP; the freeze and the restore.

On the hot path: no json, no subprocess, no typing. QMP is matched as bytes where only one answer is awaited.
"""

from __future__ import annotations

import _socket
import os
import time

from .. import proc
from ..errors import DeadlineExceeded, MachineError, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Descriptor numbers in QEMU, the same in every run, so that the command line is, too.
FD_QMP, FD_CONTROL, FD_STDOUT, FD_STDERR, FD_STDIN, FD_STATE, FD_CONSOLE, FD_LOCK, FD_LEASH, FD_FILES, FD_GO = range(
    200, 211
)
#: The memory of a VM that is booted to be frozen.
FD_RAM = 211
CHANNELS = (
    ("control", FD_CONTROL),
    ("stdout", FD_STDOUT),
    ("stderr", FD_STDERR),
    ("stdin", FD_STDIN),
    ("files", FD_FILES),
)


#: In the word that a checkpoint gets: see `go_on`.
SINGLE_BIT = 62

#: The channel that QEMU learns of last, as a file of `-readconfig`.
GO = b'[chardev "%s"]\nbackend = "socket"\nfd = "%d"\n' % (CHANNELS[-1][0].encode(), CHANNELS[-1][1])


class Qmp:
    """The control socket of a QEMU. Reads are matched as bytes; `deadline` bounds every wait."""

    __slots__ = ("_data", "socket")

    def __init__(self, sock: _socket.socket) -> None:
        self.socket = sock
        self._data = b""

    def send(self, *commands: bytes) -> None:
        """Send commands, without waiting for their answers."""
        try:
            self.socket.send(b"".join(commands))
        except OSError as error:
            raise MachineError(f"QEMU went away: {error.strerror}") from error

    def wait_for(self, *wanted: bytes, deadline: proc.Deadline, errors: Sequence[bytes] = (b'"error"',)) -> bytes:
        """Read until a line contains one of `wanted`; that line. Raises `MachineError` for a line with one of `errors`."""
        import select  # QEMU starts meanwhile

        poller = select.poll()
        poller.register(self.socket.fileno(), select.POLLIN)
        while True:
            while (end := self._data.find(b"\n")) >= 0:
                line, self._data = self._data[:end], self._data[end + 1 :]
                for error in errors:
                    if error in line:
                        raise MachineError("QEMU refused", detail=line.decode("utf-8", "replace").strip())
                for match in wanted:
                    if match in line:
                        return line
            if not poller.poll(deadline.left() * 1000):
                raise DeadlineExceeded(f"QEMU did not answer within {deadline.timeout_s:g} s")
            try:
                data = self.socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise MachineError("QEMU went away")
            self._data += data


#: What QEMU may map beyond the guest's memory: itself, its libraries, TB_SIZE_MIB of translated code, and the stacks of the up to
#: 64 threads with 8 MiB each that it starts when the guest reads much of its disk at once: it aborts if it cannot.
OVERHEAD_MIB = 1536
TB_SIZE_MIB = 256

#: QEMU's heap in huge pages where the kernel gives them on request: a tenth less of its start goes into page faults (glibc 2.35).
#: Two heaps at most: one for each of those threads would reserve 64 MiB a thread.
ENVIRON = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2"}

CAPABILITIES = b'{"execute":"qmp_capabilities"}\n'
SET_CAPABILITIES = (
    b'{"execute":"migrate-set-capabilities","arguments":{"capabilities":['
    b'{"capability":"x-ignore-shared","state":true},{"capability":"events","state":true}]}}\n'
)
QUIT, CONT = b'{"execute":"quit"}\n', b'{"execute":"cont"}\n'
STOP, STOPPED = b'{"execute":"stop"}\n', b'"STOP"'
COMPLETED, FAILED = b'"status": "completed"', b'"status": "failed"'


class Vm:
    """A QEMU process and the host's ends of its channels. A context manager: leaving it kills QEMU.

    QEMU dies with this process, however this one ends: it inherits the read end of a pipe whose write end only we hold, and
    the kernel is told to send it SIGKILL when something happens there (fcntl(2): F_SETOWN, F_SETSIG, O_ASYNC). That takes no
    program in between, and unlike PR_SET_PDEATHSIG does not fire when a mere thread of ours ends. Between the spawn and that there
    is a moment: QEMU reads one of its channels from a pipe (`-readconfig`) that gets its contents after it. If this process
    dies before, QEMU has a device whose channel it does not know, and ends.
    """

    __slots__ = ("_leash", "_log", "_stopped", "control", "files", "process", "qmp", "stderr", "stdin", "stdout")

    def __init__(
        self,
        argv: Sequence[str],
        *,
        extra: dict[int, int],
        log: int = -1,
        checkpoint: str | None = None,
        change_user: bool = True,
        single: bool = False,
    ) -> None:
        """With `checkpoint` that program is started instead of QEMU itself; it waits for the user that it is to run as. Without
        `change_user` QEMU stays root, if we are: for what is run in `prepare` only."""
        self._log = log
        self._stopped = checkpoint is not None
        ours: list[_socket.socket] = []
        theirs: dict[int, int] = dict(extra)
        pairs = []
        for fd in (FD_QMP, *[fd for _, fd in CHANNELS]):
            host, guest = _socket.socketpair()
            ours.append(host)
            pairs.append(guest)
            theirs[fd] = guest.fileno()
        leash, self._leash = os.pipe2(os.O_CLOEXEC)
        theirs[FD_LEASH] = leash
        theirs[FD_GO], go = os.pipe2(os.O_CLOEXEC)
        process = None
        try:
            if checkpoint is None:
                command, said, env = [*argv, *confinement(change_user=change_user)], GO, proc.minimal_env(ENVIRON)
            else:
                word = proc.unprivileged_id() | (1 << SINGLE_BIT if single else 0)
                command, said, env = list(argv), word.to_bytes(8, "little"), {}
            self.process = process = proc.spawn(command, fds=theirs, env=env, program=checkpoint)
            proc.kill_with_us(process.pid, leash)
            os.write(go, said)
        except BaseException:
            if process is not None:
                process.kill()
                process.close()
            os.close(self._leash)
            for sock in ours:
                sock.close()
            raise
        finally:
            for fd in (leash, go, theirs[FD_GO]):
                os.close(fd)
            for sock in pairs:
                sock.close()
        self.qmp = Qmp(ours[0])
        self.control, self.stdout, self.stderr, self.stdin, self.files = ours[1:]

    def close(self) -> None:
        """Kill QEMU, reap it, close the channels."""
        self.process.kill()
        self.process.close()
        os.close(self._leash)
        if self._log >= 0:
            os.close(self._log)
        for sock in (self.qmp.socket, self.control, self.stdout, self.stderr, self.stdin, self.files):
            sock.close()

    def wait_resumed(self, *, deadline: proc.Deadline) -> tuple[int, int, int]:
        """See `wait_resumed` and `wait_continued` below."""
        return wait_continued(self, deadline=deadline) if self._stopped else wait_resumed(self, deadline=deadline)

    def said(self) -> str | None:
        """The last that QEMU said of itself, if it is kept."""
        if self._log < 0:
            return None
        return proc.tail(os.pread(self._log, 65536, 0).decode("utf-8", "replace")) or None

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def logged(
    argv: Sequence[str],
    *,
    extra: dict[int, int],
    checkpoint: str | None = None,
    change_user: bool = True,
    single: bool = False,
) -> Vm:
    """A `Vm` that keeps what QEMU says of itself. It is not the script's output; it is shown if the restore fails."""
    log = os.memfd_create("dhg-qemu-log")
    try:
        extra = {**extra, 1: log, 2: log}
        return Vm(argv, extra=extra, log=log, checkpoint=checkpoint, change_user=change_user, single=single)
    except BaseException:
        os.close(log)
        raise


def confinement(*, change_user: bool = True) -> list[str]:
    """The arguments that confine a QEMU started by this process: its seccomp filter, and as root (with `change_user`) another user.

    QEMU opens its files before it changes user, so they may be root's own. The filter denies new programs in any case;
    elevateprivileges=deny would also deny the change of user (QEMU 7.2 dies of it), and is not needed after it: without
    capabilities and without exec there is nothing to elevate to.
    """
    uid = proc.unprivileged_id()
    sandbox = "on,obsolete=deny,spawn=deny,resourcecontrol=deny"
    if uid and change_user:
        return ["-sandbox", sandbox, "-runas", f"{uid}:{uid}"]
    return ["-sandbox", sandbox + ",elevateprivileges=deny"]


def prepare_freeze(vm: Vm, *, timeout_s: float = 60.0) -> None:
    """What has to be told to a VM that was booted, before `stop`."""
    deadline = proc.Deadline(timeout_s)
    for command in (CAPABILITIES, SET_CAPABILITIES):
        vm.qmp.send(command)
        vm.qmp.wait_for(b'"return"', deadline=deadline)


def stop(vm: Vm, *, timeout_s: float = 60.0) -> None:
    """Stop a VM. At once: the guest has found a moment in which nothing is about to run, and a migration lets it run on for half a
    second."""
    vm.qmp.send(STOP)
    vm.qmp.wait_for(STOPPED, deadline=proc.Deadline(timeout_s))


def freeze(vm: Vm, state: int, *, timeout_s: float = 60.0) -> None:
    """Write the device state of a VM that has been stopped to the file behind the descriptor `state`, end QEMU.
    The RAM file then is the memory snapshot."""
    deadline = proc.Deadline(timeout_s)
    # fd: and not exec: (which the sandbox forbids, and which can report `completed` before the file is whole).
    _send_fd(vm.qmp.socket, b'{"execute":"getfd","arguments":{"fdname":"state"}}\n', state)
    vm.qmp.wait_for(b'"return"', deadline=deadline)
    vm.qmp.send(b'{"execute":"migrate","arguments":{"uri":"fd:state"}}\n')
    vm.qmp.wait_for(COMPLETED, deadline=deadline, errors=(b'"error"', FAILED))
    vm.qmp.send(QUIT)
    if vm.process.wait(deadline.left()) is None:
        raise MachineError(f"QEMU did not end within {timeout_s:g} s after the snapshot")
    set_running(state)
    os.fsync(state)
    if os.fstat(state).st_size == 0:
        raise SnapshotError("QEMU wrote no device state")


def set_running(state: int) -> None:
    """Have whoever loads the device state in the descriptor `state` go on by itself, though the VM was stopped when it was written.

    Told to by QMP instead, each restore would take a turn of its main loop more. Raises `SnapshotError` if it is not where QEMU
    writes it (migration/savevm.c, migration/global_state.c): the section's name after its length, instance and version, the length
    of the name of the run state, that name in 100 bytes.
    """
    data = os.pread(state, os.fstat(state).st_size, 0)
    name = b"\x0bglobalstate"
    at = data.find(name) + len(name) + 8
    paused, running = (len(word).to_bytes(4, "big") + word.ljust(8, b"\0") for word in (b"paused\0", b"running\0"))
    if data.count(name) != 1 or data[at : at + len(paused)] != paused:
        raise SnapshotError("QEMU's device state does not say that the VM was stopped where it is expected")
    os.pwrite(state, running, at)


def _send_fd(sock: _socket.socket, data: bytes, fd: int) -> None:
    sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, "little"))])


def start(argv: Sequence[str], *, state: int, lock: int, memory_mib: int) -> Vm:
    """Start QEMU for a restore from the device state in the descriptor `state`; does not wait.

    `lock` is held by QEMU for as long as it lives. QEMU loads the state and resumes by itself.
    """
    vm = logged(argv, extra={FD_STATE: state, FD_LOCK: lock})
    proc.limit(vm.process.pid, address_space_bytes=memory_mib + OVERHEAD_MIB << 20)
    load(vm)
    return vm


def go_on(checkpoint: str, argv: Sequence[str], *, lock: int, memory_mib: int, single: bool = False) -> Vm:
    """Start the program `checkpoint`, a QEMU whose VM was stopped (see that module), and have the VM go on; does not wait.

    `argv` is what it is called. With `single` the kernel reads single pages only of the files that are mapped.
    """
    vm = logged(argv, extra={FD_LOCK: lock}, checkpoint=checkpoint, single=single)
    proc.limit(vm.process.pid, address_space_bytes=memory_mib + OVERHEAD_MIB << 20)
    try:
        vm.qmp.send(CONT)
    except MachineError:
        pass  # it has ended already, which whoever waits for it will see
    return vm


def load(vm: Vm) -> None:
    """Have a QEMU that was started with FD_STATE load its state, and so resume; does not wait."""
    vm.qmp.send(
        CAPABILITIES,
        SET_CAPABILITIES,
        b'{"execute":"migrate-incoming","arguments":{"uri":"fd:%d"}}\n' % FD_STATE,
    )


def wait_continued(vm: Vm, *, deadline: proc.Deadline) -> tuple[int, int, int]:
    """What `wait_resumed` does, for a VM that was stopped and goes on: QEMU sends RESUME before, and says when it is done."""
    resumed = _event_ns(vm.qmp.wait_for(b'"RESUME"', deadline=deadline))
    vm.qmp.wait_for(b'"return"', deadline=deadline)
    return resumed, resumed, time.time_ns()


def wait_resumed(vm: Vm, *, deadline: proc.Deadline) -> tuple[int, int, int]:
    """Wait until the guest runs: a write to a port before that hangs the guest for good.

    The wall clock in ns when QEMU was up and began to load the state, and before and after the guest's clock began to run (QEMU sends
    RESUME before, `completed` after).
    """
    wanted = (b'"setup"', b'"RESUME"', COMPLETED)
    setup, resumed, completed = [
        _event_ns(vm.qmp.wait_for(event, deadline=deadline, errors=(b'"error"', FAILED))) for event in wanted
    ]
    return setup, resumed, completed


def _event_ns(line: bytes) -> int:
    # {"timestamp": {"seconds": 1764000000, "microseconds": 12345}, "event": "RESUME"}
    try:
        seconds, micros = [
            int(line.split(name, 1)[1].split(b",", 1)[0].strip(b" :}")) for name in (b'"seconds"', b'"microseconds"')
        ]
    except (IndexError, ValueError):
        raise MachineError(f"QEMU's event has no time: {line!r}") from None
    return seconds * 1_000_000_000 + micros * 1000
