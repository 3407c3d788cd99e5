"""The moment of the freeze: when it is, and that a restore goes on by itself."""

from __future__ import annotations

import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dhg.engine import qmp
from dhg.errors import SnapshotError
from dhg.guest import warmup

HEAD = b"QEVM\0\0\0\3" + b"\4\0\0\0\x13\x0bglobalstate" + bytes(4) + b"\0\0\0\1"


def rewritten(data: bytes) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        qmp.set_running(file.fileno())
        file.seek(0)
        return file.read()


def test_a_stopped_vm_is_written_down_as_running() -> None:
    paused = HEAD + b"\0\0\0\7paused\0" + bytes(93) + b"the rest \x0aglobalstat"
    running = HEAD + b"\0\0\0\x08running\0" + bytes(92) + b"the rest \x0aglobalstat"
    assert rewritten(paused) == running


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEAD,
        HEAD[:-4],
        HEAD + b"\0\0\0\x08running\0",
        HEAD + b"\0\0\0\7paused\0x",
        HEAD * 2 + b"\0\0\0\7paused\0\0",
    ],
)
def test_a_state_of_another_form_is_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError, match="not say that the VM was stopped"):
        rewritten(data)


def test_the_quietest_moment_is_right_after_the_heaviest_work() -> None:
    assert warmup.quietest([0, 0, 9, 0, 0, 0, 0, 0]) == 3
    assert warmup.quietest([1, 0, 0, 0, 90, 80, 0, 0]) == 6
    assert warmup.quietest([0] * 5) == 0


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_the_quietest_moment_is_one_of_the_list(load: list[int]) -> None:
    assert 0 <= warmup.quietest(load) < len(load)
