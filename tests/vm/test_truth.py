"""Clones tell the time, differ in every random number, and agree in every result."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.conftest import Dhg

from dhg import machine, proc, verify
from dhg.wire import client


def test_verify_finds_nothing_off(dhg: Dhg) -> None:
    done = dhg("vm", "verify", "--json", "--restores", "3")
    found = json.loads(done.stdout)
    bad = [check for check in found["checks"] if not check["ok"]]
    assert (done.returncode, found["ok"], bad) == (0, True, [])
    names = {check["name"] for check in found["checks"]}
    assert {
        "random.random",
        "Math.random",
        "SecureRandom",
        "boot_id",
        "time.time against the host",
        "sha256 of ram",
    } <= names


def test_the_clock_is_right_under_load_too() -> None:
    # Eight at once on few cores: each request is long on its way, and must not be late by that.
    with ThreadPoolExecutor(8) as pool:
        clones = [run.result() for run in [pool.submit(_clock_offset_ms) for _ in range(8)]]
    # What a question and its answer took may all have been on one way.
    assert all(abs(offset) <= verify.CLOCK_TOLERANCE_MS + took / 2 for took, offset in clones), clones


def _clock_offset_ms() -> tuple[float, float]:
    """Round trip and offset of the quickest of several questions: a late answer is not the clock's fault."""
    reader, writer = (sock for sock in __import__("socket").socketpair())
    offsets: list[tuple[float, float]] = []
    asked = [time.time_ns()]

    held = b""

    def answered(data: bytes) -> None:
        nonlocal held
        now = time.time_ns()
        held += data
        if not held.endswith(b"\n"):
            return
        said, held = held, b""
        offsets.append(((now - asked[0]) / 1e6, (int(said) - (now + asked[0]) / 2) / 1e6))
        if len(offsets) == 20:
            writer.close()
            return
        asked[0] = time.time_ns()
        writer.sendall(b"?\n")

    with reader, writer:
        writer.sendall(b"?\n")
        source = b"import sys, time\nfor _ in sys.stdin: print(time.time_ns(), flush=True)"
        with machine.restore() as vm:
            request = client.Request(source, stdin=True)
            vm.run(request, stdout=answered, stderr=print, deadline=proc.Deadline(100), stdin=reader.fileno())
    return min(offsets)


def test_the_monotonic_clock_goes_on_where_it_stood_and_no_timer_is_overdue(dhg: Dhg) -> None:
    code = """
import time
a = time.monotonic(); b = time.monotonic()
begin = time.perf_counter(); time.sleep(0.2); took = time.perf_counter() - begin
print(b >= a, a < 3600, 0.19 < took < 5)
"""
    assert dhg("exec", "--vm", "-c", code).stdout == b"True True True\n"


def test_eight_clones_share_no_random_number() -> None:
    source = b"""
import random, uuid, numpy, jpy
print(random.random(), numpy.random.rand(), uuid.uuid4(), jpy.get_type('java.lang.Math').random(),
      jpy.get_type('java.util.UUID').randomUUID().toString(), sep='\\n')
"""
    seen: list[str] = []
    lock = threading.Lock()

    def one(_: int) -> None:
        out: list[bytes] = []
        with machine.restore() as vm:
            vm.run(client.Request(source), stdout=out.append, stderr=out.append, deadline=proc.Deadline(100))
        with lock:
            seen.extend(b"".join(out).decode().split())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(8)))
    assert len(seen) == 40
    assert len(set(seen)) == 40


def test_a_snapshot_that_is_days_old_tells_the_time_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # For the guest it is the same whether it has slept for three days or its host's clock is three days ahead.
    ahead_ns = 3 * 86400 * 1_000_000_000
    found = machine.Machine._clock_of

    def later(*args: Any) -> client.Clock:
        clock = found(*args)
        return client.Clock(clock.resumed_ns + ahead_ns, clock.base_ns)

    monkeypatch.setattr(machine.Machine, "_clock_of", later)
    source = b"""
import time
import jpy
from deephaven import empty_table
from deephaven.pandas import to_pandas
system = jpy.get_type('java.lang.System')
table = empty_table(1).update('t = epochNanos(now())')
for _ in range(10):
    print(time.time_ns(), system.currentTimeMillis() * 1_000_000, flush=True)
    time.sleep(0.01)
print(time.time_ns() - int(to_pandas(table)['t'][0]))
"""
    held = b""
    late_ms: list[float] = []
    lags: list[int] = []

    def take(data: bytes) -> None:
        nonlocal held
        now = time.time_ns() + ahead_ns
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            numbers = [int(word) for word in line.split()]
            if len(numbers) == 2:
                late_ms.append(max(abs(now - number) / 1e6 for number in numbers))
            else:
                lags.extend(numbers)

    with machine.restore() as vm:
        vm.run(client.Request(source), stdout=take, stderr=print, deadline=proc.Deadline(100))
    assert min(late_ms) <= verify.CLOCK_TOLERANCE_MS, late_ms
    # now() in a query, against the guest's own clock some time later.
    assert 0 <= lags[0] < 60_000_000_000
