"""A real vCPU, whose faults come by way of KVM, with its memory served by the pager. Needs a `/dev/kvm` that opens: a guest of
a few instructions runs even where no stock kernel boots."""

from __future__ import annotations

import os
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from tests.pager.conftest import FD_LEASH, compile_c, memory_file

from dhg import proc
from dhg.engine import probe
from dhg.pager import handshake, workingset
from dhg.pager.process import PagerProcess

PAGES = 2048


@pytest.fixture(scope="module")
def vcpu_program(tmp_path_factory: pytest.TempPathFactory, needs_uffd: None) -> str:
    """The VMM and its guest."""
    closed = probe.kvm_device()
    if closed is not None:
        pytest.skip(closed.reason)
    return compile_c(Path(__file__).with_name("vcpu.c"), tmp_path_factory.mktemp("vcpu") / "vcpu")


@pytest.mark.parametrize(
    ("mode", "chunk"),
    [("lazy", None), ("lazy", 4096), ("lazy", 1 << 16), ("eager", None), ("set", None), ("record", None)],
)
def test_a_guest_sees_what_the_file_has(vcpu_program: str, tmp_path: Path, mode: str, chunk: int | None) -> None:
    memory = memory_file(tmp_path / "ram", PAGES, seed=7)
    code = subprocess.run([vcpu_program, "code"], capture_output=True, check=True, timeout=10).stdout
    with open(memory, "r+b") as file:
        file.write(code)
    working_set = str(tmp_path / "set")
    if mode == "set":
        workingset.save(working_set, [(0, 100), (300, 700)], os.stat(memory))
    path = f"{tmp_path}/s"
    output = os.memfd_create("vcpu")
    with closing(handshake.listen(path)) as listener:
        pager = PagerProcess(listener, memory, mode=mode, chunk=chunk, working_set=working_set)
    with pager:
        fds = {1: output, 2: output, FD_LEASH: pager.vmm_leash}
        with proc.spawn([vcpu_program, "run", path, memory, str(PAGES)], fds=fds) as vmm:
            pager.tie(vmm.pid)
            status = vmm.wait(60.0)
        said = os.pread(output, 4096, 0).decode()
        os.close(output)
        assert status == 0, f"{said} {pager.said()}"
        sums = [line.split() for line in said.splitlines()]
        assert len(sums) == 3
        assert all(wanted == seen for wanted, seen in sums)
        assert sums[0] != sums[1] != sums[2]
        if mode == "record":
            pager.counts()
            assert workingset.load(working_set, os.stat(memory)) == [(0, PAGES)]
