"""A stand-in VMM (vmm.c), built once, and the pager's real process to serve it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from dhg import proc
from dhg.pager import handshake, uffd
from dhg.pager.process import PagerProcess

PAGE = uffd.PAGE
FD_LEASH = 100


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a userfaultfd where this machine has none for us."""
    why = uffd.available()
    if why is None:
        return
    for item in items:
        if "tests/pager" in str(item.path) and "needs_uffd" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=why))


def compile_c(source: Path, target: Path, *flags: str) -> str:
    """Build a C program or library; skips the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    argv = [compiler, *["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-D_GNU_SOURCE"], *flags]
    argv += ["-o", str(target), str(source), "-ldl"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return str(target)


@pytest.fixture(scope="session")
def needs_uffd() -> None:
    """Mark of the tests that need a kernel with userfaultfd (see `pytest_collection_modifyitems`)."""


@pytest.fixture(scope="session")
def vmm_program(tmp_path_factory: pytest.TempPathFactory, needs_uffd: None) -> str:
    """The stand-in VMM."""
    return compile_c(Path(__file__).with_name("vmm.c"), tmp_path_factory.mktemp("vmm") / "vmm")


def memory_file(path: Path, pages: int, *, seed: int, partial: int = 0) -> str:
    """A sparse file of random pages, pages of zeros, and holes; `partial` bytes short of whole pages. Its path."""
    source = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(pages * PAGE)
        page = 0
        while page < pages:
            run = min(source.choice((1, 2, 3, 8, 40, 300)), pages - page)
            kind = source.random()
            if kind < 0.5:
                file.seek(page * PAGE)
                file.write(source.randbytes(run * PAGE))
            elif kind < 0.6:
                file.seek(page * PAGE)
                file.write(bytes(run * PAGE))
            page += run
        # A page that is known to be data, and the last one, too.
        for known in (0, pages - 1):
            file.seek(known * PAGE)
            file.write(source.randbytes(PAGE))
        file.truncate(pages * PAGE - partial)
    return str(path)


class Session:
    """A stand-in VMM and the pager that serves it."""

    def __init__(self, vmm: proc.Process, pager: PagerProcess, answers: IO[bytes], questions: int) -> None:
        self.vmm = vmm
        self.pager = pager
        self._answers = answers
        self._questions = questions

    def ask(self, verb: str, first: int, count: int = 1) -> str:
        """One command of vmm.c's, and its answer."""
        os.write(self._questions, f"{verb} {first} {count}\n".encode())
        line = self._answers.readline()
        assert line, f"the VMM ended; pager: {self.pager.said()}"
        return line.decode().strip()

    def end(self, timeout_s: float = 60.0) -> tuple[int | None, dict[str, Any]]:
        """Close the VMM's stdin and wait for its end: its exit status, and what the pager counted."""
        os.close(self._questions)
        self._questions = -1
        status = self.vmm.wait(timeout_s)
        if status is None:
            return None, {}
        counts = self.pager.counts()
        assert self.pager.process.wait(10.0) == 0, self.pager.said()
        return status, json.loads(counts or b"{}")

    def output(self) -> str:
        """What is left of the VMM's output."""
        return self._answers.read().decode()

    def close(self) -> None:
        """Kill both, whatever they do."""
        if self._questions >= 0:
            os.close(self._questions)
        self.vmm.kill()
        self.vmm.close()
        self.pager.close()
        self._answers.close()


@contextmanager
def serve(
    vmm_program: str,
    folder: Path,
    memory: str,
    regions: tuple[int, ...],
    command: tuple[str, ...] = ("ask",),
    *,
    how: str = "-",
    mode: str = "lazy",
    chunk: int | None = None,
    working_set: str | None = None,
    ready: bool = True,
) -> Iterator[Session]:
    """Run the stand-in VMM with `memory` served by a pager process."""
    path = f"{folder}/s{len(os.listdir(folder))}"
    listener = handshake.listen(path)
    questions, ours = os.pipe2(os.O_CLOEXEC)
    answers, theirs = os.pipe2(os.O_CLOEXEC)
    with closing(listener):
        pager = PagerProcess(listener, memory, mode=mode, chunk=chunk, working_set=working_set)
    try:
        argv = [vmm_program, path, memory, how, *map(str, regions), "--", *command]
        vmm = proc.spawn(argv, fds={0: questions, 1: theirs, FD_LEASH: pager.vmm_leash})
        pager.tie(vmm.pid)
    except BaseException:
        pager.close()
        raise
    finally:
        os.close(questions)
        os.close(theirs)
    session = Session(vmm, pager, os.fdopen(answers, "rb"), ours)
    try:
        if ready:
            pager.wait_ready(proc.Deadline(60.0))
        yield session
    finally:
        session.close()
