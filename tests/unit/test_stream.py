"""The host's end of an output channel: everything before the end mark and nothing of it."""

from __future__ import annotations

import socket

from hypothesis import given
from hypothesis import strategies as st

from dhg.wire.client import Stream

MARK = b"0123456789abcdef"
# Many beginnings of the mark among the data.
PIECES = st.lists(st.one_of(st.binary(max_size=40), st.integers(1, 15).map(lambda n: MARK[:n])), max_size=12)


@given(PIECES, st.integers(1, 64))
def test_all_bytes_pass_and_the_mark_ends_it(pieces: list[bytes], step: int) -> None:
    data = b"".join(pieces)
    if MARK in data:
        return
    out: list[bytes] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Stream(ours, MARK, out.append)
        whole = data + MARK
        for at in range(0, len(whole), step):
            theirs.sendall(whole[at : at + step])
            assert stream.receive()
        assert stream.done
    assert b"".join(out) == data


@given(PIECES)
def test_what_was_held_back_comes_at_the_end_of_the_channel(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    if MARK in data:
        return
    out: list[bytes] = []
    ours, theirs = socket.socketpair()
    with ours:
        stream = Stream(ours, MARK, out.append)
        theirs.sendall(data)
        theirs.close()
        while stream.receive():
            pass
    assert b"".join(out) == data
    assert not stream.done
