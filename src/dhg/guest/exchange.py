"""What the host asks for and what it is answered: the REQUEST decoded, the RESULT encoded, and the tables in it.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from ..wire import frames
from . import preview, script, stdio


class Request:
    """A decoded REQUEST: empty at first, because making an object costs a clone more than filling it."""

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
        "hostname",
        "machine_id",
        "mounts",
        "outputs",
        "rows",
        "source",
        "time_ns",
    )

    def decode(self, payload: bytes) -> None:
        """Fill it from the payload of a REQUEST. Raises `FrameError` for one that is none."""
        head = frames.REQUEST_HEAD
        if len(payload) < head.size:
            raise frames.FrameError(f"a request of {len(payload)} bytes")
        (
            self.time_ns,
            self.base_ns,
            self.flags,
            self.rows,
            source,
            name,
            file,
            folder,
            self.entropy,
            self.hostname,
            self.machine_id,
            self.end_mark,
        ) = head.unpack_from(payload)
        at = head.size
        self.source = payload[at : at + source]
        at += source
        self.filename = frames.text(payload[at : at + name]) if name else frames.STRING
        at += name
        self.file = frames.text(payload[at : at + file]) if file else None
        at += file
        self.folder = frames.text(payload[at : at + folder]) if folder else None
        at += folder
        self.args: Sequence[str] = ()
        self.environ: Sequence[str] = ()
        self.mounts: Sequence[str] = ()
        self.outputs: Sequence[str] = ()
        # Most requests have no more.
        if len(payload) > at:
            self._add(frames.fields(payload[at:]))

    def _add(self, found: dict[int, list[bytes]]) -> None:
        texts = {key: tuple(frames.text(value) for value in values) for key, values in found.items()}
        self.args = texts.get(frames.F_ARG, ())
        self.environ = texts.get(frames.F_ENV, ())
        self.mounts = texts.get(frames.F_MOUNT, ())
        self.outputs = texts.get(frames.F_OUTPUT, ())


def set_environ(request: Request) -> None:
    """Put the variables that came with the request into the environment."""
    for item in request.environ:
        name, _, value = item.partition("=")
        os.environ[name] = value
        if name == "TZ":
            # The C library has looked at it long since.
            time.tzset()


def show_tables(
    request: Request,
    outcome: script.Outcome,
    finder: preview.Finder | None,
    names: dict[str, Any],
    out: Any,
    fd: int = -1,
) -> list[str]:
    """Write the previews of the tables in `names` to `out`; or, where the request wants data, return them as JSON texts.

    `fd` is where `out` leads to, for a script that has closed it.
    """
    tables: list[str] = []
    if request.flags & frames.FLAG_TABLES and not outcome.raised and finder is not None:
        meta, as_json = request.flags & frames.FLAG_TABLE_META != 0, request.flags & frames.FLAG_JSON != 0
        found = finder.texts_and_data(names, request.rows, meta, as_json)
        if found:
            for text, data in found:
                if data is not None:
                    tables.append(data)
                elif not as_json:
                    try:
                        out.write(text)
                    except (ValueError, OSError):
                        if fd >= 0:
                            stdio.write_all(fd, text.encode("utf-8", "backslashreplace"))
            script.quietly(out.flush)
    return tables


def result(outcome: script.Outcome, tables: list[str], times: tuple[int, int, int]) -> bytes:
    """The RESULT frame; `times` are those of its head. Tables that do not fit are left out."""
    payload = frames.RESULT_HEAD.pack(outcome.exit_code, times[0], times[1], times[2])
    if outcome.result_repr is not None:
        payload += frames.field(frames.F_REPR, _octets(outcome.result_repr))
    if outcome.error is not None:
        for key, text in zip(
            (frames.F_ERROR_TYPE, frames.F_ERROR_MESSAGE, frames.F_ERROR_TRACEBACK), outcome.error, strict=True
        ):
            payload += frames.field(key, _octets(text))
    if outcome.output_error is not None:
        payload += frames.field(frames.F_OUTPUT_ERROR, _octets(outcome.output_error))
    for table in tables:
        if len(payload) + len(table) < frames.MAX_PAYLOAD // 4:
            payload += frames.field(frames.F_TABLE, table)
    return frames.frame(frames.RESULT, payload)


def _octets(text: str) -> bytes:
    # Of the script's: it may have any surrogates.
    return text.encode("utf-8", "backslashreplace")
