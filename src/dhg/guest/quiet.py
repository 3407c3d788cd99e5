"""The moment of the freeze: the one after which nothing but the script runs in a clone for the longest time.

Threads of the JVM and of Deephaven wake up by themselves, most of them once a second, a few every five. Frozen right after, a clone
runs its first half second undisturbed: under emulation what such a thread executes would have to be translated first. The kernel says
when each is due (/proc/timer_list, for root), so nothing needs to be watched.

Guest code: standard library only.
"""

from __future__ import annotations

import math
import time

#: What is due within this time, in seconds, is taken to be due again this long after.
PERIOD_S = 1.0
#: With so many seconds to come without anything it is quiet enough. After so many in which there was no such moment half of that
#: will do, and after twice as many what comes next.
GOAL_S = 0.75
LOOK_S = 2.0
#: How long what has woken up gets before it is asked whether it is done, and how often that is asked.
STEP_S = 0.01
STEPS = 200


def wait() -> None:
    """Return when the other threads have just been at work, and what the kernel has put off is done."""
    began = time.monotonic()
    while (spent_s := time.monotonic() - began) < 2 * LOOK_S:
        pause_s, _ = quietest(due(_timer_list()))
        time.sleep(pause_s)
        _until_idle()
        # Asked again: what woke up may have set a time that nobody knew of, and some look every 10 ms for a while.
        if min(due(_timer_list()), default=math.inf) >= (GOAL_S if spent_s < LOOK_S else GOAL_S / 2):
            break
    # The last, because looking at files leaves something to be done later, too.
    _run_put_off()


def quietest(times: list[float]) -> tuple[float, float]:
    """How long to wait until a moment after which nothing is due for long, and how long that will be, both in seconds.

    `times` are when something is due, in seconds from now. The moments that are looked at are now and those of what is due within
    the period.
    """
    soon = sorted(at for at in times if at < PERIOD_S)
    later = min((at for at in times if at >= PERIOD_S), default=math.inf)
    if not soon:
        return 0.0, later
    following = [*soon[1:], soon[0] + PERIOD_S]
    gaps = [(min(after, later) - at, at) for at, after in zip([0.0, *soon], [soon[0], *following], strict=True)]
    gap, at = max(gaps, key=lambda pair: (pair[0], -pair[1]))
    return at, gap


def due(text: str) -> list[float]:
    """When sleeping threads are due, in seconds from now, from what /proc/timer_list has. Raises `ValueError` if it is none.

    The tick is none of them: it runs when something else does.
    """
    now_ns = None
    found = []
    sleeper = False
    for line in text.splitlines():
        if line.startswith("now at "):
            now_ns = int(line.split()[2])
        elif line.startswith("  .next_timer "):
            # The kernel's own, as of the last time that it idled. One that is over says nothing.
            if now_ns is not None and (at_ns := int(line.split()[2])) > now_ns:
                found.append((at_ns - now_ns) / 1e9)
        elif line.startswith(" #"):
            if line.startswith(" # expires at "):
                if sleeper and now_ns is not None:
                    # The latest it may be, which is when it is if nothing else wakes the CPU before.
                    found.append(max(0, int(line.split("[in ")[1].split(" to ")[1].split()[0])) / 1e9)
            else:
                sleeper = ", hrtimer_wakeup," in line
    if now_ns is None:
        raise ValueError("a list of timers that does not say what time it is")
    return found


def _timer_list() -> str:
    with open("/proc/timer_list") as file:
        return file.read()


def _until_idle() -> None:
    """Wait until no thread but this one runs or wants to."""
    for _ in range(STEPS):
        time.sleep(STEP_S)
        with open("/proc/loadavg") as file:
            if file.read().split()[3].partition("/")[0] == "1":
                return


def _run_put_off() -> None:
    """Have the kernel do what it puts off while it idles (deferrable timers, RCU), which it does at the first ticks after."""
    for _ in range(2):
        until = time.monotonic() + 2 * STEP_S
        while time.monotonic() < until:
            pass
        time.sleep(STEP_S / 2)
