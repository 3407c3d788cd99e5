"""The runner: lives in the Deephaven server's Python process, waits for one request, runs it, reports.

Guest code: standard library and Deephaven only. It is started by `init`, starts the server, warms it up, frees what it
can and says HELLO; the host freezes the VM while it is blocked in the read of the request. Every restored VM goes
on from that read.

The way from that read to the script is the hot path: under TCG each piece of code that is executed for the first time
after a restore costs its translation, so it is kept short and imports nothing.
"""

from __future__ import annotations

import _socket
import fcntl
import gc
import os
import signal
import struct
import sys
import threading
import time
import types
from typing import Any

from ..wire import frames
from . import outputs, preview, script, shares, stdio

RUN_DIR = "/run/dhg"

# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
# linux/fcntl.h, missing in the module: F_SETOWN_EX and its F_OWNER_TID.
F_SETOWN_EX = 15
F_OWNER_TID = 0


class Request:
    """A decoded REQUEST."""

    __slots__ = (
        "args",
        "base_ns",
        "end_mark",
        "entropy",
        "environ",
        "file",
        "filename",
        "flags",
        "folder",
        "mounts",
        "outputs",
        "rows",
        "source",
        "time_ns",
    )

    def __init__(self, payload: bytes) -> None:
        found = frames.fields(payload)
        self.source = found[frames.F_SOURCE][0]
        self.filename = frames.text(found[frames.F_FILENAME][0])
        self.args = [frames.text(value) for value in found.get(frames.F_ARG, ())]
        self.environ = [frames.text(value) for value in found.get(frames.F_ENV, ())]
        self.time_ns = frames.integer(found[frames.F_TIME_NS][0])
        base = found.get(frames.F_BASE_NS)
        self.base_ns = frames.integer(base[0]) if base else None
        self.entropy = found[frames.F_ENTROPY][0]
        self.end_mark = found[frames.F_END_MARK][0]
        self.flags = frames.integer(found[frames.F_FLAGS][0])
        self.rows = frames.integer(found[frames.F_ROWS][0])
        self.file, self.folder = [
            frames.text(found[key][0]) if key in found else None for key in (frames.F_FILE, frames.F_FOLDER)
        ]
        self.mounts = [frames.text(value) for value in found.get(frames.F_MOUNT, ())]
        self.outputs = [frames.text(value) for value in found.get(frames.F_OUTPUT, ())]


def read_frame(fd: int) -> tuple[int, bytes]:
    """The next frame from `fd`; blocks."""
    data = _more(fd, 65536)
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


class Runner:
    """Holds what is prepared before the freeze, so that little is left to do after it.

    `clone` says that this is a VM restored from a snapshot, which has to be told the time and given entropy; otherwise the
    runner lives in a process of the host's.
    """

    def __init__(self, control: int, *, clone: bool) -> None:
        self.control = control
        self.clone = clone
        self.urandom = os.open("/dev/urandom", os.O_RDWR) if clone else -1
        self.machine_id = os.open("/etc/machine-id", os.O_WRONLY | os.O_CREAT, 0o444) if clone else -1
        self.interrupted = False
        self.names: dict[str, Any] = {}
        self.reseeders: list[Any] = []
        self.finder: preview.Finder | None = None
        self.arrange: Any = None

    def own_main(self) -> None:
        """Give the script a `__main__` of its own, as the interpreter makes it."""
        module = types.ModuleType("__main__")
        self.names = vars(module)
        self.names.update(__builtins__=__builtins__, __annotations__={})
        sys.modules["__main__"] = module

    def wake(self, request: Request) -> None:
        """Make this clone true and unlike every other: clock, kernel RNG, names, the PRNGs of Python, NumPy, the JVM."""
        now = request.time_ns
        if request.base_ns is not None:
            # Both clocks ran on since the resume, at the same pace: how long the request took does not matter.
            now += time.monotonic_ns() - request.base_ns
        time.clock_settime_ns(time.CLOCK_REALTIME, now)
        entropy = request.entropy
        fcntl.ioctl(self.urandom, RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(self.urandom, RNDRESEEDCRNG)
        name = os.urandom(16).hex()
        os.pwrite(self.machine_id, f"{name}\n".encode(), 0)
        _socket.sethostname("dhg-" + name[:8])
        for reseed in self.reseeders:
            reseed()
        if request.mounts or request.flags & frames.FLAG_NO_WORKSPACE:
            self.arrange(request.mounts, not request.flags & frames.FLAG_NO_WORKSPACE)

    def watch_for_interrupt(self) -> None:
        """From now on whatever the host sends on the control channel interrupts the main thread.

        By signal and not by a thread that reads: it costs nothing until it happens, and ends a system call that blocks.
        """
        signal.signal(signal.SIGIO, self._interrupted)
        fcntl.fcntl(self.control, F_SETOWN_EX, struct.pack("ii", F_OWNER_TID, threading.get_native_id()))
        fcntl.fcntl(self.control, fcntl.F_SETFL, fcntl.fcntl(self.control, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)

    def _interrupted(self, *_: object) -> None:
        try:
            data = os.read(self.control, 4096)
        except OSError:
            return
        # The host says it more than once, see NUDGE_S there; a script is interrupted once.
        if self.interrupted or len(data) < frames.HEAD_SIZE:
            return
        if frames.head(data)[0] == frames.INTERRUPT:
            self.interrupted = True
            # Not KeyboardInterrupt at once: a script may have a handler of its own.
            signal.raise_signal(signal.SIGINT)

    def run(self, request: Request) -> tuple[script.Outcome, list[str]]:
        """Run the script, show its tables, write its outputs; its outcome and, if asked for, the tables as JSON."""
        for item in request.environ:
            name, _, value = item.partition("=")
            os.environ[name] = value
        if not request.flags & frames.FLAG_STDIN:
            stdio.no_input()
        if request.folder is not None:
            sys.path[0] = request.folder
        elif not self.clone and request.filename[:1] != "<":
            sys.path[0] = os.path.dirname(os.path.abspath(request.filename))
        out = sys.stdout
        outcome = script.Script(request.source, request.filename, request.args, self.names, file=request.file).run()
        tables: list[str] = []
        if request.flags & frames.FLAG_TABLES and not outcome.raised and self.finder is not None:
            meta, as_json = bool(request.flags & frames.FLAG_TABLE_META), bool(request.flags & frames.FLAG_JSON)
            for text, data in self.finder.texts_and_data(self.names, request.rows, meta=meta, data=as_json):
                if data is not None:
                    tables.append(data)
                elif not as_json:
                    out.write(text)
            out.flush()
        if request.outputs and outcome.exit_code == 0:
            outcome.output_error = outputs.write(self.names, request.outputs)
        return outcome, tables

    def serve(self) -> None:
        """Wait for the request, run it, report. Returns when the result is with the host."""
        kind, payload = read_frame(self.control)
        woken = time.monotonic_ns()
        if kind != frames.REQUEST:
            raise frames.FrameError(f"kind {kind} instead of a request")
        request = Request(payload)
        if self.clone:
            try:
                self.wake(request)
            except BaseException as error:
                why = f"{type(error).__name__}: {error}"
                stdio.write_all(self.control, frames.frame(frames.REFUSED, frames.field(frames.F_TEXT, why)))
                return
        self.watch_for_interrupt()
        released = time.monotonic_ns()
        outcome, tables = self.run(request)
        # A second Ctrl+C must not cut the report short.
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        os.set_blocking(self.control, True)
        stdio.write_all(1, request.end_mark)
        stdio.write_all(2, request.end_mark)
        done = time.monotonic_ns()
        stdio.write_all(self.control, result(outcome, tables, released - woken, done - released))


def result(outcome: script.Outcome, tables: list[str], ready_ns: int, script_ns: int) -> bytes:
    """The RESULT frame; tables that do not fit are left out."""
    payload = frames.field(frames.F_EXIT, outcome.exit_code)
    payload += frames.field(frames.F_READY_NS, ready_ns) + frames.field(frames.F_SCRIPT_NS, script_ns)
    if outcome.result_repr is not None:
        payload += frames.field(frames.F_REPR, outcome.result_repr)
    if outcome.error is not None:
        for key, text in zip(
            (frames.F_ERROR_TYPE, frames.F_ERROR_MESSAGE, frames.F_ERROR_TRACEBACK), outcome.error, strict=True
        ):
            payload += frames.field(key, text)
    if outcome.output_error is not None:
        payload += frames.field(frames.F_OUTPUT_ERROR, outcome.output_error)
    for table in tables:
        if len(payload) + len(table) < frames.MAX_PAYLOAD // 4:
            payload += frames.field(frames.F_TABLE, table)
    return frames.frame(frames.RESULT, payload)


def log(control: int, text: str) -> None:
    """Tell the host what the start is at."""
    stdio.write_all(control, frames.frame(frames.LOG, frames.field(frames.F_TEXT, text)))


def hello(versions: dict[str, str]) -> bytes:
    """The frame that says: ready for the request."""
    payload = frames.field(frames.F_PROTOCOL, frames.PROTOCOL)
    for name, value in versions.items():
        payload += frames.field(frames.F_VERSIONS, f"{name}={value}")
    return frames.frame(frames.HELLO, payload)


def main_vm() -> None:
    """In a VM: start the server, warm up, wait to be frozen, run one request, wait to be killed."""
    control = os.open(f"{RUN_DIR}/control", os.O_RDWR)
    from . import warmup

    # A script's `import dhg` is its own affair.
    sys.path.remove(f"{RUN_DIR}/lib")
    runner = Runner(control, clone=True)
    runner.own_main()
    versions = warmup.warm_up(runner, lambda text: log(control, text))
    ports = (f"{RUN_DIR}/{name}" for name in ("stdin", "stdout", "stderr"))
    stdio.attach(
        *(os.open(port, flags) for port, flags in zip(ports, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True))
    )
    script.settle()
    runner.arrange = shares.ready()
    # What Python has first for -c and -: the working directory, which is /workspace (see `init`).
    sys.path.insert(0, "")
    gc.collect()
    gc.freeze()
    with open(f"{RUN_DIR}/frozen", "w"):
        pass
    warmup.shrink()
    stdio.write_all(control, hello(versions))
    runner.serve()
    # The host kills the VM as soon as it has the result; whatever the script left running may go on until then.
    threading.Event().wait()


def main_embedded(control: int, stdin: int, stdout: int, stderr: int) -> None:
    """In a process of the host's: start the server, run one request, end."""
    from . import warmup

    runner = Runner(control, clone=False)
    runner.own_main()
    versions = warmup.start_server(lambda text: log(control, text), warmup.JVM_ARGS)
    runner.finder = preview.Finder()
    stdio.attach(stdin, stdout, stderr)
    script.settle()
    stdio.write_all(control, hello(versions))
    runner.serve()
    # Past the JVM's and the server's own exit handlers: nothing of theirs is needed any more, and some take seconds.
    os._exit(0)
