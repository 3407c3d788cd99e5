"""The moment of the freeze: when it is, and that a restore goes on by itself."""

from __future__ import annotations

import math
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dhg.engine import qmp
from dhg.errors import SnapshotError
from dhg.guest import quiet

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


TIMER_LIST = """Timer List Version: v0.9
HRTIMER_MAX_CLOCK_BASES: 8
now at 124737276844 nsecs

cpu: 0
 clock 0:
  .base:       00000000448d8bfb
  .resolution: 1 nsecs
active timers:
 #0: <00000000ed0fb520>, tick_sched_timer, S:01
 # expires at 124756000000-124756000000 nsecs [in 18723156 to 18723156 nsecs]
 #1: <00000000a133105f>, hrtimer_wakeup, S:01
 # expires at 125300595141-125300645141 nsecs [in 563318297 to 563368297 nsecs]
 #2: <0000000093e415ae>, hrtimer_wakeup, S:01
 # expires at 124737000000-124737050000 nsecs [in -276844 to -226844 nsecs]
 #3: <000000009933ed3a>, hrtimer_wakeup, S:01
 # expires at 86414654072114-86414654122114 nsecs [in 86289916795270 to 86289916845270 nsecs]
  .expires_next   : 124756000000 nsecs
  .next_timer     : {next_timer}
  .idle_expires   : 126644000000 nsecs
"""


def test_what_is_due_is_what_sleeps_and_what_the_kernel_itself_will_do() -> None:
    assert quiet.due(TIMER_LIST.format(next_timer=126737276844)) == [0.563368297, 0, 86289.916845270, 2]
    # What the kernel said before it was over.
    assert quiet.due(TIMER_LIST.format(next_timer=124000000000)) == [0.563368297, 0, 86289.916845270]


def test_this_kernel_says_what_is_due() -> None:
    try:
        with open("/proc/timer_list") as file:
            text = file.read()
    except PermissionError:
        pytest.skip("/proc/timer_list is for root")
    # Some sleep until the end of time.
    assert all(at >= 0 for at in quiet.due(text))


@pytest.mark.parametrize("text", ["", "now then", "cpu: 0\n #0: <0>, hrtimer_wakeup, S:01\n"])
def test_another_list_is_no_list_of_timers(text: str) -> None:
    with pytest.raises(ValueError, match="what time it is"):
        quiet.due(text)


def test_the_quietest_moment_is_before_the_longest_time_without_anything() -> None:
    # Five of once a second, of which the last two come late; one of long after.
    assert quiet.quietest([0.563, 0.58, 0.596, 0.775, 0.777, 2.27, 8.0]) == pytest.approx((0.777, 0.786))
    assert quiet.quietest([0.5]) == (0.5, 1.0)
    # Now is best where what comes first comes late, and comes soon after the one before.
    assert quiet.quietest([0.9, 0.95]) == pytest.approx((0.95, 0.95))
    assert quiet.quietest([0.9, 0.95, 1.1]) == (0.0, 0.9)
    assert quiet.quietest([3.0]) == (0.0, 3.0)
    assert quiet.quietest([]) == (0.0, math.inf)


@given(st.lists(st.floats(0, 100), max_size=50))
def test_nothing_is_due_between_the_quietest_moment_and_the_time_that_is_hoped_for(times: list[float]) -> None:
    at, gap = quiet.quietest(times)
    assert at in (0.0, *times) and at < quiet.PERIOD_S
    assert not [time for time in times if at < time < (at + gap) * (1 - 1e-9)]
