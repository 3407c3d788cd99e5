"""`dhg exec --json`: one object on stdout, whatever happens. docs/exec.schema.json describes it."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from ..errors import DeadlineExceeded, DhgError, MachineError, OutcomeUnknown
from ..wire import client, frames
from . import show_error
from .exec_ import Run
from .options import Values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .exec_ import Place


def main(values: Values) -> int:
    """Run the script, print the report; the exit code."""
    began = time.monotonic()
    out: list[bytes] = []
    err: list[bytes] = []
    report = _blank()
    try:
        _run(values, report, out, err)
    except KeyboardInterrupt:
        report.update(outcome="unknown", exit_code=130, error=_error("KeyboardInterrupt", "interrupted"))
    except DhgError as error:
        if values.flag("debug"):
            raise
        if isinstance(error, DeadlineExceeded):
            report["outcome"] = "timeout"
        elif isinstance(error, OutcomeUnknown):
            report["outcome"] = "unknown"
        _failed(report, error)
    report["stdout"] = b"".join(out).decode("utf-8", "replace")
    report["stderr"] = b"".join(err).decode("utf-8", "replace")
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
    sys.stdout.write(json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()
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


def _run(values: Values, report: dict[str, Any], out: list[bytes], err: list[bytes]) -> None:
    run = Run(values)
    run.flags |= frames.FLAG_JSON
    with run.start() as vm:
        report.update(engine=vm.engine, acceleration=vm.acceleration)
        try:
            result = run.finish(vm, out.append, err.append)
        except MachineError as error:
            if not isinstance(error, OutcomeUnknown):
                report["outcome"] = "not_started"
            raise
        finally:
            _cost(vm, report)
    report["exit_code"] = result.exit_code
    report["outcome"] = "failed" if result.texts(frames.F_ERROR_TYPE) or result.exit_code else "completed"
    report["result_repr"] = next(iter(result.texts(frames.F_REPR)), None)
    report["error"] = _script_error(result)
    report["tables"] = [json.loads(text) for text in result.texts(frames.F_TABLE)]
    for note in run.deliver(vm, result):
        err.append(f"{note}\n".encode())
        if report["error"] is not None and note.startswith("hint: "):
            report["error"]["hint"] = note.removeprefix("hint: ")


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
