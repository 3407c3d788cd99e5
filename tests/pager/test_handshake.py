"""The handshake's message: what is taken, and that everything else is refused without an exception of another kind."""

from __future__ import annotations

import itertools
import json
import os
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhg.errors import DeadlineExceeded, ProtocolError
from dhg.pager import handshake, workingset
from dhg.pager.uffd import PAGE

ITEM = {"base_host_virt_addr": 1 << 40, "size": 8 * PAGE, "offset": 0, "page_size": PAGE, "page_size_kib": PAGE}


def message(*items: dict[str, Any]) -> bytes:
    """A message of items that differ from ITEM."""
    return json.dumps([{**ITEM, **item} for item in items]).encode()


def test_firecrackers_message() -> None:
    text = (
        b'[{"base_host_virt_addr":140031181815808,"size":3221225472,"offset":0,"page_size":4096,"page_size_kib":4096},'
        b'{"base_host_virt_addr":140027960590336,"size":1073741824,"offset":3221225472,"page_size":4096,"page_size_kib":4096}]'
    )
    regions = handshake.parse(text, memory_bytes=4 << 30)
    assert [(item.address, item.size, item.offset) for item in regions] == [
        (140027960590336, 1 << 30, 3 << 30),
        (140031181815808, 3 << 30, 0),
    ]


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([{"size": 9 * PAGE}], "too short"),
        ([{"offset": PAGE}], "too short"),
        ([{"size": 0}], "whole pages"),
        ([{"size": PAGE + 1}], "whole pages"),
        ([{"base_host_virt_addr": 7}], "whole pages"),
        ([{"offset": -PAGE}], "offset"),
        ([{"size": True}], "size"),
        ([{"size": 1e3}], "size"),
        ([{"size": None}], "size"),
        ([{"base_host_virt_addr": 1 << 63}], "base_host_virt_addr"),
        ([{"base_host_virt_addr": (1 << 63) - PAGE}], "address range"),
        ([{"page_size": 12345}], "pages of"),
        ([{"page_size": 2 << 20}], "whole pages"),
        ([{}, {}], "overlap"),
        ([{}, {"base_host_virt_addr": 2 << 40, "offset": 4 * PAGE, "size": 4 * PAGE}], "overlap"),
        ([{}, {"base_host_virt_addr": (1 << 40) + PAGE, "offset": 0, "size": PAGE}], "overlap"),
    ],
)
def test_what_makes_no_sense_is_refused(items: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        handshake.parse(message(*items), memory_bytes=8 * PAGE)


def test_a_file_may_end_within_its_last_page() -> None:
    assert handshake.parse(message({}), memory_bytes=7 * PAGE + 1)[0].size == 8 * PAGE
    with pytest.raises(ProtocolError, match="too short"):
        handshake.parse(message({}), memory_bytes=7 * PAGE)


def test_the_former_name_of_the_page_size() -> None:
    item = {name: value for name, value in ITEM.items() if name != "page_size"}
    assert handshake.parse(json.dumps([item]).encode(), memory_bytes=8 * PAGE)[0].page_size == PAGE


@settings(deadline=None)
@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_any_bytes_are_refused_in_an_orderly_way(data: bytes) -> None:
    handshake.whole(data)
    with pytest.raises(ProtocolError):
        handshake.parse(data, memory_bytes=1 << 30)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*ITEM, "x"]), inner),
)


@settings(deadline=None)
@given(_JSON)
def test_any_json_is_refused_or_sound(data: object) -> None:
    try:
        regions = handshake.parse(json.dumps(data).encode(), memory_bytes=1 << 20)
    except ProtocolError:
        return
    for region in regions:
        assert region.offset + region.size <= 1 << 20


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def _open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("data", "fds", "why"),
    [
        (message({}), 2, "2 descriptors"),
        (message({}), 20, "more descriptors"),
        (message({})[:50], 1, "hung up after 50"),
        (message({}), 0, "hung up"),
        (b"", 1, "hung up"),
        (b"hello", 1, "no JSON"),
        (b"[" * 70000, 1, "longer than"),
    ],
)
def test_a_peer_that_does_not_keep_to_it(tmp_path: Path, data: bytes, fds: int, why: str) -> None:
    before = _open_fds()
    null = os.open("/dev/null", os.O_RDONLY)
    with closing(handshake.listen(str(tmp_path / "s"))) as listener, _connect(tmp_path / "s") as sock:
        if fds:
            socket.send_fds(sock, [data or b"["], [null] * fds)
        else:
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError, match=why):
            handshake.accept(listener, memory_bytes=8 * PAGE, timeout_s=10)
    os.close(null)
    assert _open_fds() == before


def test_nobody_comes_or_says_anything(tmp_path: Path) -> None:
    with closing(handshake.listen(str(tmp_path / "s"))) as listener:
        with pytest.raises(DeadlineExceeded):
            handshake.accept(listener, memory_bytes=PAGE, timeout_s=0.05)
        with _connect(tmp_path / "s"), pytest.raises(DeadlineExceeded):
            handshake.accept(listener, memory_bytes=PAGE, timeout_s=0.05)
        _connect(tmp_path / "s").close()
        assert handshake.accept(listener, memory_bytes=PAGE, timeout_s=10) is None


@settings(deadline=None)
@given(st.sets(st.integers(0, 400)), st.integers(0, 5))
def test_merged_ranges_cover_the_pages_and_no_wide_gap(pages: set[int], gap: int) -> None:
    ranges = workingset.merge(pages, gap=gap)
    covered = {page for first, count in ranges for page in range(first, first + count)}
    assert pages <= covered
    assert all(later[0] - (first + count) > gap for (first, count), later in itertools.pairwise(ranges))
    assert all(first in pages and first + count - 1 in pages for first, count in ranges)
    assert all(any(other in pages for other in range(page - gap, page + gap + 1)) for page in covered)


def test_a_damaged_working_set_counts_as_none(tmp_path: Path) -> None:
    memory = tmp_path / "ram"
    memory.write_bytes(bytes(100 * PAGE))
    found = memory.stat()
    path = tmp_path / "set"
    assert workingset.load(str(path), found) == []
    workingset.save(str(path), [(1, 2), (50, 50)], found)
    data = path.read_bytes()
    assert workingset.load(str(path), found) == [(1, 2), (50, 50)]
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert workingset.load(str(path), found) == []
    workingset.save(str(path), [(50, 51)], found)
    assert workingset.load(str(path), found) == []
    workingset.save(str(path), [(50, 2), (51, 2)], found)
    assert workingset.load(str(path), found) == []
