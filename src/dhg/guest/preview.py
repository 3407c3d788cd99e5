"""Table previews: which tables a script has left, and their first rows as text or as data.

Guest code: standard library and Deephaven only. Only the rows that are shown are fetched, never the table.
"""

from __future__ import annotations

import json
from typing import Any

#: Longest line of columns; beyond it there is one column a line.
WIDTH = 80

_TYPES = {
    "byte": "int8",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "float": "float32",
    "double": "float64",
    "boolean": "bool",
    "java.lang.Boolean": "bool",
    "java.lang.String": "string",
}


class Preview:
    """What is shown of one table."""

    def __init__(self, name: str, table: Any, rows: int) -> None:
        self.name = name
        self.table = table
        self.columns = [(column, type_name(kind)) for column, kind in _columns(table)]
        self.refreshing = bool(table.is_refreshing)
        head = table.head(rows)
        if self.refreshing:
            # One consistent state, and one that does not change while it is read.
            head = head.snapshot()
        self.row_count = int(table.size)
        self.frame = to_pandas(head)
        if not self.refreshing and self.row_count < 0:
            self.row_count = len(self.frame)

    def text(self, *, meta: bool) -> str:
        """The preview as it is printed, from its blank line to its last."""
        state = "refreshing" if self.refreshing else "static"
        rows = "row" if self.row_count == 1 else "rows"
        lines = ["", f"=== Table: {self.name} ({self.row_count:,} {rows}, {state}) ==="]
        if meta:
            columns = [f"{name} ({kind})" for name, kind in self.columns]
            line = "Columns: " + ", ".join(columns)
            lines += [line] if len(line) <= WIDTH else ["Columns:", *(f"  {column}" for column in columns)]
        lines += ["", self.body()]
        return "\n".join(lines) + "\n"

    def body(self) -> str:
        """The rows, aligned."""
        if not len(self.frame):
            return "(empty table)"
        return str(self.frame.to_string(index=False))

    def data(self) -> dict[str, Any]:
        """The preview as data for JSON."""
        return {
            "name": self.name,
            "row_count": self.row_count,
            "is_refreshing": self.refreshing,
            "columns": [{"name": name, "type": kind} for name, kind in self.columns],
            "rows": self.rows(),
            "preview": self.body(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """The rows as values that JSON has."""
        names = list(self.frame.columns)
        return [
            dict(zip(names, map(_plain, row), strict=True)) for row in self.frame.itertuples(index=False, name=None)
        ]


def to_pandas(table: Any) -> Any:
    """The whole of a (small) table as a DataFrame."""
    from deephaven.pandas import to_pandas as convert

    return convert(table)


def _columns(table: Any) -> list[tuple[str, str]]:
    return [(str(name), str(column.data_type.j_name)) for name, column in table.definition.items()]


def type_name(java: str) -> str:
    """A column's type as Python users call it; other Java types by their simple name."""
    if java in _TYPES:
        return _TYPES[java]
    if java.startswith("["):
        inner = {
            "B": "byte",
            "S": "short",
            "I": "int",
            "J": "long",
            "F": "float",
            "D": "double",
            "Z": "boolean",
            "C": "char",
        }
        element = inner.get(java[1:], java[2:].rstrip(";") if java[1:2] == "L" else java[1:])
        return type_name(element) + "[]"
    return java.rpartition(".")[2]


def _plain(value: Any) -> Any:
    # What JSON knows as it is; missing values as null; everything else as text.
    import pandas

    if value is None or value is pandas.NA or value is pandas.NaT:
        return None
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0.0 else (None if value != value else str(value))
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


class Finder:
    """Knows the kinds of tables; made before the freeze, because it imports them."""

    def __init__(self) -> None:
        from deephaven import table

        self._table = table.Table
        self._others: list[tuple[type, str]] = [(table.PartitionedTable, "Partitioned table")]
        for name, title in (("TreeTable", "Tree table"), ("RollupTable", "Rollup table")):
            kind = getattr(table, name, None)
            if kind is not None:
                self._others.append((kind, title))

    def texts_and_data(
        self, names: dict[str, Any], rows: int, *, meta: bool, data: bool
    ) -> list[tuple[str, str | None]]:
        """Text, and with `data` JSON, of every table that a top-level name is bound to, in the order of first assignment."""
        found: list[tuple[str, str | None]] = []
        for name, value in list(names.items()):
            if name[:2] == "__":
                continue
            try:
                if isinstance(value, self._table):
                    preview = Preview(name, value, rows)
                    found.append((preview.text(meta=meta), json.dumps(preview.data()) if data else None))
                else:
                    for kind, title in self._others:
                        if isinstance(value, kind):
                            found.append((f"\n=== {title}: {name}{_keys(value)} ===\n", None))
            except Exception as error:
                found.append((f"\n=== Table: {name} (no preview: {type(error).__name__}) ===\n", None))
        return found


def _keys(value: Any) -> str:
    columns = getattr(value, "key_columns", None)
    if not columns:
        return ""
    return f" (by {', '.join(columns)})"
