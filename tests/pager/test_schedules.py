"""Random schedules: threads that read, write and remove pages while they are being filled. Every byte is checked (vmm.c).

`DHG_PAGER_SOAK=SECONDS` runs longer than the 20 s of an ordinary run; `./dev soak-pager` runs ten minutes.
"""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest
from tests.pager.conftest import memory_file, serve

from dhg.pager import workingset

SOAK_S = float(os.environ.get("DHG_PAGER_SOAK", "20"))
ROUND_MS = 400


@pytest.mark.timeout(SOAK_S * 2 + 120)
def test_random_schedules(vmm_program: str, tmp_path: Path) -> None:
    began = time.monotonic()
    seed = int.from_bytes(os.urandom(4), "little")
    rounds = operations = removed = retries = 0
    while rounds < 8 or time.monotonic() - began < SOAK_S:
        source = random.Random(seed)
        regions = tuple(source.choice((1, 17, 511, 512, 513, 2000, 5000)) for _ in range(source.randint(1, 4)))
        pages = sum(regions)
        folder = tmp_path / f"round-{seed}"
        folder.mkdir()
        memory = memory_file(folder / "ram", pages, seed=seed, partial=source.choice((0, 0, 1, 4095)))
        mode = source.choice(("lazy", "lazy", "eager", "set", "record"))
        chunk = None if mode == "record" else source.choice((None, 4096, 1 << 16, 1 << 21, 1 << 22))
        working_set = str(folder / "set")
        if mode == "set":
            touched = workingset.merge(source.sample(range(pages), pages // 3))
            workingset.save(working_set, touched, os.stat(memory))
        how = source.choice(("-", "-", "k", "s", "sf", "sk"))
        threads, length = source.choice((1, 2, 4, 8)), source.choice((50, ROUND_MS, 2 * ROUND_MS))
        command = ("run", str(seed), str(length), str(threads))
        told = f"seed {seed}: {mode}, chunk {chunk}, {how}, regions {regions}, threads {threads}"
        with serve(
            vmm_program,
            folder,
            memory,
            regions,
            command,
            how=how,
            mode=mode,
            chunk=chunk,
            working_set=working_set,
            # The guest begins at once: filling ahead and its faults must not get into each other's way.
            ready=False,
        ) as session:
            status, counts = session.end()
            assert status is not None, f"hangs; {told}"
            assert status == 0, f"status {status}; {told}; {session.pager.said()}"
            found = re.match(r"(\d+) operations, (\d+) pages right", session.output())
        assert found is not None
        assert int(found[2]) == pages
        rounds += 1
        operations += int(found[1])
        removed += counts["removed"] >> 12
        retries += counts["retries"]
        for item in folder.iterdir():
            item.unlink()
        folder.rmdir()
        seed = (seed * 6364136223846793005 + 1442695040888963407) % (1 << 32)
    print(
        f"{rounds} rounds in {time.monotonic() - began:.0f} s, {operations} operations, {removed} pages removed, {retries} retries"
    )
    # The schedules must have met what they are for.
    assert removed > 0
    assert retries > 0
