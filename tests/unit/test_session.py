"""Both ends of the control channel against hostile bytes: a clean error or a result, never a hang, another exception, or growth."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhg import proc
from dhg.errors import DeadlineExceeded, DhgError, MachineError, OutcomeUnknown, ProtocolError
from dhg.guest import exchange, runner
from dhg.guest.script import Outcome
from dhg.wire import client, frames

RESULT = exchange.result(Outcome(), [], (1, 2, 3))
FRAMES = st.one_of(
    st.binary(max_size=300),
    st.just(RESULT),
    st.tuples(st.sampled_from(sorted(frames.KINDS)), st.binary(max_size=100)).map(lambda item: frames.frame(*item)),
    st.tuples(st.integers(0, len(RESULT) - 1), st.integers(1, 255)).map(
        lambda item: RESULT[: item[0]] + bytes([RESULT[item[0]] ^ item[1]]) + RESULT[item[0] + 1 :]
    ),
)


def session(control: bytes, stdout: bytes = b"", stderr: bytes = b"", *, timeout_s: float = 20.0) -> client.Result:
    """What comes of a guest that sends these bytes and is gone."""
    pairs = [socket.socketpair() for _ in range(3)]
    try:
        for (_, guest), data in zip(pairs, (control, stdout, stderr), strict=True):
            guest.sendall(data)
            guest.shutdown(socket.SHUT_WR)
        deadline = proc.Deadline(timeout_s)
        host = client.Session(*[pair[0] for pair in pairs])
        return host.run(client.Request(b"pass"), stdout=bytes, stderr=bytes, deadline=deadline)
    finally:
        for pair in pairs:
            for end in pair:
                end.close()


@settings(deadline=None, max_examples=150)
@given(st.lists(FRAMES, max_size=4).map(b"".join), st.binary(max_size=100))
def test_the_host_ends_in_order_whatever_the_guest_sends(control: bytes, stdout: bytes) -> None:
    # Without end marks a result alone never ends a run.
    with pytest.raises((OutcomeUnknown, ProtocolError, MachineError)):
        session(control, stdout)


@settings(deadline=None, max_examples=150)
@given(st.lists(FRAMES, max_size=4).map(b"".join))
def test_the_host_asks_for_the_clock_and_gets_anything(control: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(control)
        theirs.shutdown(socket.SHUT_WR)
        host = client.Session(ours, ours, ours)
        try:
            found = host.ask_clock(deadline=proc.Deadline(20.0))
        except DhgError:
            return
        assert isinstance(found.base_ns, int)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300), st.booleans())
def test_the_guest_reads_anything(data: bytes, valid_head: bool) -> None:
    if valid_head:
        data = frames.frame(frames.REQUEST, data)
    reader, writer = os.pipe()
    try:
        os.write(writer, data)
        os.close(writer)
        kind, payload = runner.read_frame(reader)
        assert kind in frames.KINDS
        assert len(payload) <= len(data)
        exchange.Request().decode(payload)
    except (frames.FrameError, EOFError):
        pass
    finally:
        os.close(reader)


@pytest.mark.parametrize("code", [-1, 256, 2**40])
def test_an_exit_code_that_is_none(code: int) -> None:
    with pytest.raises(frames.FrameError, match="exit code"):
        client.Result(frames.RESULT_HEAD.pack(code, 0, 0, 0))


@pytest.mark.parametrize("timeout_s", [9_999_999.0, 1e12, 1e308])
def test_a_deadline_in_the_far_future_is_none(timeout_s: float) -> None:
    with pytest.raises(OutcomeUnknown, match="the VM ended while the script ran"):
        session(b"", timeout_s=timeout_s)


def test_a_deadline_is_kept_in_several_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "LONGEST_WAIT_S", 0.01)
    pairs = [socket.socketpair() for _ in range(3)]
    host = client.Session(*[pair[0] for pair in pairs])
    deadline = proc.Deadline(0.1)
    try:
        with pytest.raises(DeadlineExceeded, match=r"timed out after 0\.1 s"):
            host.run(client.Request(b"pass"), stdout=bytes, stderr=bytes, deadline=deadline)
    finally:
        for pair in pairs:
            for end in pair:
                end.close()
    assert deadline.left() == 0.0
