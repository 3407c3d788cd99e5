"""The runner: lives in the Deephaven server's Python process, waits for one request, runs it, reports.

Guest code: standard library and Deephaven only. It is started by `init`, starts the server, warms it up, frees what it
can and says HELLO; the host freezes the VM while it is blocked in the read of the request. Every restored VM goes
on from that read.

The way from that read to the script is the hot path: under TCG each piece of code that is executed for the first time
after a restore costs its translation, so it is kept short and imports nothing. Hence objects that are made before the freeze
and filled after it, no keyword arguments, and no loops over what is mostly empty; docs/performance.md has the counts.
"""

from __future__ import annotations

import _socket
import builtins
import fcntl
import gc
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
import types
from _signal import signal as _set_handler
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..wire import frames
from . import exchange, outputs, preview, reseed, script, shares, stdio

if TYPE_CHECKING:
    from . import vsock, warmup

RUN_DIR = "/run/dhg"
REHEARSALS = 20
MAX_READ = 1 << 20
#: How long setting the clock may take, and how often it is tried: the code for it has to be translated the first time, 3 ms.
SET_WITHIN_NS, SET_TRIES = 6_000_000, 5

# linux/random.h: _IO('R', 0x07).
RNDRESEEDCRNG = 0x5207
# linux/fcntl.h, missing in the module: F_SETOWN_EX and its F_OWNER_TID.
F_SETOWN_EX = 15
# Those of `signal` are enums, and its functions make enums of what they return.
SIGIO, SIG_IGN = 29, 1
F_OWNER_TID = 0


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
    data = os.read(fd, size if size < MAX_READ else MAX_READ)
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
        self.interrupted = False
        self.names: dict[str, Any] = {}
        self.finder: preview.Finder | None = None
        self.cells = reseed.Cells()
        self.jvm: reseed.Jvm | None = None
        #: The channel of the script's stdin; /dev/null takes its place where the request brings none.
        self.stdin = 0
        #: The channels of the script's stdout and stderr, whatever it does to 1 and 2.
        self.ends = (1, 2)
        if clone:
            self._urandom = os.open("/dev/urandom", os.O_RDWR)
            self._machine_id = memoryview(map_machine_id())[:32]
        #: Makes the channels anew where they were lost before a request came; gets and returns the control channel's descriptor.
        self.meet: Callable[[int], int] | None = None
        self.arrange: Any = None

    def own_main(self) -> None:
        """Give the script a `__main__` of its own, as the interpreter makes it."""
        module = types.ModuleType("__main__")
        self.names = vars(module)
        self.names.update(__builtins__=builtins, __annotations__={})
        sys.modules["__main__"] = module
        self._request = exchange.Request()
        self._script = script.Script(b"", "", (), self.names)
        self._names_before = len(self.names)

    def wake(self, request: exchange.Request) -> None:
        """Make this clone true and unlike every other: clock, kernel RNG, names, the PRNGs of Python, NumPy, the JVM."""
        self.set_clock(request.time_ns, request.base_ns)
        # Mixed in, and then the generator is made anew from it (random(4), Linux 6.1: drivers/char/random.c).
        os.write(self._urandom, request.entropy)
        fcntl.ioctl(self._urandom, RNDRESEEDCRNG)
        self._machine_id[:] = request.machine_id
        _socket.sethostname(request.hostname)
        self.cells.overwrite()
        if request.mounts or request.flags & frames.FLAG_NO_WORKSPACE:
            self.arrange(request.mounts, not request.flags & frames.FLAG_NO_WORKSPACE)

    def set_clock(self, time_ns: int, base_ns: int) -> None:
        """Set the clock, which was at `time_ns` when the monotonic clock was at `base_ns` (0: is at `time_ns` now)."""
        # Both clocks ran on since the resume, at the same pace: how long the request took does not matter.
        began = time.monotonic_ns()
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns + (began - base_ns if base_ns else 0))
        # Where many VMs share few CPUs one may lose its CPU in between, and be late by that.
        if time.monotonic_ns() - began > SET_WITHIN_NS and base_ns:
            self._set_again(time_ns, base_ns)

    def _set_again(self, time_ns: int, base_ns: int) -> None:
        for _ in range(SET_TRIES - 1):
            began = time.monotonic_ns()
            time.clock_settime_ns(time.CLOCK_REALTIME, time_ns + began - base_ns)
            if time.monotonic_ns() - began <= SET_WITHIN_NS:
                break

    def prepare_interrupt(self) -> None:
        """Have whatever the host sends on the control channel interrupt this thread, from `watch_for_interrupt` on.

        By signal and not by a thread that reads: it costs nothing until it happens, and ends a system call that blocks.
        """
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fcntl.fcntl(self.control, F_SETOWN_EX, struct.pack("ii", F_OWNER_TID, threading.get_native_id()))
        fcntl.fcntl(self.control, fcntl.F_SETFL, fcntl.fcntl(self.control, fcntl.F_GETFL) | os.O_ASYNC)

    def use(self, control: int) -> None:
        """Go over to another control channel."""
        self.control = control
        self.prepare_interrupt()

    def watch_for_interrupt(self) -> None:
        """From now on an INTERRUPT interrupts the thread that called `prepare_interrupt`."""
        _set_handler(SIGIO, self._interrupted)

    def _interrupted(self, *_: object) -> None:
        if not select.select([self.control], [], [], 0)[0]:
            return
        data = os.read(self.control, 4096)
        # The host says it more than once, see NUDGE_S there; a script is interrupted once.
        if self.interrupted or len(data) < frames.HEAD_SIZE:
            return
        if frames.head(data)[0] == frames.INTERRUPT:
            self.interrupted = True
            # Not KeyboardInterrupt at once: a script may have a handler of its own.
            signal.raise_signal(signal.SIGINT)

    def run(self, request: exchange.Request) -> tuple[script.Outcome, list[str]]:
        """Run the script, show its tables, write its outputs; its outcome and, if asked for, the tables as JSON."""
        if request.environ:
            exchange.set_environ(request)
        if request.flags & frames.FLAG_STDIN:
            os.dup2(self.stdin, 0)
        if request.folder is not None:
            sys.path[0] = request.folder
        elif not self.clone and request.filename[:1] != "<":
            sys.path[0] = os.path.dirname(os.path.abspath(request.filename))
        out = sys.stdout
        ready = self._script
        ready.source = request.source
        ready.filename = request.filename
        ready.args = request.args
        ready.file = request.file
        outcome = ready.run()
        tables = exchange.show_tables(request, outcome, self.finder, self.names, out, self.ends[0])
        if request.outputs and outcome.exit_code == 0:
            outcome.output_error = outputs.write(self.names, request.outputs)
        # Files of the VM's own go with it. Most scripts leave no name behind.
        files = not self.clone or request.flags & frames.FLAG_WRITABLE != 0
        if ready.last and (files or len(self.names) > self._names_before + (ready.filename[:1] != "<")):
            ready.finish(files=files)
        return outcome, tables

    def rehearse(self) -> None:
        """Go the way of a request some times, with output and clock as they would be in a clone.

        After it all code on that way is in memory, and specialized by the interpreter (PEP 659), which it does after eight calls.
        """
        out, err, null = os.dup(1), os.dup(2), os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            for _ in range(REHEARSALS):
                request = self._request
                request.decode(rehearsal())
                self.wake(request)
                outcome, tables = self.run(request)
                if outcome.exit_code:
                    raise RuntimeError(f"the rehearsal failed: {outcome.error}")
                exchange.result(outcome, tables, (0, 0, 0))
                self.own_main()
        finally:
            for fd, number in ((out, 1), (err, 2)):
                os.dup2(fd, number, inheritable=True)
                os.close(fd)
            os.close(null)

    def _next_frame(self) -> tuple[int, bytes]:
        """The frame that is no question about the clock; those are answered."""
        kind, payload = read_frame(self.control)
        while kind == frames.CLOCK:
            answer = frames.field(frames.F_BASE_NS, time.monotonic_ns())
            stdio.write_all(self.control, frames.frame(frames.CLOCK, answer))
            kind, payload = read_frame(self.control)
        return kind, payload

    def serve(self) -> None:
        """Wait for the request, run it, report. Returns when the result is with the host."""
        while True:
            try:
                kind, payload = self._next_frame()
                break
            except (EOFError, ConnectionError):
                if self.meet is None:
                    raise
                self.use(self.meet(self.control))
        self._answer(kind, payload)

    def be_rehearsed(self) -> None:
        """Run what the host sends as it is run in a clone, until it sends PAUSE. What it takes has been translated then."""
        while True:
            kind, payload = self._next_frame()
            if kind == frames.PAUSE:
                return
            self._answer(kind, payload)
            self.own_main()

    def _answer(self, kind: int, payload: bytes) -> None:
        """Run one request and report."""
        woken = time.monotonic_ns()
        if kind != frames.REQUEST:
            raise frames.FrameError(f"kind {kind} instead of a request")
        request = self._request
        request.decode(payload)
        if self.clone:
            try:
                self.wake(request)
            except BaseException as error:
                why = f"{type(error).__name__}: {error}"
                stdio.write_all(self.control, frames.frame(frames.REFUSED, frames.field(frames.F_TEXT, why)))
                return
        self.watch_for_interrupt()
        released = time.monotonic_ns()
        self._script.last = True
        try:
            outcome, tables = self.run(request)
        except BaseException as error:
            # Ctrl+C while its tables are shown, or something that nobody has thought of: it has run, and there is a report.
            outcome, tables = self._script.failed(error), []
        # A second Ctrl+C must not cut the report short.
        _set_handler(SIGIO, SIG_IGN)
        stdio.write_all(self.ends[0], request.end_mark)
        stdio.write_all(self.ends[1], request.end_mark)
        done = time.monotonic_ns()
        times = (woken - request.base_ns if request.base_ns else 0, released - woken, done - released)
        stdio.write_all(self.control, exchange.result(outcome, tables, times))


def rehearsal() -> bytes:
    """The payload of a request that prints a line, as the host makes it."""
    source = b"print('rehearsal')"
    flags = frames.FLAG_TABLES | frames.FLAG_TABLE_META
    times = time.time_ns(), time.monotonic_ns()
    names = b"dhg-rehearse", b"0" * 32
    head = frames.REQUEST_HEAD.pack(*times, flags, 10, len(source), 0, 0, 0, os.urandom(64), *names, bytes(16))
    return head + source


def log(control: int, text: str) -> None:
    """Tell the host what the start is at."""
    stdio.write_all(control, frames.frame(frames.LOG, frames.field(frames.F_TEXT, text)))


def hello(versions: dict[str, str]) -> bytes:
    """The frame that says: ready for the request."""
    payload = frames.field(frames.F_PROTOCOL, frames.PROTOCOL)
    for name, value in versions.items():
        payload += frames.field(frames.F_VERSIONS, f"{name}={value}")
    return frames.frame(frames.HELLO, payload)


def vsock_channels() -> vsock.Channels | None:
    """The channels under Firecracker, None under QEMU. Forks there, and returns in the child."""
    with open("/proc/cmdline") as file:
        if "dhg.channels=vsock" not in file.read().split():
            return None
    from . import vsock

    return vsock.Channels(vsock.keep(), hello({}))


def attach_ports(there: bool) -> tuple[int, tuple[int, int]]:
    """Make the script's streams: over the ports that `init` has linked, or where the channels come later over nothing.

    What `stdio.attach` returns.
    """
    names = [f"{RUN_DIR}/{name}" if there else "/dev/null" for name in ("stdin", "stdout", "stderr")]
    return stdio.attach(
        *(os.open(name, flags) for name, flags in zip(names, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True))
    )


def main_vm() -> None:
    """In a VM: start the server, warm up, wait to be frozen, run one request, wait to be killed."""
    channels = vsock_channels()
    control = os.open(f"{RUN_DIR}/control", os.O_RDWR) if channels is None else channels.prepare()
    from . import warmup

    # A script's `import dhg` is its own affair.
    sys.path.remove(f"{RUN_DIR}/lib")
    serve_vm(control, channels, warmup.warm_up(lambda text: log(control, text)))


def serve_vm(control: int, channels: vsock.Channels | None, warm: warmup.Warm) -> None:
    """In a VM, once what `warm` has is warmed up: the rest of `main_vm`."""
    from . import jvm, memory, quiet, warmup

    runner = Runner(control, clone=True)
    runner.own_main()
    runner.finder, runner.jvm = warm.finder, warm.jvm
    if warm.cells is not None:
        runner.cells = warm.cells
    log(control, "rehearsal")
    runner.stdin, runner.ends = attach_ports(channels is None)
    runner.prepare_interrupt()
    script.settle()
    # What Python has first for -c and -: the working directory, which is /workspace (see `init`).
    sys.path.insert(0, "")
    reseed.python(runner.cells)
    runner.rehearse()
    greeting = hello(warm.versions)
    emulated = channels is None and jvm.is_emulated()
    runner.arrange = shares.ready()
    gc.collect()
    gc.freeze()
    with open(f"{RUN_DIR}/frozen", "w"):
        pass
    log(control, "giving memory back")
    if runner.jvm is not None and warm.cells is None:
        memory.compact_java()
    memory.trim()
    memory.drop_caches()
    if runner.jvm is not None:
        log(control, "random generators")
        if warm.cells is None:
            memory.collect_java()
            runner.jvm.find(runner.cells)
        runner.jvm.check()
        warmup.before_first_query()
    if emulated:
        # Under software emulation QEMU goes on as another process now, and keeps what it translates (the host's
        # engine/checkpoint.py). Of files only those pages are in memory then that the rehearsal uses.
        memory.release_files()
        memory.drop_caches()
        memory.read_server()
        memory.populate(warm.objects)
        stdio.write_all(control, greeting)
        runner.be_rehearsed()
        if runner.jvm is not None:
            warmup.compile_late(lambda text: log(control, text))
            memory.clear_young()
        memory.trim()
        memory.drop_caches()
        # Once more: a file's page that was dropped and read again lies elsewhere, and is to be translated anew.
        stdio.write_all(control, greeting)
        runner.be_rehearsed()
        if runner.jvm is not None:
            runner.jvm.check()
            # The rehearsal's queries have used up the one above.
            warmup.before_first_query()
    memory.read_around()
    reseed.forget()
    log(control, "waiting for a quiet moment")
    # So that it is not a clone that comes to the number of new objects at which Python looks for garbage.
    gc.collect()
    gc.freeze()
    memory.leave_room()
    quiet.wait()
    stdio.write_all(control, greeting)
    if channels is not None:
        # Frozen in there. The connection of the preparing host is left open: closing it would make the VM busy just now.
        channels.stdin, channels.ends, runner.meet = runner.stdin, runner.ends, channels.meet
        runner.use(channels.meet(-1))
    runner.serve()
    # The host kills the VM as soon as it has the result; whatever the script left running may go on until then.
    threading.Event().wait()


def map_machine_id() -> mmap.mmap:
    """The machine id, 32 hexadecimal digits and a newline, to be written through memory: a system call would cost a clone more."""
    with open("/etc/machine-id", "wb+") as file:
        file.write(b"0" * 32 + b"\n")
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        mapped = mmap.mmap(file.fileno(), 0)
    mapped[:32] = b"0" * 32
    return mapped


def main_embedded(control: int, stdin: int, stdout: int, stderr: int) -> None:
    """In a process of the host's: start the server, run one request, end."""
    from . import jvm

    runner = Runner(control, clone=False)
    runner.own_main()
    versions = jvm.start_server(lambda text: log(control, text), jvm.JVM_ARGS, image=False)
    runner.finder = preview.Finder()
    runner.stdin, runner.ends = stdio.attach(stdin, stdout, stderr)
    runner.prepare_interrupt()
    script.settle()
    gc.freeze()
    stdio.write_all(control, hello(versions))
    runner.serve()
    # Past the JVM's and the server's own exit handlers: nothing of theirs is needed any more, and some take seconds.
    os._exit(0)
