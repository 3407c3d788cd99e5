"""Previews: what we format ourselves is what pandas would print."""

from __future__ import annotations

from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dhg.guest import preview

TEXT = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)
COLUMN = st.one_of(
    st.tuples(
        st.just("Int64"), st.lists(st.none() | st.integers(-(1 << 63) + 1, (1 << 63) - 1), min_size=10, max_size=10)
    ),
    st.tuples(st.just("Int8"), st.lists(st.none() | st.integers(-127, 127), min_size=10, max_size=10)),
    st.tuples(
        st.just("Float64"),
        st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), min_size=10, max_size=10),
    ),
    st.tuples(st.just("boolean"), st.lists(st.none() | st.booleans(), min_size=10, max_size=10)),
    st.tuples(st.just("string"), st.lists(st.none() | TEXT, min_size=10, max_size=10)),
)


@given(
    st.dictionaries(st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,12}\Z"), COLUMN, min_size=1, max_size=5),
    st.integers(1, 10),
)
def test_plain_values_are_aligned_as_pandas_does(columns: dict[str, tuple[str, list[Any]]], rows: int) -> None:
    frame = pandas.DataFrame(
        {name: pandas.array(values[:rows], dtype=kind) for name, (kind, values) in columns.items()}
    )
    numbers = {name for name, (kind, _) in columns.items() if kind != "string"}
    ours = preview.aligned({name: values[:rows] for name, (_, values) in columns.items()}, numbers)
    assert ours == frame.to_string(index=False)


@pytest.mark.parametrize("kinds", [[], [("a", "char")], [("a", "int"), ("b", "java.time.Instant")]])
def test_other_types_are_left_to_pandas(kinds: list[tuple[str, str]]) -> None:
    assert preview.plain_values(object(), kinds) is None
