"""The real thing: Deephaven, restored under QEMU, on memory that the pager serves. Needs a prepared snapshot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.pager import served
from tests.pager.conftest import compile_c

from dhg import proc
from dhg.pager import workingset
from dhg.snapshot import store
from dhg.wire import client

MILLION = b"from deephaven import empty_table; t = empty_table(1_000_000).update('x = i * 2'); print(t.size, end='')"


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory, needs_uffd: None) -> str:
    """The library to preload into QEMU."""
    return compile_c(
        Path(__file__).with_name("shim.c"), tmp_path_factory.mktemp("shim") / "shim.so", "-shared", "-fPIC"
    )


def run(shim: str, source: bytes, **how: Any) -> tuple[bytes, dict[str, Any]]:
    """The output of a script in a restored VM, and what its pager has counted."""
    out: list[bytes] = []
    machine, vm = served.restore(shim, **how)
    with machine:
        result = machine.run(
            client.Request(source), stdout=out.append, stderr=out.append, deadline=proc.Deadline(served.TIMEOUT_S)
        )
    assert vm.process.status is not None
    assert vm.pager.process.status == 0, vm.pager.said()
    assert result.exit_code == 0, out
    return b"".join(out), vm.counts


@pytest.fixture(scope="module")
def working_set(shim: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The working set of a hello."""
    path = str(tmp_path_factory.mktemp("set") / "set")
    output, counts = run(shim, b"print('hello')", mode="record", working_set=path)
    assert output == b"hello\n"
    assert counts["faults"] > 1000
    return path


@pytest.mark.parametrize("chunk", [None, 1 << 16])
def test_lazy(shim: str, chunk: int | None) -> None:
    output, counts = run(shim, b"print('hello')", mode="lazy", chunk=chunk)
    assert output == b"hello\n"
    # Far from all of it.
    assert 0 < counts["copied"] < 600 << 20
    assert run(shim, MILLION, mode="lazy", chunk=chunk)[0] == b"1000000"


def test_eager(shim: str) -> None:
    snapshot = store.open_snapshot()
    os.close(snapshot.lock)
    output, counts = run(shim, b"print('hello')", mode="eager")
    assert output == b"hello\n"
    assert counts["copied"] + counts["zeroed"] >= snapshot.memory_mib << 20
    assert counts["faults"] == 0
    assert run(shim, MILLION, mode="eager")[0] == b"1000000"


def test_working_set_first(shim: str, working_set: str) -> None:
    snapshot = store.open_snapshot()
    os.close(snapshot.lock)
    pages = sum(count for _, count in workingset.load(working_set, os.stat(f"{snapshot.path}/ram")))
    output, counts = run(shim, b"print('hello')", mode="set", working_set=working_set)
    assert output == b"hello\n"
    # What was recorded is what is needed: few faults are left.
    assert counts["faults"] < pages / 10
    assert run(shim, MILLION, mode="set", working_set=working_set)[0] == b"1000000"
