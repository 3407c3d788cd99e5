"""What the host asks for and what it is answered: the REQUEST decoded, the RESULT encoded, and the tables in it.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import os
from typing import Any

from ..wire import frames
from . import preview, script


class Request:
    """A decoded REQUEST."""

    __slots__ = ("args", "base_ns", "end_mark", "entropy", "environ", "filename", "flags", "rows", "source", "time_ns")

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


def set_environ(request: Request) -> None:
    """Put the variables that came with the request into the environment."""
    for item in request.environ:
        name, _, value = item.partition("=")
        os.environ[name] = value


def show_tables(
    request: Request, outcome: script.Outcome, finder: preview.Finder | None, names: dict[str, Any], out: Any
) -> list[str]:
    """Write the previews of the tables in `names` to `out`; or, where the request wants data, return them as JSON texts."""
    tables: list[str] = []
    if request.flags & frames.FLAG_TABLES and not outcome.raised and finder is not None:
        meta, as_json = bool(request.flags & frames.FLAG_TABLE_META), bool(request.flags & frames.FLAG_JSON)
        for text, data in finder.texts_and_data(names, request.rows, meta=meta, data=as_json):
            if data is not None:
                tables.append(data)
            elif not as_json:
                out.write(text)
        out.flush()
    return tables


def result(outcome: script.Outcome, tables: list[str], times: tuple[int, int, int]) -> bytes:
    """The RESULT frame; `times` are F_WOKEN_NS, F_READY_NS and F_SCRIPT_NS. Tables that do not fit are left out."""
    payload = frames.field(frames.F_EXIT, outcome.exit_code)
    for key, value in zip((frames.F_WOKEN_NS, frames.F_READY_NS, frames.F_SCRIPT_NS), times, strict=True):
        payload += frames.field(key, value)
    if outcome.result_repr is not None:
        payload += frames.field(frames.F_REPR, outcome.result_repr)
    if outcome.error is not None:
        for key, text in zip(
            (frames.F_ERROR_TYPE, frames.F_ERROR_MESSAGE, frames.F_ERROR_TRACEBACK), outcome.error, strict=True
        ):
            payload += frames.field(key, text)
    for table in tables:
        if len(payload) + len(table) < frames.MAX_PAYLOAD // 4:
            payload += frames.field(frames.F_TABLE, table)
    return frames.frame(frames.RESULT, payload)
