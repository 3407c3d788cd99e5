"""`dhg exec`: run a script. The hot path."""

from __future__ import annotations

import _signal  # not `signal`, which builds enums at import
import os
import sys
import time

from .. import machine, proc
from ..errors import HostError, UsageError
from ..wire import client
from .options import Option, help_text, parse, positive_number

OPTIONS = [
    Option("-c", "CODE", "the script itself"),
    Option("--vm", None, "run in a microVM of its own, restored from a snapshot"),
    Option("--version", "V", "Deephaven version (default: DHG_VERSION, or the newest snapshot)"),
    Option("--env", "NAME[=VALUE]", "pass an environment variable; may be repeated", repeat=True),
    Option("--timeout", "S", "end the run S seconds after the command began (exit 3)"),
    Option("-v, --verbose", None, "show the phases in ms on stderr"),
    Option("--debug", None, "show Python tracebacks of dhg's own errors, and the VM's command line"),
    Option("-h, --help", None, "show this help"),
]

USAGE = "usage: dhg exec --vm [options] (-c CODE | SCRIPT | -) [ARG...]"

MORE = """\
What the script prints is passed on as it prints it; the exit code is the script's. Other exit codes: 1 the script
raised, 2 usage or host problem, 3 timeout, 4 no such snapshot, 130 Ctrl+C.

examples:
  dhg exec --vm -c "print('hello')"
  dhg exec --vm report.py 2026-01-31
  echo "print(6 * 7)" | dhg exec --vm -
"""


def main(argv: list[str]) -> int:
    """Run a script; the exit code. Raises `DhgError`."""
    began, entered_cpu_ns = time.monotonic_ns(), time.process_time_ns()
    values = parse(argv, OPTIONS, verb="exec", stop_at_first=True)
    if values.flag("help"):
        sys.stdout.write(help_text(USAGE, OPTIONS, MORE))
        return 0
    timeout = values.text("timeout")
    _signal.signal(proc.SIGTERM, _terminated)
    deadline = proc.Deadline(positive_number("--timeout", timeout)) if timeout else None
    if not values.flag("vm"):
        raise UsageError("without --vm there is nothing to run in yet", hint="dhg exec --vm ...")
    source = Source(values.text("c"), values.rest)
    environ = _environ(values.texts("env"))
    verbose = values.flag("verbose")
    with machine.restore(values.text("version")) as vm:
        if values.flag("debug"):
            _show_command(vm.snapshot.argv)
        # The VMM starts while the source is read.
        request = client.Request(
            source.read(), source.filename, args=source.args, environ=environ, stdin=source.leaves_stdin
        )
        try:
            result = vm.run(
                request,
                stdout=_writer(1),
                stderr=_writer(2),
                deadline=deadline,
                stdin=0 if source.leaves_stdin else None,
            )
        except _ReaderGone:
            return 128 + proc.SIGPIPE
        if verbose:
            done = time.monotonic_ns()
    if verbose:
        _show_phases(entered_cpu_ns, began, done, time.monotonic_ns(), vm)
    return result.exit_code


def _terminated(number: int, _: object) -> None:
    # Unwinds to the VM's context manager, as Ctrl+C does; twice must not cut that short.
    _signal.signal(number, 1)
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
            self.filename, self.args = "<string>", tuple(rest)
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
        parts = []
        try:
            while part := os.read(self._fd, 1 << 20):
                parts.append(part)
        except OSError as error:
            raise UsageError(f"cannot read {self.filename}: {error.strerror}") from None
        return b"".join(parts)


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


class _ReaderGone(Exception):
    """Whoever read our output has closed the pipe."""


def _writer(fd: int) -> client.Sink:
    def write(data: bytes) -> None:
        try:
            done = os.write(fd, data)
            while done < len(data):
                data = data[done:]
                done = os.write(fd, data)
        except BrokenPipeError:
            raise _ReaderGone from None
        except OSError as error:
            raise HostError(f"cannot write the script's output: {error.strerror}") from None

    return write


def _show_command(argv: list[str]) -> None:
    import shlex

    sys.stderr.write(f"dhg: {shlex.join(argv)}\n")


def _show_phases(entered_cpu_ns: int, began: int, done: int, ended: int, vm: machine.Machine) -> None:
    # What the interpreter did before it came to us is all CPU time, so the process's CPU clock tells it.
    before = max(0.0, entered_cpu_ns / 1e6)
    phases = {
        "interpreter start": before,
        "client": (vm.began_ns - began) / 1e6,
        **vm.phases,
        "close": (ended - done) / 1e6,
    }
    phases["total"] = before + (ended - began) / 1e6
    sys.stderr.write("".join(f"dhg: {name:<20}{value:8.1f} ms\n" for name, value in phases.items()))
