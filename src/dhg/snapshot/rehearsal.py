"""What is run in a VM right before its freeze under software emulation, as a clone would: its translations are kept
(engine/checkpoint.py), so what is rehearsed is what is quick in a clone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import proc
from ..errors import HostError, SnapshotError
from ..guest import queries
from ..share import beneath
from ..share.start import READ_ONLY, FileServer
from ..wire import client, frames

#: For one script.
TIMEOUT_S = 600.0

#: What every clone goes through, and what a script does that does next to nothing.
HELLOS = (b"print('hello')", b"import sys\nprint('hello', file=sys.stderr)\n", b"1 + 1")
#: How often those are run.
TIMES = 3
#: The host's files that are used: a module, and what is read. What Python knows of the directory is forgotten; the last look takes
#: along what the guest's kernel has had to say of files that were closed, so that it is not said in a clone.
FILES = """
import os, sys
import dhg_rehearsal
with open('dhg_rehearsal.csv') as file:
    assert len(file.readlines()) == dhg_rehearsal.rows + 1
with open('dhg_rehearsal.csv', 'rb') as file:
    assert file.read(3) == b'sym'
assert len(os.listdir()) == 2 and os.path.exists('dhg_rehearsal.py')
{more}
del sys.modules['dhg_rehearsal']
sys.path_importer_cache.pop(os.getcwd(), None)
os.path.lexists('dhg_rehearsal.none')
"""
CSV = "from deephaven import read_csv; assert read_csv('dhg_rehearsal.csv').size == dhg_rehearsal.rows"
ROWS = 100
BESIDE = {
    "dhg_rehearsal.py": f"rows = {ROWS}\n",
    "dhg_rehearsal.csv": "sym,price,qty\n" + "".join(f"S{n % 3},{n}.5,{n}\n" for n in range(ROWS)),
}


def rounds(*, bare: bool) -> list[list[client.Request]]:
    """The requests of each round: after each the guest makes ready and says HELLO. `bare` is a guest without Deephaven."""
    hellos = [_request(source) for source in HELLOS * TIMES]
    files = _files("" if bare else CSV)
    if bare:
        return [files, [*files, *hellos]]
    # Other numbers than the warm-up has, as formulas are compiled once.
    first, again = (_request(f"turn = {turn}\n{queries.REHEARSAL}".encode()) for turn in (2, 3))
    return [[*files, first, _request(queries.REHEARSAL_NEW.encode())], [*files, again, *hellos]]


def _files(more: str) -> list[client.Request]:
    try:
        beneath.check()
    except HostError:
        # Here `exec` gets no files either.
        return []
    return [_request(FILES.format(more=more).encode())]


def _request(source: bytes) -> client.Request:
    return client.Request(source, flags=frames.FLAG_TABLES | frames.FLAG_TABLE_META)


@contextmanager
def directory(place: str) -> Iterator[str]:
    """The directory that stands for the user's, made in `place`."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=place) as path:
        for name, text in BESIDE.items():
            Path(path, name).write_text(text)
        yield path


def run(vm: Any, requests: Sequence[client.Request], folder: str) -> None:
    """Run requests one after the other, with the directory `folder` as the working directory, as `exec` does.

    Raises `SnapshotError` if one fails, `DeadlineExceeded`.
    """
    servers: list[FileServer] = []

    def serve() -> int:
        servers.append(FileServer(vm.files.fileno(), ((folder, READ_ONLY),)))
        return servers[-1].process.pidfd

    for request in requests:
        output: list[bytes] = []
        failed = None
        session = client.Session(vm.control, vm.stdout, vm.stderr)
        try:
            result = session.run(
                request,
                stdout=output.append,
                stderr=output.append,
                deadline=proc.Deadline(TIMEOUT_S),
                files=(vm.files, serve),
            )
        finally:
            while servers:
                failed = servers.pop().kill() or failed
        if failed:
            # The channel has been closed with it, and no clone would have files.
            raise SnapshotError("in a rehearsal the server of the host's files ended", detail=failed)
        if result.exit_code:
            said = b"".join(output).decode("utf-8", "replace")
            raise SnapshotError(f"a rehearsal ended with {result.exit_code}", detail=said)
    vm.control.sendall(frames.frame(frames.PAUSE))
