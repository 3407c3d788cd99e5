"""`exec --host`: the script in a Deephaven server that others run, through pydeephaven.

The server needs nothing of ours: the runner's sources travel with the script, and what it reports comes back as a table of three
texts that is dropped at once. Output comes at the end, there is no stdin, and the server's process goes on whatever
the script did; README.md has the differences.
"""

from __future__ import annotations

import base64
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from . import proc
from .errors import DhgError, HostError, MachineError, OutcomeUnknown, ProtocolError, UsageError
from .wire import client, frames

if TYPE_CHECKING:
    from .share.start import Shares

#: What of this package the server runs, packages first, each after what it imports.
SOURCES = (
    "wire/__init__.py",
    "wire/frames.py",
    "guest/__init__.py",
    "guest/script.py",
    "guest/stdio.py",
    "guest/preview.py",
    "guest/exchange.py",
    "guest/remote.py",
)

# Runs in the server. Only the name of the answer's table is left in its globals, until it has been read.
_BOOTSTRAP = """
def {name}(sources, payload, names):
    import sys, types
    root = {name!r}
    modules = [types.ModuleType(root)]
    for path, text in sources:
        full = root + '.' + path[:-3].replace('/', '.').removesuffix('.__init__')
        module = types.ModuleType(full)
        module.__file__ = '/' + root + '/' + path
        module.__package__ = full if path.endswith('__init__.py') else full.rpartition('.')[0]
        modules.append(module)
    for module in modules:
        module.__path__ = []
        sys.modules[module.__name__] = module
    try:
        for module, (path, text) in zip(modules[1:], sources):
            exec(compile(text, module.__file__, 'exec'), vars(module))
        texts = modules[-1].run(payload, names)
    finally:
        for module in modules:
            sys.modules.pop(module.__name__, None)
    import deephaven
    from deephaven import new_table
    from deephaven.column import string_col
    return new_table([string_col('part', texts + [deephaven.__version__])])
{name} = {name}({sources!r}, {payload!r}, globals())
"""


class Server(NamedTuple):
    """Where the server is and how to get in. `auth_type` is Anonymous, Basic (token `user:password`) or a handler's class name;
    `tls_ca`, `tls_cert`, `tls_key` are paths of PEM files."""

    host: str
    port: int = 10000
    auth_type: str = "Anonymous"
    auth_token: str = ""
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None


class Remote:
    """A session with a server. Leaving the context closes it; a script that still runs there goes on."""

    engine = "remote"
    acceleration = "none"
    refused_write = False
    files_error = None

    def __init__(self, server: Server) -> None:
        try:
            from pydeephaven import DHError, Session
        except ImportError:
            raise HostError(
                "pydeephaven is not installed in this Python",
                hint="pip install 'dhg[remote]', or run in a VM: dhg exec --vm ...",
            ) from None
        self._error: type[Exception] = DHError
        #: The server's Deephaven, known when the script has run.
        self.version: str | None = None
        #: Phases in milliseconds, in order.
        self.phases: dict[str, float] = {}
        #: Whether the script has been handed over: it may have run.
        self.released = False
        self.command = ["pydeephaven", f"{server.host}:{server.port}"]
        self.began_ns = self._clock = time.monotonic_ns()
        pem = [_read(path) for path in (server.tls_ca, server.tls_cert, server.tls_key)]
        try:
            self._session: Any = Session(
                server.host,
                server.port,
                auth_type=server.auth_type,
                auth_token=server.auth_token,
                use_tls=server.tls or any(pem),
                tls_root_certs=pem[0],
                client_cert_chain=pem[1],
                client_private_key=pem[2],
            )
        except DHError as error:
            where = f"{server.host}:{server.port}"
            hint = "is it up there? --tls, --auth-type and --auth-token must be what the server wants"
            raise MachineError(f"no Deephaven session with {where}", hint=hint, detail=_causes(error)) from error
        self._phase("connect")

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
        """Run `request` there. Raises `OutcomeUnknown` if the session breaks, `MachineError` if the server refuses the runner.

        `deadline` is kept by whoever raises `DeadlineExceeded` from a signal handler; gRPC lets those run.
        """
        name = "_dhg_" + os.urandom(6).hex()
        payload = client.encode(request, end_mark=b"", clock=None)[frames.HEAD_SIZE :]
        code = _BOOTSTRAP.format(name=name, sources=_sources(), payload=base64.b64encode(payload).decode())
        self.released = True
        try:
            self._session.run_script(code)
            parts = self._session.open_table(name).to_arrow()["part"].to_pylist()
            self._session.run_script(f"del {name}")
        except self._error as error:
            # A signal handler of ours ended the wait, and pydeephaven wrapped what it raised.
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, (DhgError, KeyboardInterrupt, SystemExit)):
                    raise cause from None
                cause = cause.__cause__
            hint = "the script may or may not have run"
            raise OutcomeUnknown("the server did not run it to its end", hint=hint, detail=_causes(error)) from error
        try:
            out, err, answer = (base64.b64decode(part, validate=True) for part in parts[:3])
            result = client.Result(answer)
            self.version = str(parts[3])
        except (ValueError, KeyError, IndexError, frames.FrameError) as error:
            raise ProtocolError(f"the server sent no valid answer: {error}") from error
        for sink, data in ((stdout, out), (stderr, err)):
            if data:
                sink(data)
        whole = (time.monotonic_ns() - self._clock) / 1e6
        self.phases["script"] = result.script_ns / 1e6
        self.phases["request and result"] = whole - result.script_ns / 1e6
        return result

    def interrupt(self) -> bool:
        """False: a script in somebody else's server cannot be interrupted from here."""
        return False

    def usage(self) -> dict[str, int]:
        """Nothing: what it cost is the server's affair."""
        return {}

    def close(self) -> None:
        """Close the session."""
        try:
            self._session.close()
        except self._error:
            pass

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _sources() -> list[tuple[str, str]]:
    folder = os.path.dirname(os.path.abspath(__file__))
    found = []
    for name in SOURCES:
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            found.append((name, file.read()))
    return found


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _causes(error: BaseException | None) -> str:
    """What an error and those behind it say, one a line."""
    lines: list[str] = []
    while error is not None and len(lines) < 5:
        details = getattr(error, "details", None)
        lines.append(str(details()) if callable(details) else str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(lines)
