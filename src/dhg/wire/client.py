"""The host's side of a run: sends the request, streams the script's output, returns the result.

On the hot path: imports `os` and `select` (built in) only.
"""

from __future__ import annotations

import os
import select
import time

from .. import proc
from ..errors import DeadlineExceeded, MachineError, OutcomeUnknown, ProtocolError, UsageError
from . import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    #: Receives the script's bytes as they come.
    Sink = Callable[[bytes], object]

    #: A channel, and what starts a server for it when the first byte has come: it returns a pidfd.
    Files = tuple[_socket.socket, Callable[[], int]]


#: How often a guest is asked for its clock at most, how long it may take, and which round trip is short enough.
CLOCK_ROUNDS = 8
CLOCK_TIMEOUT_S = 20.0
CLOCK_GOOD_NS = 10_000_000


class Request:
    """A script to run.

    `environ` are items NAME=VALUE; `stdin` says whether the script gets any; `flags` are those of REQUEST but FLAG_STDIN;
    `rows` is how many rows of each table are shown. `file`, `folder`, `mounts` and `outputs` are as in REQUEST.
    """

    __slots__ = (
        "args", "environ", "file", "filename", "flags", "folder", "mounts", "outputs", "rows", "source", "stdin"
    )  # fmt: skip

    def __init__(
        self,
        source: bytes,
        filename: str = frames.STRING,
        *,
        args: tuple[str, ...] = (),
        environ: tuple[str, ...] = (),
        stdin: bool = False,
        flags: int = 0,
        rows: int = 10,
        file: str | None = None,
        folder: str | None = None,
        mounts: tuple[str, ...] = (),
        outputs: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.filename = filename
        self.args = args
        self.environ = environ
        self.stdin = stdin
        self.flags = flags
        self.rows = rows
        self.file = file
        self.folder = folder
        self.mounts = mounts
        self.outputs = outputs


class Result:
    """How a script ended: its exit code, the times in ns (resume to wake-up, to the release of the script, to its end), and the
    fields of RESULT as they came. Raises `FrameError` for a payload that is none."""

    __slots__ = ("_fields", "exit_code", "ready_ns", "script_ns", "woken_ns")

    def __init__(self, payload: bytes) -> None:
        if len(payload) < frames.RESULT_HEAD.size:
            raise frames.FrameError(f"a result of {len(payload)} bytes")
        self.exit_code: int
        self.woken_ns: int
        self.ready_ns: int
        self.script_ns: int
        self.exit_code, self.woken_ns, self.ready_ns, self.script_ns = frames.RESULT_HEAD.unpack_from(payload)
        if not 0 <= self.exit_code <= 255:
            raise frames.FrameError(f"exit code {self.exit_code}")
        self._fields = frames.fields(payload[frames.RESULT_HEAD.size :])

    def texts(self, key: int) -> list[str]:
        """The texts of a field, lone surrogates replaced: what the guest says is for people and for JSON."""
        return [value.decode("utf-8", "replace") for value in self._fields.get(key, ())]


class Clock:
    """What a restored guest needs to know the time, however long the request is on its way: what the host's wall clock and the
    guest's monotonic clock said at the same moment. For the moment of the resume, the latter is the same for all clones."""

    __slots__ = ("base_ns", "resumed_ns")

    def __init__(self, resumed_ns: int, base_ns: int) -> None:
        self.resumed_ns = resumed_ns
        self.base_ns = base_ns


def encode(request: Request, *, end_mark: bytes, clock: Clock | None = None) -> bytes:
    """The REQUEST frame. Takes fresh entropy and names, and without `clock` the time, when it is called: call it last.

    Raises `UsageError` for a script that is larger than a frame may be.
    """
    name = frames.octets("" if request.filename == frames.STRING else request.filename)
    file, folder = frames.octets(request.file or ""), frames.octets(request.folder or "")
    machine_id = os.urandom(16).hex().encode()
    head = frames.REQUEST_HEAD.pack(
        clock.resumed_ns if clock else time.time_ns(),
        clock.base_ns if clock else 0,
        request.flags | (frames.FLAG_STDIN if request.stdin else 0),
        request.rows,
        len(request.source),
        len(name),
        len(file),
        len(folder),
        os.urandom(64),
        b"dhg-" + machine_id[:8],
        machine_id,
        end_mark,
    )
    parts = [head, request.source, name, file, folder]
    parts += [frames.field(frames.F_ARG, arg) for arg in request.args]
    parts += [frames.field(frames.F_ENV, item) for item in request.environ]
    for key, texts in ((frames.F_MOUNT, request.mounts), (frames.F_OUTPUT, request.outputs)):
        parts += [frames.field(key, text) for text in texts]
    try:
        return frames.frame(frames.REQUEST, b"".join(parts))
    except frames.FrameError as error:
        raise UsageError(f"the script and its arguments are too large: {error}") from None


class Stream:
    """One output channel: passes bytes on until the end mark has come."""

    __slots__ = ("_held", "_mark", "done", "sink", "socket")

    def __init__(self, sock: _socket.socket, mark: bytes, sink: Sink) -> None:
        self.socket = sock
        self.sink = sink
        self.done = False
        self._mark = mark
        self._held = b""

    def receive(self) -> bool:
        """Take what has arrived; False at the end of the channel itself."""
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            self.flush()
            return False
        if self._held:
            data = self._held + data
        at = data.find(self._mark)
        if at >= 0:
            self.done = True
            self._held = b""
            data = data[:at]
        else:
            keep = self._partial_mark(data)
            self._held = data[len(data) - keep :]
            if keep:
                data = data[:-keep]
        if data:
            self.sink(data)
        return True

    def flush(self) -> None:
        """Pass on what was held back because it might have been the start of the mark."""
        held, self._held = self._held, b""
        if held:
            self.sink(held)

    def _partial_mark(self, data: bytes) -> int:
        # How many bytes at the end of `data` are the beginning of the mark.
        mark = self._mark
        at = data.rfind(mark[:1], max(0, len(data) - len(mark) + 1))
        best = 0
        while at >= 0:
            if mark.startswith(data[at:]):
                best = len(data) - at
            at = data.rfind(mark[:1], max(0, len(data) - len(mark) + 1), at)
        return best


class Session:
    """One request over a control channel and the output channels beside it."""

    def __init__(self, control: _socket.socket, stdout: _socket.socket, stderr: _socket.socket) -> None:
        self.control = control
        self._stdout = stdout
        self._stderr = stderr
        self._decoder = frames.Decoder()
        self.died: int | None = None
        #: Whether the script has been handed over: it may have run.
        self.released = False

    def interrupt(self) -> bool:
        """Raise KeyboardInterrupt in the script; False if none runs. May be called from a signal handler."""
        if not self.released:
            return False
        try:
            self.control.send(frames.frame(frames.INTERRUPT))
        except OSError:
            return False
        return True

    def ask_clock(self, *, deadline: proc.Deadline | None = None, rounds: int = CLOCK_ROUNDS) -> Clock:
        """Ask the guest for its monotonic clock; the quickest answer of up to `rounds` is good to half its round trip.

        Stops early once that is a few ms. Raises `DeadlineExceeded`, `OutcomeUnknown`, `ProtocolError`.
        """
        best: tuple[int, int, int] | None = None
        poller = select.poll()
        poller.register(self.control.fileno(), select.POLLIN)
        for _ in range(rounds):
            asked = time.time_ns()
            self._send(frames.frame(frames.CLOCK))
            answer: bytes | None = None
            limit = proc.Deadline(CLOCK_TIMEOUT_S if deadline is None else min(deadline.left(), CLOCK_TIMEOUT_S))
            while answer is None:
                if limit.left() == 0.0 or not poller.poll(limit.left() * 1000):
                    raise DeadlineExceeded("the VM does not answer", hint="the script did not run")
                answer = self._clock_answer()
            now = time.time_ns()
            found = (now - asked, (now + asked) // 2, frames.integer(answer))
            best = found if best is None else min(best, found)
            if rounds == CLOCK_ROUNDS and best[0] < CLOCK_GOOD_NS:
                break
        assert best is not None
        return Clock(best[1], best[2])

    def _clock_answer(self) -> bytes | None:
        try:
            data = self.control.recv(4096)
            for kind, payload in self._decoder.feed(data):
                if kind == frames.CLOCK:
                    return frames.fields(payload)[frames.F_BASE_NS][0]
        except OSError:
            data = b""
        except (frames.FrameError, KeyError) as error:
            raise ProtocolError(f"the guest sent no valid frame: {error}") from error
        if not data:
            raise OutcomeUnknown("the VM ended before the script was with it", hint="the script did not run")
        return None

    def _send(self, data: bytes) -> None:
        try:
            self.control.sendall(data)
        except OSError:
            raise OutcomeUnknown("the VM ended before the script was with it", hint="the script did not run") from None

    def run(
        self,
        request: Request,
        *,
        stdout: Sink,
        stderr: Sink,
        deadline: proc.Deadline | None = None,
        stdin: tuple[int, _socket.socket] | None = None,
        clock: Clock | None = None,
        files: Files | None = None,
    ) -> Result:
        """Send the request and stream until the result is there and both outputs are complete.

        `stdin` is a descriptor to read and the channel to pass it to; `files` is how the guest is served files once it asks
        for one. Raises `DeadlineExceeded` at the deadline,
        `OutcomeUnknown` if the VM goes away, `ProtocolError` for bytes that are no frame; what was printed before has
        reached the sinks in any case.
        """
        # Begins with a byte that no text has: what may be the beginning of the mark is held back until more comes.
        mark = b"\xff" + os.urandom(15)
        outputs = [Stream(self._stdout, mark, stdout), Stream(self._stderr, mark, stderr)]
        self._send(encode(request, end_mark=mark, clock=clock))
        self.released = True
        poller = select.poll()
        streams = {stream.socket.fileno(): stream for stream in outputs}
        control = self.control.fileno()
        for fd in (control, *streams):
            poller.register(fd, select.POLLIN)
        source = _Input(stdin, poller) if stdin else None
        server = _Files(files, poller, now=bool(request.outputs)) if files else None
        result: Result | None = None
        while result is None or not all(stream.done for stream in outputs):
            events = poller.poll(None if deadline is None else deadline.left_ms())
            if deadline is not None and deadline.left() == 0.0:
                raise DeadlineExceeded(f"timed out after {deadline.timeout_s:g} s", hint="the script was running")
            for fd, event in events:
                if fd in streams:
                    if not streams[fd].receive():
                        self._gone(outputs)
                elif fd == control:
                    result = self._control() or result
                    if self.died is not None:
                        self._gone(outputs)
                elif server and fd in server.fds:
                    server.handle(fd)
                elif source:
                    source.handle(fd, event)
        return result

    def _control(self) -> Result | None:
        try:
            data = self.control.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self.died = -1
            return None
        try:
            for kind, payload in self._decoder.feed(data):
                if kind == frames.RESULT:
                    return Result(payload)
                found = frames.fields(payload)
                if kind == frames.REFUSED:
                    why = frames.text(found[frames.F_TEXT][0])
                    raise MachineError(f"the VM could not be made ready: {why}", hint="the script did not run")
                if kind == frames.DIED:
                    self.died = frames.integer(found[frames.F_EXIT][0])
        except (frames.FrameError, KeyError) as error:
            raise ProtocolError(f"the guest sent no valid frame: {error}") from error
        return None

    def _gone(self, outputs: list[Stream]) -> None:
        # The interpreter or the whole VM is gone: what it printed before is on its way or here.
        for stream in outputs:
            poller = select.poll()
            poller.register(stream.socket.fileno(), select.POLLIN)
            while poller.poll(200 if self.died is None or self.died < 0 else 50) and stream.receive():
                pass
            stream.flush()
        if self.died is not None and self.died >= 0:
            raise OutcomeUnknown(
                f"the script ended its interpreter ({describe_status(self.died)})", hint="it ran, but not to its end"
            )
        raise OutcomeUnknown("the VM ended while the script ran", hint="the script may or may not have done its work")


def describe_status(status: int) -> str:
    """A shell's exit status in words."""
    return f"killed by signal {status - 128}" if status > 128 else f"exit status {status}"


class _Input:
    """Passes the caller's stdin on, at the pace at which the guest takes it; at its end, closes the channel."""

    def __init__(self, stdin: tuple[int, _socket.socket], poller: select.poll) -> None:
        self._fd, self._socket = stdin
        self._out = self._socket.fileno()
        self._poller = poller
        self._data = b""
        self._socket.setblocking(False)
        try:
            poller.register(self._fd, select.POLLIN)
        except OSError:
            self._close()

    def handle(self, fd: int, event: int) -> None:
        """Go on after an event on one of our two descriptors."""
        if fd == self._fd:
            try:
                self._data = os.read(self._fd, 65536)
            except BlockingIOError:
                # Another reader has had it.
                return
            except OSError:
                self._data = b""
            self._poller.unregister(self._fd)
            if not self._data:
                self._close()
                return
            self._poller.register(self._out, select.POLLOUT)
            return
        try:
            self._data = self._data[self._socket.send(self._data) :]
        except BlockingIOError:
            return
        except OSError:
            self._poller.unregister(self._out)
            return
        if not self._data:
            self._poller.unregister(self._out)
            self._poller.register(self._fd, select.POLLIN)

    def _close(self) -> None:
        # QEMU tells the guest that the port's other side is closed: read() returns 0 there.
        try:
            self._socket.shutdown(1)
        except OSError:
            pass


class _Files:
    """Waits for the guest to touch a file, starts the server that serves it, and then for that to end."""

    def __init__(self, files: Files, poller: select.poll, *, now: bool) -> None:
        self._socket, self._start = files
        self._poller = poller
        self.fds = {self._socket.fileno()}
        if now:
            self._serve()
        else:
            poller.register(self._socket.fileno(), select.POLLIN)

    def _serve(self) -> None:
        pidfd = self._start()
        self.fds.add(pidfd)
        self._poller.register(pidfd, select.POLLIN)

    def handle(self, fd: int) -> None:
        """Go on after an event on one of our descriptors."""
        self._poller.unregister(fd)
        if fd == self._socket.fileno():
            if not self._socket.recv(1, 2):  # MSG_PEEK
                return
            self._serve()
            return
        # Without a server the guest would wait for ever: once the channel is closed, its kernel fails every request. What it is
        # writing at this moment it must get rid of first.
        try:
            while self._socket.recv(1 << 20, 0x40):  # MSG_DONTWAIT
                pass
        except OSError:
            pass
        try:
            self._socket.shutdown(2)
        except OSError:
            pass
