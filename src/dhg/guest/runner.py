"""The runner: lives in the Deephaven server's Python process, waits for one request, runs it, reports.

Guest code: standard library and Deephaven only. It is started by `init`, starts the server, warms it up, frees what it
can and says HELLO; the host freezes the VM while it is blocked in the read of the request. Every restored VM goes
on from that read.

The way from that read to the script is the hot path: under TCG each piece of code that is executed for the first time
after a restore costs its translation, so it is kept short and imports nothing.
"""

from __future__ import annotations

import fcntl
import gc
import io
import os
import struct
import sys
import threading
import time
import types
from typing import Any

import frames

CONTROL = "/run/dhg/control"
STDOUT = "/run/dhg/stdout"
STDERR = "/run/dhg/stderr"
STDIN = "/run/dhg/stdin"

# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


class Request:
    """A decoded REQUEST."""

    __slots__ = ("args", "end_mark", "entropy", "environ", "filename", "flags", "source", "time_ns")

    def __init__(self, payload: bytes) -> None:
        found = frames.fields(payload)
        self.source = found[frames.F_SOURCE][0]
        self.filename = frames.text(found[frames.F_FILENAME][0])
        self.args = [frames.text(value) for value in found.get(frames.F_ARG, ())]
        self.environ = [frames.text(value) for value in found.get(frames.F_ENV, ())]
        self.time_ns = frames.integer(found[frames.F_TIME_NS][0])
        self.entropy = found[frames.F_ENTROPY][0]
        self.end_mark = found[frames.F_END_MARK][0]
        self.flags = frames.integer(found[frames.F_FLAGS][0])


def read_frame(fd: int) -> tuple[int, bytes]:
    """The next frame from `fd`; blocks."""
    data = os.read(fd, 65536)
    while len(data) < frames.HEAD_SIZE:
        data += _more(fd, frames.HEAD_SIZE - len(data))
    kind, size = frames.head(data)
    size += frames.HEAD_SIZE
    if len(data) < size:
        parts, have = [data], len(data)
        while have < size:
            part = _more(fd, size - have)
            parts.append(part)
            have += len(part)
        data = b"".join(parts)
    return kind, data[frames.HEAD_SIZE : size]


def _more(fd: int, size: int) -> bytes:
    data = os.read(fd, min(size, 1 << 20))
    if not data:
        raise EOFError("the host closed the control channel")
    return data


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` to `fd`; blocks while the other side does not read."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Runner:
    """Holds what is prepared before the freeze, so that little is left to do after it."""

    def __init__(self, control: int) -> None:
        self.control = control
        self.urandom = os.open("/dev/urandom", os.O_RDWR)
        self.main_module = sys.modules["__main__"]
        self.main_names = frozenset(vars(self.main_module))
        self.reseeders: list[Any] = []

    def attach_stdio(self) -> None:
        """Put the script's channels on descriptors 0, 1 and 2, of Python, the JVM and every child."""
        for path, fd, flags in ((STDIN, 0, os.O_RDONLY), (STDOUT, 1, os.O_WRONLY), (STDERR, 2, os.O_WRONLY)):
            port = os.open(path, flags)
            os.dup2(port, fd)
            os.close(port)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "rb", closefd=False)))
        sys.stdout = _text_writer(1, "strict")
        sys.stderr = _text_writer(2, "backslashreplace")
        vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)

    def wake(self, request: Request) -> None:
        """Make this clone true and unlike every other: clock, kernel RNG, the PRNGs of Python, NumPy, the JVM."""
        time.clock_settime_ns(time.CLOCK_REALTIME, request.time_ns)
        entropy = request.entropy
        fcntl.ioctl(self.urandom, RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(self.urandom, RNDRESEEDCRNG)
        for reseed in self.reseeders:
            reseed()

    def run(self, request: Request) -> int:
        """Run the script of `request`; its exit status."""
        sys.argv = [request.filename if request.filename != "<string>" else "-c", *request.args]
        for item in request.environ:
            name, _, value = item.partition("=")
            os.environ[name] = value
        if not request.flags & frames.FLAG_STDIN:
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
        names = vars(self.main_module)
        if request.filename != "<string>":
            names["__file__"] = request.filename
        try:
            code = compile(request.source, request.filename, "exec", dont_inherit=True)
            exec(code, names)
        except SystemExit as stop:
            return _exit_status(stop)
        except BaseException as error:
            self.show_exception(error, request)
            return 1
        return 0

    def show_exception(self, error: BaseException, request: Request) -> None:
        """Print the traceback of `error` without the frame of `run`."""
        import linecache
        import traceback

        source = request.source.decode("utf-8", "replace")
        linecache.cache[request.filename] = (len(source), None, source.splitlines(keepends=True), request.filename)
        trace = error.__traceback__
        sys.stdout.flush()
        traceback.print_exception(type(error), error, trace.tb_next if trace else None)

    def finish(self, request: Request) -> None:
        """Wait for the script's threads, flush, and close stdout and stderr with the end mark."""
        current = threading.current_thread()
        for thread in threading.enumerate():
            if thread is not current and not thread.daemon and not isinstance(thread, threading._DummyThread):
                thread.join()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        write_all(1, request.end_mark)
        write_all(2, request.end_mark)

    def serve(self) -> None:
        """Wait for the request, run it, report. Returns when the result is with the host."""
        kind, payload = read_frame(self.control)
        woken = time.monotonic_ns()
        if kind != frames.REQUEST:
            raise frames.FrameError(f"kind {kind} instead of a request")
        request = Request(payload)
        self.wake(request)
        released = time.monotonic_ns()
        status = self.run(request)
        self.finish(request)
        done = time.monotonic_ns()
        result = (
            frames.field(frames.F_EXIT, status)
            + frames.field(frames.F_READY_NS, released - woken)
            + frames.field(frames.F_SCRIPT_NS, done - released)
        )
        write_all(self.control, frames.frame(frames.RESULT, result))


def _text_writer(fd: int, errors: str) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "wb", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw, 65536), encoding="utf-8", errors=errors, line_buffering=True)


def _exit_status(stop: SystemExit) -> int:
    code = stop.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stdout.flush()
    print(code, file=sys.stderr)
    return 1


def log(control: int, text: str) -> None:
    """Tell the host what the warm-up is at."""
    write_all(control, frames.frame(frames.LOG, frames.field(frames.F_TEXT, text)))


def hello(versions: dict[str, str]) -> bytes:
    """The frame that says: warm, waiting."""
    payload = frames.field(frames.F_PROTOCOL, frames.PROTOCOL)
    for name, value in versions.items():
        payload += frames.field(frames.F_VERSIONS, f"{name}={value}")
    data: bytes = frames.frame(frames.HELLO, payload)
    return data


def main() -> None:
    """Start the server, warm up, wait to be frozen, run one request, wait to be killed."""
    main_module = types.ModuleType("__main__")
    main_module.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main_module
    control = os.open(CONTROL, os.O_RDWR)
    import warmup

    runner = Runner(control)
    versions = warmup.warm_up(runner, lambda text: log(control, text))
    runner.attach_stdio()
    gc.collect()
    gc.freeze()
    with open("/run/dhg/frozen", "w"):
        pass
    warmup.shrink()
    write_all(control, hello(versions))
    runner.serve()
    # The host kills the VM as soon as it has the result; whatever the script left running may go on until then.
    threading.Event().wait()
