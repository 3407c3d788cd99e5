"""Table previews: which tables a script has left, and their first rows as text or as data.

Guest code: standard library and Deephaven only. Only the rows that are shown are fetched, never the table.
"""

from __future__ import annotations

import json
import sys
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


#: Types whose values are shown here and not by pandas: by Java type, the value that stands for null, if the type has none of its own.
_PLAIN: dict[str, float | None] = {
    "byte": -(1 << 7),
    "short": -(1 << 15),
    "int": -(1 << 31),
    "long": -(1 << 63),
    "float": -(2.0**128 - 2.0**104),
    "double": -sys.float_info.max,
    "java.lang.Boolean": None,
    "java.lang.String": None,
}


class Preview:
    """What is shown of one table."""

    def __init__(self, name: str, table: Any, rows: int) -> None:
        self.name = name
        self.table = table
        kinds = _columns(table)
        self.columns = [(column, type_name(kind)) for column, kind in kinds]
        self.refreshing = bool(table.is_refreshing)
        head = table.head(rows)
        if self.refreshing:
            # One consistent state, and one that does not change while it is read.
            head = head.snapshot()
        self.row_count = int(table.size)
        #: The values by column where all of them are plain, else all of it as pandas has it.
        self.plain = plain_values(head, kinds)
        self.frame = to_pandas(head) if self.plain is None else None
        if not self.refreshing and self.row_count < 0:
            self.row_count = len(self.rows())

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
        if self.plain is not None:
            return aligned(self.plain, {name for name, kind in self.columns if kind != "string"})
        if self.frame is None or not len(self.frame):
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
        if self.plain is not None:
            return [dict(zip(self.plain, row, strict=True)) for row in zip(*self.plain.values(), strict=True)]
        if self.frame is None:
            return []
        names = list(self.frame.columns)
        return [
            dict(zip(names, map(_plain, row), strict=True)) for row in self.frame.itertuples(index=False, name=None)
        ]


def plain_values(head: Any, kinds: list[tuple[str, str]]) -> dict[str, list[Any]] | None:
    """The values of a (small) table by column; None unless all are finite numbers, booleans or strings of printable ASCII.

    Most previews are that, and pandas takes the way over Arrow: the translation of that code is a hundred milliseconds of a
    clone's first preview.
    """
    if not kinds or any(kind not in _PLAIN for _, kind in kinds):
        return None
    import jpy

    found: dict[str, list[Any]] = {}
    for name, kind in kinds:
        try:
            vectors = jpy.get_type("io.deephaven.engine.table.vectors.ColumnVectors")
            values = list(vectors.of(head.j_table, name).copyToArray())
        except Exception:
            return None  # a release that has it elsewhere
        null = _PLAIN[kind]
        if null is not None:
            values = [None if value == null else value for value in values]
        if not all(value is None or _is_plain(value) for value in values):
            return None
        found[name] = values
    return found if found[kinds[0][0]] else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() and value.isprintable()
    # Not infinite, and not NaN.
    return bool(value - value == 0)


def aligned(columns: dict[str, list[Any]], numbers: set[str]) -> str:
    """Values as `DataFrame.to_string(index=False)` has them, to the space; `numbers` are the columns of numbers and booleans."""
    texts = []
    for name, values in columns.items():
        # pandas leaves room for a sign above a number, not above a string.
        column = [f" {name}" if name in numbers else name]
        column += map(_text, values)
        width = max(map(len, column))
        texts.append([text.rjust(width) for text in column])
    return "\n".join(map(" ".join, zip(*texts, strict=True)))


def _text(value: Any) -> str:
    if value is None:
        return "<NA>"
    if isinstance(value, float):
        # pandas' precision, with room for the sign; one zero stays.
        text = f"{value: .6f}".rstrip("0")
        return f"{text}0" if text.endswith(".") else text
    return str(value)


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
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):
        # A NumPy scalar, or the array of an array column.
        return _plain(value.tolist())
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

    def texts_and_data(self, names: dict[str, Any], rows: int, meta: bool, data: bool) -> list[tuple[str, str | None]]:
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
