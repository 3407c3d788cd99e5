"""The frame format: round trips, truncation, hostile bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dhg.wire import frames

KINDS = st.sampled_from(sorted(frames.KINDS))
VALUES = st.one_of(st.binary(max_size=200), st.text(max_size=50), st.integers(-(2**63), 2**63 - 1))


@given(st.lists(st.tuples(KINDS, st.binary(max_size=300)), max_size=5), st.integers(1, 50))
def test_frames_survive_any_split(items: list[tuple[int, bytes]], step: int) -> None:
    data = b"".join(frames.frame(kind, payload) for kind, payload in items)
    decoder = frames.Decoder()
    found = []
    for at in range(0, len(data), step):
        found += decoder.feed(data[at : at + step])
    assert found == items
    assert decoder.pending == 0


@given(st.lists(st.tuples(st.integers(0, 255), VALUES), max_size=10))
def test_fields_round_trip(items: list[tuple[int, bytes | str | int]]) -> None:
    found = frames.fields(b"".join(frames.field(key, value) for key, value in items))
    expected: dict[int, list[bytes]] = {}
    for key, value in items:
        raw = value.to_bytes(8, "little", signed=True) if isinstance(value, int) else value
        expected.setdefault(key, []).append(raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else raw)
    assert found == expected


@given(st.binary(max_size=2000))
def test_hostile_bytes_end_in_a_frame_error_or_wait_for_more(data: bytes) -> None:
    decoder = frames.Decoder()
    try:
        decoder.feed(data)
    except frames.FrameError:
        return
    assert decoder.pending <= len(data)


@given(st.binary(max_size=500))
def test_hostile_payloads_end_in_a_frame_error(data: bytes) -> None:
    try:
        found = frames.fields(data)
    except frames.FrameError:
        return
    assert sum(len(value) + frames.HEAD_SIZE for values in found.values() for value in values) == len(data)


def test_a_frame_larger_than_allowed_is_refused_at_its_head() -> None:
    head = bytes([frames.RESULT, 0, 0, 0]) + (frames.MAX_PAYLOAD + 1).to_bytes(4, "little")
    with pytest.raises(frames.FrameError, match="at most"):
        frames.Decoder().feed(head)
    with pytest.raises(frames.FrameError, match="at most"):
        frames.frame(frames.LOG, bytes(frames.MAX_PAYLOAD + 1))


@pytest.mark.parametrize("value", [b"", b"1234567", b"123456789"])
def test_numbers_have_eight_bytes(value: bytes) -> None:
    with pytest.raises(frames.FrameError, match="number"):
        frames.integer(value)


def test_text_that_is_no_utf8_survives() -> None:
    raw = b"caf\xe9"
    assert frames.fields(frames.field(1, frames.text(raw)))[1] == [raw]
