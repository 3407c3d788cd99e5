"""The runner in a server that others started: one script, in the server's own `__main__`, reported as one text.

Guest code: standard library and Deephaven only. The host (`dhg.remote`) sends this package's sources along with the script;
the server needs nothing of ours installed.

The server's process is not ours: its threads are not waited for, its exit handlers stay, and what has been changed for the script
(`sys.argv`, the streams, the environment) is put back.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from typing import Any

from ..wire import frames
from . import exchange, preview, script


def run(payload: str, names: dict[str, Any]) -> list[str]:
    """Run the REQUEST whose payload is in base64 with `names` as its globals.

    What is returned are three texts in base64: stdout, stderr, the payload of a RESULT.
    """
    request = exchange.Request()
    request.decode(base64.b64decode(payload))
    before = dict(names)
    streams = [_stream(), _stream()]
    saved = sys.stdin, sys.stdout, sys.stderr, sys.argv, dict(os.environ)
    began = time.monotonic_ns()
    try:
        sys.stdin, sys.stdout, sys.stderr = io.StringIO(), *streams
        exchange.set_environ(request)
        outcome = script.Script(request.source, request.filename, request.args, names).run(end=False)
        left = {name: value for name, value in names.items() if before.get(name, before) is not value}
        tables = exchange.show_tables(request, outcome, preview.Finder(), left, streams[0])
    finally:
        sys.stdin, sys.stdout, sys.stderr, sys.argv, environ = saved
        os.environ.clear()
        os.environ.update(environ)
        names.pop("__file__", None)
    whole = exchange.result(outcome, tables, (0, 0, time.monotonic_ns() - began))
    parts = [*(_bytes_of(stream) for stream in streams), whole[frames.HEAD_SIZE :]]
    return [base64.b64encode(part).decode() for part in parts]


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)


def _bytes_of(stream: io.TextIOWrapper) -> bytes:
    try:
        stream.flush()
        data = stream.buffer.getvalue()  # type: ignore[attr-defined]
    except ValueError:
        return b""  # the script has closed it
    return bytes(data)
