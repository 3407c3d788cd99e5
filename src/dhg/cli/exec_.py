"""`dhg exec`: run a script. The hot path."""

from __future__ import annotations

import _signal  # not `signal`, which builds enums at import
import os
import sys
import time

from .. import config, machine, proc
from ..errors import DeadlineExceeded, HostError, UsageError
from ..wire import frames
from .options import Option, Values, help_text, parse, positive_integer, positive_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .. import embedded, remote
    from ..wire import client
    from . import sharing

    #: What a script can run in. Each has `run`, `interrupt`, `usage`, `close`, and says what it is.
    Place = machine.Machine | embedded.Embedded | remote.Remote

OPTIONS = [
    Option("-c", "CODE", "the script itself", empty=True),
    Option("--vm", None, "run in a microVM of its own, restored from a snapshot"),
    Option("--version", "V", "Deephaven version (default: DHG_VERSION, or the newest snapshot)"),
    Option("--env", "NAME[=VALUE]", "pass an environment variable; may be repeated", repeat=True),
    Option("--rw", None, "the script may write to the working directory, which it has as /workspace"),
    Option("--mount", "HOST[:GUEST][:rw]", "share another directory, too; may be repeated", repeat=True),
    Option("--no-workspace", None, "do not share the working directory"),
    Option("--output", "NAME=FILE", "write a table to a .parquet, .csv or .arrow file; may be repeated", repeat=True),
    Option("--timeout", "S", "end the run S seconds after the command began (exit 3)"),
    Option("--rows", "N", "rows of each table that the script leaves (default 10)"),
    Option("--no-show-tables", None, "do not show the tables that the script leaves (--no-table-meta: without types)"),
    Option("--json", None, "one JSON object on stdout instead: outcome, output, error, tables"),
    Option("-v, --verbose", None, "show the phases in ms on stderr"),
    Option("-q, --quiet", None, "no notes of dhg's own on stderr, only errors"),
    Option("--debug", None, "show Python tracebacks of dhg's own errors, and the VM's command"),
    Option("-h, --help", None, "show this help"),
    # In a line of MORE.
    Option("--no-table-meta", None, ""),
    Option("--accel", "kvm|tcg", ""),
    Option("--engine", "qemu|firecracker", ""),
    Option("--host", "HOST", ""),
    Option("--port", "N", ""),
    Option("--tls", None, ""),
    Option("--tls-ca", "FILE", ""),
    Option("--tls-cert", "FILE", ""),
    Option("--tls-key", "FILE", ""),
    Option("--auth-type", "TYPE", ""),
    Option("--auth-token", "TOKEN", ""),
]

REMOTE_ONLY = ("port", "tls", "tls_ca", "tls_cert", "tls_key", "auth_type", "auth_token")

USAGE = "usage: dhg exec [--vm] [options] (-c CODE | SCRIPT | -) [ARG...]"

MORE = """\
--engine qemu|firecracker and --accel kvm|tcg say which snapshot. Without --vm the script runs in a Deephaven server of its
own on this host, or in one that is up: --host HOST [--port N] [--auth-type TYPE] [--auth-token TOKEN, or DHG_AUTH_TOKEN]
[--tls] [--tls-ca FILE] [--tls-cert FILE --tls-key FILE].
Exit codes: the script's own; 1 it raised, 2 usage or host problem, 3 timeout, 4 no snapshot, 130 Ctrl+C.

  dhg exec --vm -c "print('hello')"
  dhg exec --vm report.py 2026-01-31
"""

#: What is shared unless the options say more: the working directory, read-only.
WORKSPACE = ((".", "r"),)

#: As many as an array of Java's holds. Who asks for more rows wants all of them.
MAX_ROWS = (1 << 31) - 1

#: How long a script that was interrupted may take to wind up, and how often it is told meanwhile: a signal that comes just
#: before Python enters a system call does not end that call, and under emulation "just before" is a millisecond.
GRACE_S = 2.0
NUDGE_S = 0.1
ITIMER_REAL = 0
# The constants of `stat`.
S_IFMT, S_IFCHR = 0o170000, 0o020000


def main(argv: list[str]) -> int:
    """Run a script; the exit code. Raises `DhgError`."""
    began, entered_cpu_ns = time.monotonic_ns(), time.process_time_ns()
    try:
        values = parse(argv, OPTIONS, verb="exec", stop_at_first=True)
    except UsageError as error:
        if "--json" not in argv:
            raise
        from . import report

        return report.refused(error)
    if values.flag("help"):
        sys.stdout.write(help_text(USAGE, OPTIONS, MORE))
        return 0
    if values.flag("json"):
        from . import report

        return report.main(values)
    run = Run(values)
    with run.start() as vm:
        try:
            result = run.finish(vm, writer(1), writer(2))
        except ReaderGone:
            return 128 + proc.SIGPIPE
        done = time.monotonic_ns()
    for note in run.deliver(vm, result):
        sys.stderr.write(f"{note}\n")
    if values.flag("verbose"):
        _show_phases(entered_cpu_ns, began, done, time.monotonic_ns(), vm)
    return result.exit_code


class Run:
    """One `exec`: what its options say, and the signals that end it. Raises `UsageError` for options that make no sense."""

    __slots__ = ("_deadline", "_environ", "_interrupted", "_plan", "_source", "_values", "flags", "rows")

    def __init__(self, values: Values) -> None:
        self._values = values
        self._interrupted = False
        timeout = values.text("timeout")
        self._deadline = proc.Deadline(positive_number("--timeout", timeout)) if timeout else None
        rows = values.text("rows")
        self.rows = min(positive_integer("--rows", rows), MAX_ROWS) if rows else 10
        self.flags = 0 if values.flag("no_show_tables") else frames.FLAG_TABLES
        if not values.flag("no_table_meta"):
            self.flags |= frames.FLAG_TABLE_META
        self._source = self._open(values)
        self._environ = _environ(values.texts("env"))
        if not values.flag("vm") and "--vm" in self._source.args:
            raise UsageError(
                "--vm stands after the script and would be an argument of it: the script would run on this host",
                hint="put --vm before the script, or -- before the script's arguments",
            )
        self._plan: sharing.Plan | None = None
        if self._source.filename[:1] != "<" or any(
            values.flag(name) for name in ("rw", "mount", "no_workspace", "output")
        ):
            from . import sharing

            self._plan = sharing.Plan(values, self._source.filename)

    def _open(self, values: Values) -> Source:
        deadline = self._deadline
        if deadline is None:
            return Source(values.text("c"), values.rest)

        def alarmed(*_: object) -> None:
            # A FIFO is opened once somebody writes to it.
            _check(deadline, "the script did not run")

        _signal.signal(proc.SIGALRM, alarmed)
        _arm(deadline)
        try:
            return Source(values.text("c"), values.rest)
        finally:
            _signal.setitimer(ITIMER_REAL, 0)

    def start(self) -> Place:
        """Begin to start what the script will run in."""
        _signal.signal(proc.SIGTERM, terminated)
        vm = self._place()
        if self._values.flag("debug"):
            _show_command(vm.command)
        return vm

    def _place(self) -> Place:
        values = self._values
        if values.flag("vm"):
            if values.text("host"):
                raise UsageError("--vm and --host exclude each other")
            accel, engine = values.text("accel"), values.text("engine")
            if accel not in (None, "kvm", "tcg"):
                raise UsageError(f"--accel takes kvm or tcg, not {accel!r}")
            if engine:
                config.check_engine(engine)
            return machine.restore(values.text("version"), engine=engine, accel=accel)
        named = next((name for name in ("accel", "engine") if values.flag(name)), None)
        if named:
            raise UsageError(f"--{named} needs --vm")
        if values.text("version"):
            raise UsageError("--version needs --vm: without it the installed deephaven-server runs, or that of --host")
        if values.text("host"):
            from ..remote import Remote

            return Remote(_server(values))
        named = next((name for name in REMOTE_ONLY if values.flag(name)), None)
        if named:
            raise UsageError(f"--{named.replace('_', '-')} needs --host")
        from ..embedded import Embedded

        return Embedded()

    def finish(self, vm: Place, stdout: client.Sink, stderr: client.Sink) -> client.Result:
        """Run the script in it. Raises `DhgError`, KeyboardInterrupt."""
        from ..wire import client  # the VMM starts meanwhile

        source, deadline, plan = self._source, self._deadline, self._plan
        grace = 0.0

        def interrupted(*_: object) -> None:
            if self._interrupted or not vm.interrupt():
                raise KeyboardInterrupt
            nonlocal grace
            self._interrupted = True
            grace = time.monotonic() + GRACE_S
            _signal.setitimer(ITIMER_REAL, NUDGE_S, NUDGE_S)

        def alarmed(*_: object) -> None:
            # Also ends a write to a reader that does not read.
            if self._interrupted and time.monotonic() < grace:
                vm.interrupt()
                return
            if self._interrupted or deadline is None:
                raise KeyboardInterrupt
            # Its source may still be awaited.
            _check(deadline, "the script was running" if vm.released else "the script did not run")

        _signal.signal(proc.SIGINT, interrupted)
        _signal.signal(proc.SIGALRM, alarmed)
        if deadline is not None:
            _arm(deadline)
        try:
            # The VMM starts while the source is read.
            stdin = 0 if source.leaves_stdin and not _stdin_is_empty() else None
            request = client.Request(
                source.read(),
                source.filename,
                args=source.args,
                environ=self._environ,
                stdin=stdin is not None,
                flags=self.flags,
                rows=self.rows,
            )
            if plan is not None:
                request.flags |= plan.flags
                request.file, request.folder, request.mounts = plan.file, plan.folder, plan.mounts
                request.outputs = plan.open(in_vm=self._values.flag("vm"))
            return vm.run(
                request,
                stdout=stdout,
                stderr=stderr,
                deadline=deadline,
                stdin=stdin,
                shares=WORKSPACE if plan is None else plan.shares,
            )
        except BaseException:
            self.drop()
            raise
        finally:
            _signal.setitimer(ITIMER_REAL, 0)
            _signal.signal(proc.SIGINT, proc.SIG_IGN)

    def deliver(self, vm: Place, result: client.Result) -> list[str]:
        """When the VM is gone: put the outputs in place; what is left to say. Raises `DhgError` if they cannot be."""
        notes = []
        if vm.refused_write and not self._values.flag("quiet"):
            notes.append(
                "hint: the script tried to write to files of this host, which it may only read; see --rw, --mount"
            )
        if vm.files_error:
            notes.append(f"error: this host's files were not to be had: {vm.files_error}")
        outputs = self._plan.outputs if self._plan else None
        if outputs is not None:
            try:
                if result.exit_code == 0:
                    outputs.deliver(next(iter(result.texts(frames.F_OUTPUT_ERROR)), None))
                else:
                    notes.append("hint: the script failed, so no output was written")
            finally:
                self.drop()
        return notes

    def drop(self) -> None:
        """Remove what was prepared for outputs."""
        if self._plan is not None and self._plan.outputs is not None:
            self._plan.outputs.close()


def _arm(deadline: proc.Deadline) -> None:
    """Have SIGALRM come a little after `deadline`, or earlier if that is far off: `_check` sees to that.

    And again: one that comes just before a system call does not end it.
    """
    _signal.setitimer(ITIMER_REAL, min(deadline.left(), proc.LONGEST_WAIT_S) + 0.05, NUDGE_S)


def _check(deadline: proc.Deadline, hint: str) -> None:
    """At a SIGALRM: raise `DeadlineExceeded` if it is time, and wait on if not."""
    if deadline.left():
        _arm(deadline)
        return
    # Once: what is cleaned up on the way must not be interrupted.
    _signal.setitimer(ITIMER_REAL, 0)
    raise DeadlineExceeded(f"timed out after {deadline.timeout_s:g} s", hint=hint)


def _server(values: Values) -> remote.Server:
    from ..remote import Server

    if values.flag("tls_key") != values.flag("tls_cert"):
        raise UsageError("--tls-cert and --tls-key go together")
    port = values.text("port")
    return Server(
        values.text("host") or "",
        positive_integer("--port", port) if port else 10000,
        values.text("auth_type") or "Anonymous",
        values.text("auth_token") or os.environ.get("DHG_AUTH_TOKEN") or "",
        values.flag("tls"),
        values.text("tls_ca"),
        values.text("tls_cert"),
        values.text("tls_key"),
    )


def terminated(number: int, _: object) -> None:
    """The handler of SIGTERM."""
    # Unwinds to the VM's context manager, as Ctrl+C does; twice must not cut that short.
    _signal.signal(number, proc.SIG_IGN)
    raise SystemExit(128 + number)


class Source:
    """Where the script comes from: `-c CODE`, a file, or stdin. Raises `UsageError` if there is none or it cannot be read."""

    __slots__ = ("_code", "_fd", "args", "filename", "leaves_stdin")

    def __init__(self, code: str | None, rest: list[str]) -> None:
        self._code = code
        self._fd = 0
        #: Whether the caller's stdin is still there for the script.
        self.leaves_stdin = True
        if code is not None:
            self.filename, self.args = frames.STRING, tuple(rest)
            return
        if not rest:
            raise UsageError("nothing to run", hint="give a script: -c CODE, a file, or - for stdin")
        self.args = tuple(rest[1:])
        if rest[0] == "-":
            self.filename, self.leaves_stdin = "<stdin>", False
            return
        self.filename = rest[0]
        try:
            self._fd = os.open(self.filename, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"cannot read {self.filename}: {error.strerror}") from None

    def read(self) -> bytes:
        """The script's bytes."""
        if self._code is not None:
            return os.fsencode(self._code)
        parts: list[bytes] = []
        while True:
            try:
                part = os.read(self._fd, 1 << 20)
            except BlockingIOError:
                _wait(self._fd, writing=False)
                continue
            except OSError as error:
                raise UsageError(f"cannot read {self.filename}: {error.strerror}") from None
            if not part:
                return b"".join(parts)
            parts.append(part)


def _stdin_is_empty() -> bool:
    # /dev/null, or nothing at all. Passing that on as a channel that is closed at once would cost the guest some milliseconds.
    try:
        found = os.fstat(0)
    except OSError:
        return True
    return found.st_rdev == os.makedev(1, 3) and found.st_mode & S_IFMT == S_IFCHR


def _environ(items: list[str]) -> tuple[str, ...]:
    pairs = []
    for item in items:
        name, equals, value = item.partition("=")
        if not name:
            raise UsageError(
                f"--env needs a name: {item!r}", hint="--env NAME passes ours on, --env NAME=VALUE sets it"
            )
        if not equals:
            if name not in os.environ:
                raise UsageError(
                    f"--env {name}: there is no such environment variable here", hint=f"--env {name}=VALUE sets it"
                )
            value = os.environ[name]
        pairs.append(f"{name}={value}")
    return tuple(pairs)


class ReaderGone(Exception):
    """Whoever read our output has closed the pipe."""


def writer(fd: int) -> client.Sink:
    """A sink that writes all of it to a descriptor. It raises `ReaderGone`, `HostError`."""

    def write(data: bytes) -> None:
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BrokenPipeError:
                raise ReaderGone from None
            except BlockingIOError:
                _wait(fd, writing=True)
            except OSError as error:
                raise HostError(f"cannot write the script's output: {error.strerror}") from None

    return write


def _wait(fd: int, *, writing: bool) -> None:
    """Wait a second at most for a descriptor that another program which has it, too, has set to O_NONBLOCK.

    Signal handlers may end that, and a signal that came just before it need not wait for long.
    """
    import select

    poller = select.poll()
    poller.register(fd, select.POLLOUT if writing else select.POLLIN)
    poller.poll(1000)


def _show_command(argv: list[str]) -> None:
    import shlex

    sys.stderr.write(f"dhg: {shlex.join(argv)}\n")


def _show_phases(entered_cpu_ns: int, began: int, done: int, ended: int, vm: Place) -> None:
    # What the interpreter did before it came to us is all CPU time, so the process's CPU clock tells it.
    before = max(0.0, entered_cpu_ns / 1e6)
    phases = {
        "interpreter start": before,
        "client": (vm.began_ns - began) / 1e6,
        **vm.phases,
        "close": (ended - done) / 1e6,
    }
    phases["total"] = before + (ended - began) / 1e6
    if why := getattr(vm, "fallback", None):
        sys.stderr.write(f"dhg: the checkpoint was not used: {why}\n")
    sys.stderr.write("".join(f"dhg: {name:<20}{value:8.1f} ms\n" for name, value in phases.items()))
