"""The trial of a new snapshot: clones run before it is put in place, and what a restore needs to know is found out from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .. import proc
from ..engine import firecracker, qmp
from ..errors import DhgError, SnapshotError
from ..files import sync_dir, write_synced
from ..machine import Machine
from ..pager import process as pager
from ..share.start import READ_ONLY
from ..wire import client, frames
from . import readahead, store

#: How often the guest's clock is asked for, how closely the moment of a resume must be known, and how often that is tried.
CLOCK_ROUNDS = 30
RESUME_WITHIN_NS = 5_000_000
TRIES = 5
#: How many clones are looked at for the pages that they touch.
RECORDINGS = 4


def run(path: str, version: str, engine: str, progress: Callable[[str, str], None]) -> None:
    """Restore the new generation and run a script, twice: a VMM that cannot do it must show here, not in `exec`, and so must a
    random number that two clones have in common (guest/reseed.py writes to where their generators were at the freeze).

    Then find what the guest's monotonic clock says at the moment of a resume, and which pages a clone touches in any case, and add
    both to `launch`.
    """
    lock = os.open(f"{path}/lock", os.O_RDONLY | os.O_CLOEXEC)
    try:
        snapshot = store.read(path, version, engine, lock)
        if snapshot.checkpoint:
            why = _fails(snapshot)
            if why:
                progress("checkpoint", f"not used: {why}")
                _drop_checkpoint(path)
                snapshot.checkpoint = None
        with ThreadPoolExecutor(2) as beside:
            one, two = beside.map(_draw, [snapshot, snapshot])
        same = [str(number) for number, (left, right) in enumerate(zip(one, two, strict=True)) if left == right]
        if same:
            raise SnapshotError(f"two clones drew the same random numbers: {', '.join(same)} of {len(one)}")
        found: list[tuple[int, int]] = []
        while len(found) < TRIES and (not found or min(found)[0] > RESUME_WITHIN_NS):
            with Machine(snapshot) as machine:
                base_ns, off_ns = machine.measure_base(rounds=CLOCK_ROUNDS, timeout_s=120.0)
            found.append((off_ns, base_ns))
        ahead = own = b""
        if engine == "firecracker":
            _record_working_set(snapshot)
        else:
            ahead, own = _touched(snapshot)
    finally:
        os.close(lock)
    with open(f"{path}/launch", "rb") as file:
        launch = file.read()
    launch += frames.field(store.L_BASE_NS, min(found)[1]) + frames.field(store.L_AHEAD, ahead)
    launch += frames.field(store.L_AHEAD_OWN, own)
    write_synced(f"{path}/launch.tmp", launch)
    os.rename(f"{path}/launch.tmp", f"{path}/launch")
    sync_dir(path)


def _fails(snapshot: store.Snapshot) -> str | None:
    """Why the checkpoint of a snapshot does not do, if it does not."""
    output: list[bytes] = []
    try:
        with Machine(snapshot) as machine:
            machine.run(client.Request(b"1"), stdout=output.append, stderr=output.append, deadline=proc.Deadline(120.0))
            return machine.fallback
    except DhgError as error:
        return str(error)


def _drop_checkpoint(path: str) -> None:
    """Do without one that does not work here: a restore would try it each time."""
    with open(f"{path}/launch", "rb") as file:
        found = frames.fields(file.read())
    kept = [
        (key, value) for key, values in found.items() for value in values if key not in (store.L_MAPPED, store.L_HOST)
    ]
    own = os.fsencode(f"{path}/checkpoint")
    kept = [(key, value) for key, value in kept if key != store.L_CHECK or value.split(b" ", 2)[2] != own]
    write_synced(f"{path}/launch", b"".join(frames.field(key, value) for key, value in kept))
    with open(f"{path}/manifest.json") as file:
        manifest = json.load(file)
    del manifest["files"]["checkpoint"]
    write_synced(f"{path}/manifest.json", json.dumps(manifest, indent=1).encode())
    os.unlink(f"{path}/checkpoint")


#: Draws from every generator whose state is in a snapshot, those of NumPy and the JVM where there are these.
DRAWS = b"""
import random
draws = [random.random()]
try:
    import jpy, numpy
    java = jpy.get_type
except ImportError:
    pass
else:
    draws += [numpy.random.random(), java("java.lang.Math").random(), java("java.security.SecureRandom")().nextLong()]
    draws += [java("java.util.concurrent.ThreadLocalRandom").current().nextLong()]
    draws += [java(name)().nextLong() for name in ("java.util.Random", "java.util.SplittableRandom")]
print(*draws)
"""


def _draw(snapshot: store.Snapshot) -> list[bytes]:
    output: list[bytes] = []
    with Machine(snapshot) as machine:
        request = client.Request(DRAWS)
        result = machine.run(request, stdout=output.append, stderr=output.append, deadline=proc.Deadline(120.0))
    if result.exit_code != 0 or not output:
        said = b"".join(output).decode("utf-8", "replace")
        raise SnapshotError(f"the new snapshot does not run a script: exit {result.exit_code}", detail=said)
    return b"".join(output).split()


def _touched(snapshot: store.Snapshot) -> tuple[bytes, bytes]:
    """The pages of `ram` and `checkpoint` that a script touches which does next to nothing: any of some clones of it, run as `exec`
    runs it. A page that is missing in the list costs much more than one that is there for nothing: where a disk's read-ahead is
    8 MB, it is read with all of those.
    """
    ram, checkpoint = f"{snapshot.path}/ram", snapshot.checkpoint
    pages, own = set[int](), set[int]()
    flags = frames.FLAG_TABLES | frames.FLAG_TABLE_META
    for _ in range(RECORDINGS):
        if checkpoint:
            readahead.forget(ram)
            readahead.forget(checkpoint)
        output: list[bytes] = []
        with Machine(snapshot, _record if checkpoint else None) as machine:
            machine.run(
                client.Request(b"print('hello')", flags=flags),
                stdout=output.append,
                stderr=output.append,
                deadline=proc.Deadline(120.0),
                shares=((snapshot.path, READ_ONLY),),
            )
            pid = machine.vm.process.pid
            pages |= readahead.record(pid, ram)
            if checkpoint:
                own |= readahead.record(pid, checkpoint)
    return readahead.pack(pages), readahead.pack(own)


def _record(snapshot: store.Snapshot) -> qmp.Vm:
    """Go on from a checkpoint so that no page is read, and so none is mapped, because another one is used."""
    assert snapshot.checkpoint
    return qmp.go_on(
        snapshot.checkpoint, snapshot.argv, lock=snapshot.lock, memory_mib=snapshot.memory_mib, single=True
    )


#: What a typical script touches: an import, a table with a formula, an aggregation, a preview.
TYPICAL = b"""
from deephaven import agg, empty_table
t = empty_table(1000).update(["x = i", "y = x * 2.0", "g = i % 7"])
s = t.agg_by([agg.sum_("x"), agg.avg("y")], by=["g"])
print(s.size)
"""


def _record_working_set(snapshot: store.Snapshot) -> None:
    """Restore once more and note which pages a typical script touches; later restores have those before the guest goes on."""
    output: list[bytes] = []

    def start(what: store.Snapshot) -> firecracker.Vm:
        return firecracker.start(
            what.path,
            what.argv[0],
            version=what.engine_version,
            lock=what.lock,
            memory_mib=what.memory_mib,
            mode=pager.RECORD,
        )

    with Machine(snapshot, start) as machine:
        source = TYPICAL if snapshot.version[0].isdigit() else b"print(6 * 7)"
        request = client.Request(source, flags=frames.FLAG_TABLES)
        result = machine.run(request, stdout=output.append, stderr=output.append, deadline=proc.Deadline(120.0))
        if result.exit_code:
            raise SnapshotError("the script that records the working set failed", detail=repr(b"".join(output)))
        assert isinstance(machine.vm, firecracker.Vm)
        firecracker.record(machine.vm)
