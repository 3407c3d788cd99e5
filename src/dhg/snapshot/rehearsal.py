"""What is run in a VM right before its freeze under software emulation, as a clone would: its translations are kept
(engine/checkpoint.py), so what is rehearsed is what is quick in a clone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import proc
from ..errors import SnapshotError
from ..guest import queries
from ..wire import client, frames

#: For one script.
TIMEOUT_S = 600.0

#: What every clone goes through, and what a script does that does next to nothing.
HELLOS = (b"print('hello')", b"import sys\nprint('hello', file=sys.stderr)\n", b"1 + 1")
#: How often those are run.
TIMES = 3


def rounds(*, bare: bool) -> list[list[client.Request]]:
    """The requests of each round: after each the guest makes ready and says HELLO. `bare` is a guest without Deephaven."""
    hellos = [_request(source) for source in HELLOS * TIMES]
    if bare:
        return [[], hellos]
    # Other numbers than the warm-up has, as formulas are compiled once.
    first, again = (_request(f"turn = {turn}\n{queries.REHEARSAL}".encode()) for turn in (2, 3))
    return [[first, _request(queries.REHEARSAL_NEW.encode())], [again, *hellos]]


def _request(source: bytes) -> client.Request:
    return client.Request(source, flags=frames.FLAG_TABLES | frames.FLAG_TABLE_META)


def run(vm: Any, requests: Sequence[client.Request]) -> None:
    """Run requests one after the other. Raises `SnapshotError` if one fails, `DeadlineExceeded`."""
    for request in requests:
        output: list[bytes] = []
        session = client.Session(vm.control, vm.stdout, vm.stderr)
        result = session.run(request, stdout=output.append, stderr=output.append, deadline=proc.Deadline(TIMEOUT_S))
        if result.exit_code:
            said = b"".join(output).decode("utf-8", "replace")
            raise SnapshotError(f"a rehearsal ended with {result.exit_code}", detail=said)
    vm.control.sendall(frames.frame(frames.PAUSE))
