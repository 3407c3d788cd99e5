"""`--output`: writes tables that a script has left to files of the host's, which arrive there in pieces as they are written.

Guest code: standard library and Deephaven only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Rows of a table that are in memory at once as Arrow data.
ARROW_ROWS = 1 << 18


def write(names: dict[str, Any], outputs: Sequence[str]) -> str | None:
    """Write every table of `outputs` (items as in F_OUTPUT); why that failed, or None."""
    for item in outputs:
        name, kind, path = item.split("\0")[:3]
        try:
            _write(names, name, kind, path)
        except BaseException as error:
            # What the JVM says is a page long, with its stack; the first lines say what it is.
            text = " ".join(str(error).split())[:500]
            return f"{name}: {text}" if isinstance(error, LookupError) else f"{name}: {type(error).__name__}: {text}"
    return None


class NoTable(LookupError):
    """The script has left no such table."""


def _write(names: dict[str, Any], name: str, kind: str, path: str) -> None:
    from deephaven.table import Table

    if name not in names:
        raise NoTable("the script has left nothing of that name")
    table = names[name]
    if not isinstance(table, Table):
        raise NoTable(f"is no table but of type {type(table).__name__}")
    if table.is_refreshing:
        # One consistent state, which does not change while it is written.
        table = table.snapshot()
    WRITERS[kind](table, path)


def _parquet(table: Any, path: str) -> None:
    from deephaven import parquet

    parquet.write(table, path)


def _csv(table: Any, path: str) -> None:
    from deephaven import write_csv

    write_csv(table, path)


def _arrow(table: Any, path: str) -> None:
    import pyarrow
    from deephaven import arrow

    rows = int(table.size)
    if rows < 0:
        raise ValueError("a table without a size cannot be written as Arrow")
    schema = arrow.to_arrow(table.head(0)).schema
    with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        for start in range(0, rows, ARROW_ROWS):
            writer.write_table(arrow.to_arrow(table.slice(start, min(start + ARROW_ROWS, rows))))


WRITERS = {"parquet": _parquet, "csv": _csv, "arrow": _arrow}
