"""`dhg vm verify`: restores clones of a snapshot and looks at what must differ between them and what must agree."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from . import config, machine, proc
from .errors import DhgError, SnapshotError
from .files import sha256
from .snapshot import inventory, store
from .wire import client

#: How far a guest's clock may be off the host's.
CLOCK_TOLERANCE_MS = 50.0
RUN_TIMEOUT_S = 120.0

#: What every clone is asked, and what one with Deephaven is asked between the two halves.
PROBE_BEGIN = rb"""
import json, os, random, secrets, socket, ssl, sys, tempfile, time, uuid
def clock(name, read):
    # More than once: what is late on its way to the host is not the clock's fault.
    for _ in range(10):
        print('clock', name, read(), flush=True)
        time.sleep(0.01)
clock('time.time', time.time_ns)
found = {
    'os.urandom': os.urandom(8).hex(),
    'random.random': random.random(),
    'random.gauss': random.gauss(0, 1),
    'ssl.RAND_bytes': ssl.RAND_bytes(8).hex(),
    'uuid.uuid4': str(uuid.uuid4()),
    'secrets.token_hex': secrets.token_hex(8),
    'tempfile name': tempfile.mktemp(),
    'hostname': socket.gethostname(),
    'machine-id': open('/etc/machine-id').read().strip(),
    'boot_id': open('/proc/sys/kernel/random/boot_id').read().strip(),
}
same = {'python': sys.version.split()[0]}
"""

PROBE_DEEPHAVEN = rb"""
import jpy, numpy
java = jpy.get_type
system = java('java.lang.System')
clock('System.currentTimeMillis', lambda: system.currentTimeMillis() * 1_000_000)
found |= {
    'numpy.random.random': numpy.random.random(),
    'numpy default_rng': float(numpy.random.default_rng().random()),
    'Math.random': java('java.lang.Math').random(),
    'ThreadLocalRandom': java('java.util.concurrent.ThreadLocalRandom').current().nextLong(),
    'new Random()': java('java.util.Random')().nextLong(),
    'SplittableRandom': java('java.util.SplittableRandom')().nextLong(),
    'SecureRandom': java('java.security.SecureRandom')().nextLong(),
    'UUID.randomUUID': java('java.util.UUID').randomUUID().toString(),
}
from deephaven import empty_table
from deephaven.pandas import to_pandas
before = time.time_ns()
now = int(to_pandas(empty_table(1).update('t = epochNanos(now())'))['t'][0])
after = time.time_ns()
same |= {
    'now() lies between two calls of time.time': before // 1000 * 1000 <= now <= after,
    'table of 1,000 rows': int(to_pandas(empty_table(1000).update('x = i * 7 % 13').sum_by())['x'][0]),
}
"""

PROBE_END = b"print('result ' + json.dumps([found, same]), flush=True)\n"


class Check(NamedTuple):
    """One line of the verdict: `values` are what the clones (or the host) said."""

    name: str
    must: str
    values: list[str]
    ok: bool


class Which(NamedTuple):
    """The snapshot that is looked at."""

    version: str
    engine: str


class Clone:
    """What one restored VM said of itself."""

    def __init__(self) -> None:
        self.clocks: dict[str, float] = {}
        self.differ: dict[str, Any] = {}
        self.agree: dict[str, Any] = {}
        self.usage: dict[str, int] = {}
        self._held = b""

    def take(self, data: bytes) -> None:
        """Take output as it comes: a clock is compared with ours in the moment its line arrives."""
        arrived_ns = time.time_ns()
        *lines, self._held = (self._held + data).split(b"\n")
        for line in lines:
            kind, _, rest = line.decode().partition(" ")
            if kind == "clock":
                name, _, value = rest.rpartition(" ")
                # The line that was least delayed is nearest to the truth.
                off_ms = (int(value) - arrived_ns) / 1e6
                self.clocks[name] = max(off_ms, self.clocks.get(name, off_ms))
            elif kind == "result":
                self.differ, self.agree = json.loads(rest)


def probe(which: Which) -> Clone:
    """Restore one clone and question it. Raises `DhgError`."""
    clone = Clone()
    errors: list[bytes] = []
    with machine.restore(which.version, engine=which.engine) as vm:
        deadline = proc.Deadline(RUN_TIMEOUT_S)
        questions = PROBE_BEGIN + (b"" if vm.version == config.BARE else PROBE_DEEPHAVEN) + PROBE_END
        result = vm.run(client.Request(questions), stdout=clone.take, stderr=errors.append, deadline=deadline)
        clone.usage = vm.usage()
    if result.exit_code or not clone.differ:
        raise SnapshotError("the probe failed in a clone", detail=b"".join(errors).decode("utf-8", "replace"))
    return clone


def checksums(path: str) -> list[Check]:
    """Every file of a generation against the manifest."""
    with open(path + "/manifest.json") as file:
        manifest = json.load(file)
    checks = [
        Check(
            "manifest format", "agree", [str(manifest["format"]), str(store.FORMAT)], manifest["format"] == store.FORMAT
        )
    ]
    for name, known in manifest["files"].items():
        try:
            found = sha256(f"{path}/{name}")
        except OSError as error:
            found = str(error.strerror)
        checks.append(Check(f"sha256 of {name}", "agree", [known["sha256"][:16], found[:16]], known["sha256"] == found))
    return checks


def in_a_row(which: Which, count: int) -> Check:
    """`count` restores one after the other, each with an answer of its own."""
    times: list[float] = []
    wrong = 0
    for number in range(count):
        begin = time.monotonic()
        wrong += not _answers(which, number)
        times.append((time.monotonic() - begin) * 1000)
    return Check(
        f"{count} restores in a row",
        "be right",
        [f"{count - wrong} right", f"median {sorted(times)[count // 2]:.0f} ms"],
        not wrong,
    )


def at_once(which: Which, count: int) -> Check:
    """`count` restores at the same time, each with an answer of its own."""
    begin = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        wrong = sum(pool.map(lambda number: not _answers(which, number), range(count)))
    took = (time.monotonic() - begin) * 1000
    return Check(f"{count} at once", "be right", [f"{count - wrong} right", f"{took:.0f} ms for all"], not wrong)


def _answers(which: Which, number: int) -> bool:
    out: list[bytes] = []
    try:
        with machine.restore(which.version, engine=which.engine) as vm:
            request = client.Request(b"print(%d * 3)" % number)
            vm.run(request, stdout=out.append, stderr=out.append, deadline=proc.Deadline(RUN_TIMEOUT_S))
    except DhgError as error:
        out.append(str(error).encode())
    return b"".join(out) == b"%d\n" % (number * 3)


def verify(
    version: str | None = None, *, engine: str | None = None, restores: int = 20, together: int = 2
) -> list[Check]:
    """Every check, worst news included rather than raised; `restores` one after the other, `together` at once.

    Raises `SnapshotMissing` if there is nothing to verify.
    """
    version = store.resolve_version(version)
    snapshot = store.open_snapshot(version, engine=engine)
    os.close(snapshot.lock)
    which = Which(version, snapshot.engine)
    checks = checksums(snapshot.path)
    with open(snapshot.path + "/manifest.json") as file:
        inputs = json.load(file)["inputs"]
    try:
        inventory.check(snapshot.path, version, snapshot.engine, inputs)
        checks.append(Check("fits this host", "agree", [inputs["engine_version"]], True))
    except DhgError as error:
        checks.append(Check("fits this host", "agree", [str(error)], False))
    if not all(check.ok for check in checks):
        return checks
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(probe, which) for _ in range(2)]
        one, two = [run.result() for run in runs]
    for name in one.clocks:
        values = [clone.clocks[name] for clone in (one, two)]
        ok = all(abs(value) <= CLOCK_TOLERANCE_MS for value in values)
        checks.append(
            Check(
                f"{name} against the host",
                f"be within {CLOCK_TOLERANCE_MS:g} ms",
                [f"{value:+.1f} ms" for value in values],
                ok,
            )
        )
    for name, value in one.differ.items():
        checks.append(Check(name, "differ", [str(value), str(two.differ[name])], value != two.differ[name]))
    for name, value in one.agree.items():
        checks.append(
            Check(name, "agree", [str(value), str(two.agree[name])], value == two.agree[name] and value is not False)
        )
    for name, size in one.usage.items():
        checks.append(Check(name.replace("_", " "), "be known", [str(size), str(two.usage[name])], True))
    checks += [in_a_row(which, restores), at_once(which, together)]
    return checks
