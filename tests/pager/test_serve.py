"""What the pager does in each case, against a stand-in VMM: real userfaultfd, real processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tests.pager.conftest import PAGE, Session, memory_file, serve

from dhg import proc
from dhg.errors import MachineError
from dhg.pager import workingset


def sparse(path: Path, pages: int, data: list[int]) -> str:
    """A memory file that is a hole but for the pages `data`."""
    with open(path, "wb") as file:
        for page in data:
            file.seek(page * PAGE)
            file.write(bytes([page % 250 + 1]) * PAGE)
        file.truncate(pages * PAGE)
    return str(path)


def present(session: Session, first: int, count: int) -> list[int]:
    """Which of some pages are there."""
    return [first + at for at, there in enumerate(session.ask("p", first, count)) if there == "1"]


def settled(session: Session, first: int, count: int, wanted: list[int]) -> bool:
    """Whether `wanted` are the pages that are there, once the pager has filled what is left of its chunks."""
    ends = time.monotonic() + 10
    while present(session, first, count) != wanted and time.monotonic() < ends:
        time.sleep(0.005)
    # ... and stays there.
    time.sleep(0.02)
    return present(session, first, count) == wanted


def test_a_fault_fills_its_chunk_and_no_other(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 64, [*range(64)])
    with serve(vmm_program, tmp_path, memory, (64,), chunk=8 * PAGE) as session:
        assert session.ask("r", 19) == "same"
        assert settled(session, 0, 64, [*range(16, 24)])
        assert session.ask("r", 17) == "same"
        status, counts = session.end()
    assert status == 0
    assert (counts["faults"], counts["copied"], counts["zeroed"]) == (1, 8 * PAGE, 0)


def test_chunks_are_clipped_at_the_end_of_each_region(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 30, [*range(30)])
    with serve(vmm_program, tmp_path, memory, (5, 11, 14), chunk=8 * PAGE) as session:
        # Aligned within the region: its first page is 5.
        assert session.ask("r", 14) == "same"
        assert settled(session, 0, 30, [13, 14, 15])
        assert session.ask("r", 4) == "same"
        assert settled(session, 0, 30, [0, 1, 2, 3, 4, 13, 14, 15])
        assert session.ask("r", 16, 14) == " ".join(["same"] * 14)


def test_holes_come_as_zero_pages_and_are_not_copied(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 512, [3, 4, 100])
    with serve(vmm_program, tmp_path, memory, (512,)) as session:
        assert session.ask("r", 2, 4) == "zero same same zero"
        assert settled(session, 0, 512, [*range(512)])
        status, counts = session.end()
    assert (status, counts["copied"], counts["zeroed"]) == (0, 3 * PAGE, 509 * PAGE)


def test_a_partial_last_page_ends_in_zeros(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 9, [*range(9)])
    os.truncate(memory, 9 * PAGE - 100)
    with serve(vmm_program, tmp_path, memory, (9,)) as session:
        # The stand-in compares with its own mapping of the file.
        assert session.ask("r", 8) == "same"


def test_removed_pages_are_zeros_for_good(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 64, [*range(64)])
    with serve(vmm_program, tmp_path, memory, (40, 24), chunk=16 * PAGE) as session:
        assert session.ask("r", 0, 2) == "same same"
        session.ask("d", 1)
        assert settled(session, 0, 3, [0, 2])
        assert session.ask("r", 0, 3) == "same zero same"
        # Again, and a page that was never there: its content in the file is history.
        session.ask("d", 1)
        session.ask("d", 38)
        assert session.ask("r", 0, 3) == "same zero same"
        assert session.ask("r", 37, 4) == "same zero same same"
        # Filling the chunk around leaves what was removed to itself.
        session.ask("d", 50, 4)
        assert session.ask("r", 49) == "same"
        assert settled(session, 48, 8, [48, 49, 54, 55])
        status, counts = session.end()
    assert (status, counts["removed"]) == (0, 7 * PAGE)


def test_eager_has_everything_there_when_it_says_so(vmm_program: str, tmp_path: Path) -> None:
    memory = memory_file(tmp_path / "ram", 3000, seed=1)
    with serve(vmm_program, tmp_path, memory, (1000, 2000), mode="eager") as session:
        assert len(present(session, 0, 3000)) == 3000
        assert set(session.ask("r", 0, 3000).split()) <= {"same", "zero"}
        status, counts = session.end()
    assert (status, counts["faults"]) == (0, 0)
    assert counts["copied"] + counts["zeroed"] == 3000 * PAGE


def test_a_recorded_working_set_is_there_before_the_guest_resumes(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 2000, [*range(0, 2000, 2), 1999])
    record = str(tmp_path / "set")
    with serve(vmm_program, tmp_path, memory, (1500, 500), mode="record", working_set=record) as session:
        for page in (700, 3, 5, 1499, 1500, 1999, 9):
            session.ask("r", page)
        assert session.end()[0] == 0
    ranges = workingset.load(record, os.stat(memory))
    assert ranges == [(3, 7), (700, 1), (1499, 2), (1999, 1)]
    with serve(vmm_program, tmp_path, memory, (1500, 500), mode="set", working_set=record) as session:
        assert present(session, 0, 2000) == [3, 4, 5, 6, 7, 8, 9, 700, 1499, 1500, 1999]
        assert session.ask("r", 3, 3) == "zero same zero"
        # The rest lazily, around what is there.
        assert session.ask("r", 1498, 4) == "same zero same zero"
        status, counts = session.end()
    assert (status, counts["faults"]) == (0, 2)


def test_a_working_set_of_another_memory_file_is_left_alone(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 100, [1])
    record = str(tmp_path / "set")
    workingset.save(record, [(0, 50)], os.stat(memory))
    os.utime(memory, ns=(1, 1))
    with serve(vmm_program, tmp_path, memory, (100,), mode="set", working_set=record) as session:
        assert present(session, 0, 100) == []


@pytest.mark.parametrize("how", ["s", "sf", "l", "slf", "k"])
def test_the_message_may_be_split_and_late(vmm_program: str, tmp_path: Path, how: str) -> None:
    memory = sparse(tmp_path / "ram", 20, [*range(20)])
    with serve(vmm_program, tmp_path, memory, (12, 8), how=how) as session:
        assert session.ask("r", 13) == "same"
        assert session.end()[0] == 0


def ended(process: proc.Process) -> int | None:
    """How a process ends, within 10 s."""
    return process.wait(10.0)


def test_a_truncated_file_is_refused_and_the_vmm_killed(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 20, [*range(20)])
    os.truncate(memory, 19 * PAGE)
    with serve(vmm_program, tmp_path, memory, (20,), ready=False) as session:
        assert ended(session.pager.process) == 1
        assert "too short" in (session.pager.said() or "")
        # Nobody serves it: it must not hang.
        assert ended(session.vmm) == -signal.SIGKILL


def test_a_file_truncated_under_us_ends_both(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 2000, [*range(2000)])
    with serve(vmm_program, tmp_path, memory, (2000,), chunk=PAGE) as session:
        assert session.ask("r", 5) == "same"
        os.truncate(memory, 10 * PAGE)
        # Beyond its end is a hole now, so what was data there would read as zeros.
        os.write(session._questions, b"t 1000 1\n")
        assert ended(session.vmm) == -signal.SIGKILL
        assert ended(session.pager.process) == 1
        assert "truncated" in (session.pager.said() or "")


def test_half_a_message_is_refused(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 20, [1])
    with serve(vmm_program, tmp_path, memory, (20,), how="x", ready=False) as session:
        assert ended(session.pager.process) == 1
        assert "hung up" in (session.pager.said() or "")
        assert ended(session.vmm) == -signal.SIGKILL


def test_the_death_of_the_pager_kills_the_vmm(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 20, [*range(20)])
    with serve(vmm_program, tmp_path, memory, (20,), chunk=PAGE) as session:
        assert session.ask("r", 1) == "same"
        os.kill(session.pager.process.pid, signal.SIGKILL)
        assert ended(session.vmm) == -signal.SIGKILL


def test_the_death_of_the_vmm_ends_the_pager(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 20, [*range(20)])
    with serve(vmm_program, tmp_path, memory, (20,)) as session:
        assert session.ask("r", 1) == "same"
        session.vmm.kill()
        assert ended(session.pager.process) == 0


def test_a_vmm_that_dies_before_its_message_ends_the_pager(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 20, [1])
    with serve(vmm_program, tmp_path, memory, (20,), how="l", ready=False) as session:
        time.sleep(0.08)
        session.vmm.kill()
        with pytest.raises(MachineError):
            session.pager.wait_ready(proc.Deadline(10.0))
        assert ended(session.pager.process) == 0


def test_nothing_stays_open_in_us(vmm_program: str, tmp_path: Path) -> None:
    memory = sparse(tmp_path / "ram", 20, [*range(20)])
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with serve(vmm_program, tmp_path, memory, (20,)) as session:
            assert session.ask("r", 1) == "same"
    assert sorted(os.listdir("/proc/self/fd")) == before
