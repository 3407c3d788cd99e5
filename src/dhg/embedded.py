"""`exec` without a VM: the same runner in a Deephaven server in a process of this host's, over the same channels."""

from __future__ import annotations

import os
import select
import sys
import time

from . import proc
from .errors import DeadlineExceeded, HostError, MachineError, OutcomeUnknown
from .wire import client, frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from .share import start

FD_CONTROL, FD_STDIN, FD_STDOUT, FD_STDERR, FD_LEASH = range(200, 205)
START_TIMEOUT_S = 120.0
MIN_JAVA = 17


def find_java() -> str:
    """A JAVA_HOME of version 17 or newer: from JAVA_HOME, from `java` on the PATH, from /usr/lib/jvm. Raises `HostError`."""
    places = []
    if os.environ.get("JAVA_HOME"):
        places.append(os.environ["JAVA_HOME"])
    on_path = proc.find_program("java")
    if on_path:
        places.append(os.path.dirname(os.path.dirname(os.path.realpath(on_path))))
    try:
        places += sorted((f"/usr/lib/jvm/{name}" for name in os.listdir("/usr/lib/jvm")), reverse=True)
    except OSError:
        pass
    for place in places:
        if java_version(place) >= MIN_JAVA:
            return place
    raise HostError(
        f"no Java {MIN_JAVA} or newer (looked in JAVA_HOME, PATH, /usr/lib/jvm)",
        hint="apt-get install openjdk-17-jre-headless, or run in a VM: dhg exec --vm ...",
    )


def java_version(home: str) -> int:
    """The feature release of the JDK or JRE in `home` (its `release` file), 0 if it is none."""
    try:
        with open(f"{home}/release") as file:
            for line in file:
                name, _, value = line.partition("=")
                if name == "JAVA_VERSION":
                    number = value.strip().strip('"').split(".")
                    return int(number[1] if number[0] == "1" else number[0])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def find_deephaven() -> str:
    """The version of deephaven-server in this interpreter. Raises `HostError` if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version("deephaven-server")
    except metadata.PackageNotFoundError:
        raise HostError(
            "deephaven-server is not installed in this Python",
            hint="pip install 'dhg[embedded]', or run in a VM: dhg exec --vm ...",
        ) from None


class Embedded:
    """A server process that waits for one script. Leaving the context ends it."""

    engine = "embedded"
    acceleration = "none"
    refused_write = False
    files_error = None

    def __init__(self) -> None:
        import _socket

        #: Phases in milliseconds, in order.
        self.phases: dict[str, float] = {}
        self.version = find_deephaven()
        java = find_java()
        self.began_ns = self._clock = time.monotonic_ns()
        pairs = {fd: _socket.socketpair() for fd in (FD_CONTROL, FD_STDIN, FD_STDOUT, FD_STDERR)}
        leash, self._leash = os.pipe2(os.O_CLOEXEC)
        self._log = os.memfd_create("dhg-server-log")
        code = f"from dhg.guest import runner; runner.main_embedded({FD_CONTROL}, {FD_STDIN}, {FD_STDOUT}, {FD_STDERR})"
        self.command = [sys.executable, "-c", code]
        fds = {fd: pair[1].fileno() for fd, pair in pairs.items()}
        try:
            # What the server says while it starts is nobody's output.
            self._process = proc.spawn(
                self.command,
                fds={**fds, FD_LEASH: leash, 1: self._log, 2: self._log},
                env={**os.environ, "JAVA_HOME": java},
            )
            proc.kill_with_us(self._process.pid, leash)
        finally:
            os.close(leash)
            for pair in pairs.values():
                pair[1].close()
        self._sockets: list[_socket.socket] = [pair[0] for pair in pairs.values()]
        control, self._stdin, stdout, stderr = self._sockets
        self._session = client.Session(control, stdout, stderr)
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
        """Wait until the server is up, and run `request` in it; once only. Raises like `Machine.run`.

        `shares` mean nothing here: the files are the host's own.
        """
        self._wait_hello(deadline)
        self._phase("server start")
        source = None if stdin is None or not request.stdin else (stdin, self._stdin)
        try:
            result = self._session.run(request, stdout=stdout, stderr=stderr, deadline=deadline, stdin=source)
        except OutcomeUnknown:
            status = self._process.wait(5.0)
            if status is None:
                raise
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            hint = "it ran, but not to its end"
            raise OutcomeUnknown(f"the script ended its interpreter ({how})", hint=hint, detail=self._said()) from None
        whole = (time.monotonic_ns() - self._clock) / 1e6
        self.phases["script"] = result.script_ns / 1e6
        self.phases["result"] = whole - result.script_ns / 1e6
        return result

    def _wait_hello(self, deadline: proc.Deadline | None) -> None:
        limit = proc.Deadline(START_TIMEOUT_S if deadline is None else min(START_TIMEOUT_S, deadline.left()))
        decoder = frames.Decoder()
        poller = select.poll()
        poller.register(self._sockets[0].fileno(), select.POLLIN)
        while True:
            if not poller.poll(limit.left() * 1000):
                if deadline is not None and deadline.left() == 0.0:
                    raise DeadlineExceeded(f"timed out after {deadline.timeout_s:g} s", hint="the script did not run")
                raise DeadlineExceeded(f"the server was not up within {START_TIMEOUT_S:g} s", detail=self._said())
            try:
                data = self._sockets[0].recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                raise MachineError(
                    "the server ended while it started", hint="the script did not run", detail=self._said()
                )
            if any(kind == frames.HELLO for kind, _ in decoder.feed(data)):
                return

    def _said(self) -> str | None:
        size = os.fstat(self._log).st_size
        return proc.tail(os.pread(self._log, 65536, max(0, size - 65536)).decode("utf-8", "replace")) or None

    def interrupt(self) -> bool:
        """Raise KeyboardInterrupt in the script; False if none runs."""
        return self._session.interrupt()

    @property
    def released(self) -> bool:
        """Whether the script has been handed over: it may have run."""
        return self._session.released

    def usage(self) -> dict[str, int]:
        """What the process has cost so far."""
        return proc.usage(self._process.pid)

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.close()
        os.close(self._leash)
        os.close(self._log)
        for sock in self._sockets:
            sock.close()

    def __enter__(self) -> Embedded:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
