"""`dhg exec --json`: one object on stdout, whatever happens. docs/exec.schema.json describes it."""

from __future__ import annotations

import _signal
import json
import time
import traceback
from typing import Any

from .. import proc
from ..errors import DeadlineExceeded, DhgError, HostError, MachineError, OutcomeUnknown, ProtocolError
from ..wire import client, frames
from . import host_error, show_error
from .exec_ import ReaderGone, Run, terminated, writer
from .options import Values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .exec_ import Place

#: How much of stdout, and of stderr, is kept for the report: a script without end must not take all of the host's memory.
MAX_OUTPUT_BYTES = 256 << 20


class Kept:
    """What a script printed. A sink that raises `HostError` for more than MAX_OUTPUT_BYTES; what came before is kept."""

    __slots__ = ("_left", "_name", "_parts")

    def __init__(self, name: str) -> None:
        self._name = name
        self._parts: list[bytes] = []
        self._left = MAX_OUTPUT_BYTES

    def write(self, data: bytes) -> None:
        """Keep `data`."""
        self._parts.append(data[: self._left])
        self._left -= len(data)
        if self._left < 0:
            self._left = 0
            raise HostError(
                f"the script printed more than {MAX_OUTPUT_BYTES >> 20} MiB to {self._name}, which --json keeps in memory",
                hint="run it without --json, or have it print less",
            )

    def note(self, text: str) -> None:
        """Add a line of ours."""
        self._parts.append(f"{text}\n".encode())

    def text(self) -> str:
        """All of it; bytes that are no UTF-8 are replaced."""
        return b"".join(self._parts).decode("utf-8", "replace")


def main(values: Values) -> int:
    """Run the script, print the report; the exit code."""
    began = time.monotonic()
    out, err = Kept("stdout"), Kept("stderr")
    report = _blank()
    _signal.signal(proc.SIGTERM, terminated)
    try:
        try:
            _run(values, report, out, err)
        finally:
            # From here on there is something to report.
            _signal.signal(proc.SIGTERM, proc.SIG_IGN)
    except KeyboardInterrupt:
        report.update(exit_code=130, error=_error("KeyboardInterrupt", "interrupted"))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        report.update(exit_code=code, error=_error("SystemExit", "terminated"))
    except (DhgError, OSError) as error:
        if values.flag("debug"):
            traceback.print_exc()
        if isinstance(error, DeadlineExceeded):
            report["outcome"] = "timeout"
        elif isinstance(error, OutcomeUnknown):
            report["outcome"] = "unknown"
        _failed(report, host_error(error) if isinstance(error, OSError) else error)
    report["stdout"], report["stderr"] = out.text(), err.text()
    report["elapsed_ms"] = round((time.monotonic() - began) * 1000, 1)
    return _print(report)


def refused(error: DhgError) -> int:
    """Print the report of a command line that makes no sense; the exit code."""
    report = _blank()
    _failed(report, error)
    return _print(report)


def _failed(report: dict[str, Any], error: DhgError) -> None:
    report.update(exit_code=error.exit_code, error=_error(type(error).__name__, str(error), error.hint))
    show_error(error)


def _print(report: dict[str, Any]) -> int:
    # ASCII: whatever stdout's encoding is, and for texts that have none in UTF-8 (names of files that are no UTF-8).
    data = json.dumps(report, allow_nan=False).encode() + b"\n"
    # Who does not read it can end us.
    _signal.signal(proc.SIGTERM, proc.SIG_DFL)
    try:
        writer(1)(data)
    except ReaderGone:
        return 128 + proc.SIGPIPE
    code: int = report["exit_code"]
    return code


def _blank() -> dict[str, Any]:
    return {
        "outcome": "not_started",
        "exit_code": 2,
        "stdout": "",
        "stderr": "",
        "result_repr": None,
        "error": None,
        "tables": [],
        "version": None,
        "engine": None,
        "acceleration": None,
        "elapsed_ms": 0.0,
        "timing": {},
        "guest": None,
    }


def _run(values: Values, report: dict[str, Any], out: Kept, err: Kept) -> None:
    run = Run(values)
    run.flags |= frames.FLAG_JSON
    with run.start() as vm:
        report.update(engine=vm.engine, acceleration=vm.acceleration)
        try:
            result = run.finish(vm, out.write, err.write)
            # Until all of it is in the report.
            report["outcome"] = "unknown"
            tables = _tables(result)
        except BaseException as error:
            run.drop()
            # Of the errors of machines, only those that are OutcomeUnknown say so.
            if vm.released and not isinstance(error, MachineError):
                report["outcome"] = "unknown"
            raise
        finally:
            _cost(vm, report)
    report["exit_code"] = result.exit_code
    report["outcome"] = "failed" if result.texts(frames.F_ERROR_TYPE) or result.exit_code else "completed"
    report["result_repr"] = next(iter(result.texts(frames.F_REPR)), None)
    report["error"] = _script_error(result)
    report["tables"] = tables
    for note in run.deliver(vm, result):
        err.note(note)
        if report["error"] is not None and note.startswith("hint: "):
            report["error"]["hint"] = note.removeprefix("hint: ")


def _tables(result: client.Result) -> list[dict[str, Any]]:
    """The tables that came with a result. Raises `ProtocolError` for what cannot be part of a report."""
    try:
        tables = [json.loads(text) for text in result.texts(frames.F_TABLE)]
        # It reads more than it writes: NaN, numbers too large for a float, and as deep as it reads; in the report they lie deeper.
        json.dumps([[[[tables]]]], allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the script's tables came as no valid JSON: {error}") from None
    if not all(isinstance(table, dict) for table in tables):
        raise ProtocolError("the script's tables came as something else")
    return tables


def _cost(vm: Place, report: dict[str, Any]) -> None:
    report["version"] = vm.version
    report["guest"] = vm.usage() or None
    report["timing"] = {name: round(value, 3) for name, value in vm.phases.items()}


def _error(kind: str, message: str, hint: str | None = None) -> dict[str, Any]:
    return {"type": kind, "message": message, "traceback": None, "hint": hint}


def _script_error(result: client.Result) -> dict[str, Any] | None:
    texts = [result.texts(key) for key in (frames.F_ERROR_TYPE, frames.F_ERROR_MESSAGE, frames.F_ERROR_TRACEBACK)]
    if not all(texts):
        return None
    return {"type": texts[0][0], "message": texts[1][0], "traceback": texts[2][0], "hint": None}
