"""The pager's benchmark: `./dev bench-pager [--runs N]`. Needs root for dropping the page cache, and a prepared snapshot for hello.

First table: a memory file of 900 MiB, of which a program touches 200 MiB in clusters, one page in two with a write; from the
mapping (or handshake) to the first instruction, and to the last touch. The pager's process is started before; the same pages in
the same order for each row, rows taken in turn. Second table: `hello` in the prepared snapshot under QEMU, whose memory the pager
serves by way of the tests' preload shim, from the spawn of pager and QEMU to the script's result. Writes bench/pager.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import struct
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from tests.pager import served

from dhg import machine, proc
from dhg.pager import handshake, uffd, workingset
from dhg.pager.process import PagerProcess
from dhg.wire import client

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "pager"
PAGE = uffd.PAGE
FILE_PAGES = 900 << 8
TOUCHED_PAGES = 200 << 8
FD_READY, FD_LEASH = 100, 101


class Mode(NamedTuple):
    """A row: how the memory is served; no mode of the pager's is the kernel's private mapping."""

    name: str
    mode: str | None
    chunk: int | None = None


MODES = [
    Mode("kernel, private mapping", None),
    Mode("working set first, rest lazy", "set"),
    Mode("lazy, 64 KiB", "lazy", 64 << 10),
    Mode("lazy, 2 MiB", "lazy", 2 << 20),
    Mode("lazy, 4 KiB", "lazy", 4 << 10),
    Mode("eager", "eager"),
]


class Result(NamedTuple):
    """One run: ms until the first instruction, from there to the end, and CPU seconds of the pager (user, system), faults."""

    start_ms: float
    rest_ms: float
    user_s: float
    system_s: float
    faults: float


def build(name: str, target: Path, *flags: str) -> str:
    """Compile one of the tests' C sources."""
    argv = ["cc", "-O2", "-D_GNU_SOURCE", "-pthread", *flags, "-o", str(target), str(SOURCES / name), "-ldl"]
    subprocess.run(argv, check=True, timeout=100)
    return str(target)


def memory_file(path: Path) -> str:
    """900 MiB of bytes that do not repeat."""
    with open(path, "wb") as file:
        for _ in range(FILE_PAGES * PAGE >> 20):
            file.write(os.urandom(1 << 20))
    return str(path)


def touches(seed: int) -> list[int]:
    """200 MiB of pages in clusters of 4 KiB to 1 MiB, in an order that jumps between them; every second with the write bit."""
    source = random.Random(seed)
    left, clusters, taken = TOUCHED_PAGES, [], bytearray(FILE_PAGES)
    while left:
        count = min(left, source.choice((1, 2, 4, 16, 64, 256)))
        first = source.randrange(FILE_PAGES - count)
        pages = [page for page in range(first, first + count) if not taken[page]]
        for page in pages:
            taken[page] = 1
        clusters.append(pages)
        left -= len(pages)
    source.shuffle(clusters)
    return [page | (page % 2) << 31 for pages in clusters for page in pages]


def drop_caches() -> None:
    """Drop the host's page cache."""
    subprocess.run(["sync"], check=True, timeout=300)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run(program: str, memory: str, order: str, mode: Mode, folder: str, *, cold: bool) -> Result:
    """One row, once."""
    if cold:
        drop_caches()
        Path(program).read_bytes()
    out = os.memfd_create("touch")
    stdin = os.open(order, os.O_RDONLY)
    try:
        if mode.mode is None:
            argv = [program, "-", memory, str(FILE_PAGES), "-1"]
            with proc.spawn(argv, fds={0: stdin, 1: out}) as child:
                status = child.wait(300.0)
            counts: dict[str, Any] = {"user_s": 0.0, "system_s": 0.0, "faults": 0}
        else:
            path = f"{folder}/socket"
            with closing(handshake.listen(path)) as listener:
                pager = PagerProcess(listener, memory, mode=mode.mode, chunk=mode.chunk, working_set=f"{folder}/set")
            # Its interpreter is up before the VMM is, where a restore goes well.
            time.sleep(0.3)
            with pager:
                argv = [program, path, memory, str(FILE_PAGES), str(FD_READY)]
                fds = {0: stdin, 1: out, FD_READY: pager.status_fd, FD_LEASH: pager.vmm_leash}
                with proc.spawn(argv, fds=fds) as child:
                    pager.tie(child.pid)
                    status = child.wait(300.0)
                counts = json.loads(pager.counts())
            os.unlink(path)
        if status != 0:
            raise SystemExit(f"{mode.name}: status {status}")
        start, rest, _ = os.pread(out, 100, 0).split()
    finally:
        os.close(out)
        os.close(stdin)
    return Result(int(start) / 1e6, int(rest) / 1e6, counts["user_s"], counts["system_s"], counts["faults"])


def hello(shim: str, mode: Mode, folder: str) -> Result:
    """Hello in the prepared snapshot; `rest_ms` is all of it, `start_ms` until the guest went on."""
    out: list[bytes] = []
    if mode.mode is None:
        restored, vm = machine.restore(), None
    else:
        restored, vm = served.restore(shim, mode=mode.mode, chunk=mode.chunk, working_set=f"{folder}/hello")
    with restored:
        result = restored.run(
            client.Request(b"print('hello')"), stdout=out.append, stderr=out.append, deadline=proc.Deadline(120.0)
        )
    if result.exit_code or b"".join(out) != b"hello\n":
        raise SystemExit(f"{mode.name}: {out}")
    phases = restored.phases
    start = phases["spawn"] + phases["VMM start"] + phases["state load"]
    counts = vm.counts if vm else {"user_s": 0.0, "system_s": 0.0, "faults": 0}
    return Result(start, sum(phases.values()), counts["user_s"], counts["system_s"], counts["faults"])


def line(name: str, results: list[Result], base: float) -> str:
    """A row of a Markdown table."""

    def middle(index: int) -> float:
        return statistics.median(result[index] for result in results)

    whole = [result.start_ms + result.rest_ms for result in results]
    total = statistics.median(whole)
    return (
        f"| {name} | {middle(0):.0f} | {middle(1):.0f} | {total:.0f} | {min(whole):.0f}-{max(whole):.0f} | {total / base:.2f} "
        f"| {middle(2) * 1000:.0f} + {middle(3) * 1000:.0f} | {middle(4):.0f} |"
    )


def touch_table(runs: int, *, cold: bool, folder: str, program: str, memory: str, order: str) -> list[str]:
    """All rows of the first table, taken in turn."""
    results: dict[str, list[Result]] = {mode.name: [] for mode in MODES}
    for number in range(runs + 1):
        for mode in MODES:
            found = run(program, memory, order, mode, folder, cold=cold)
            # The first round does not count.
            if number or cold:
                results[mode.name].append(found)
        if cold and number + 1 == runs:
            break
    base = statistics.median(item.start_ms + item.rest_ms for item in results[MODES[0].name])
    return [line(mode.name, results[mode.name], base) for mode in MODES]


def hello_table(runs: int, shim: str, folder: str, *, cold: bool) -> list[str]:
    """All rows of the second table."""
    modes = [mode for mode in MODES if mode.chunk != PAGE]
    results: dict[str, list[Result]] = {mode.name: [] for mode in modes}
    for number in range(runs + 1):
        for mode in modes:
            if cold:
                drop_caches()
            once = hello(shim, mode, folder)
            if number:
                results[mode.name].append(once)
    base = statistics.median(item.rest_ms for item in results[modes[0].name])
    rows = []
    for mode in modes:
        found = results[mode.name]
        whole = [item.rest_ms for item in found]
        cpu = [statistics.median(getattr(item, name) for item in found) * 1000 for name in ("user_s", "system_s")]
        middle = statistics.median(whole)
        rows.append(
            f"| {mode.name} | {statistics.median(item.start_ms for item in found):.0f} | {middle:.0f} "
            f"| {min(whole):.0f}-{max(whole):.0f} | {middle / base:.2f} | {cpu[0]:.0f} + {cpu[1]:.0f} "
            f"| {statistics.median(item.faults for item in found):.0f} |"
        )
    return rows


TOUCH_HEAD = (
    "| memory | to first instruction, ms | 200 MiB touched, ms | sum, ms | from-to | / kernel | pager's CPU, ms (user + system) "
    "| faults |\n|---|---|---|---|---|---|---|---|"
)
HELLO_HEAD = (
    "| memory | until the guest goes on, ms | until the result, ms | from-to | / kernel | pager's CPU, ms (user + system) | faults |"
    "\n|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Measure, print, write bench/pager.md."""
    parser = argparse.ArgumentParser(prog="./dev bench-pager", description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--no-hello", action="store_true", help="leave the restored VM out")
    args = parser.parse_args()
    why = uffd.available()
    if why:
        raise SystemExit(why)
    parts = []

    def show(title: str, head: str, rows: list[str]) -> None:
        parts.append("\n".join([f"\n{title}\n", head, *rows]))
        print(parts[-1], flush=True)

    with tempfile.TemporaryDirectory(prefix="bench-pager-", dir=ROOT) as folder:
        program = build("touch.c", Path(folder) / "touch")
        shim = build("shim.c", Path(folder) / "shim.so", "-shared", "-fPIC")
        memory, pages = memory_file(Path(folder) / "ram"), touches(1)
        order = Path(folder) / "order"
        order.write_bytes(struct.pack(f"{len(pages)}I", *pages))
        known = workingset.merge(page & 0x7FFFFFFF for page in pages)
        workingset.save(f"{folder}/set", known, os.stat(memory))
        where = {"folder": folder, "program": program, "memory": memory, "order": str(order)}
        show("Page cache warm:", TOUCH_HEAD, touch_table(args.runs, cold=False, **where))
        show("Page cache dropped:", TOUCH_HEAD, touch_table(max(3, args.runs // 3), cold=True, **where))
        os.unlink(memory)
        if not args.no_hello:
            hello(shim, Mode("", "record"), folder)
            show("Hello, page cache warm:", HELLO_HEAD, hello_table(args.runs, shim, folder, cold=False))
            cold = hello_table(max(3, args.runs // 3), shim, folder, cold=True)
            show("Hello, page cache dropped:", HELLO_HEAD, cold)
    head = f"# Pager\n\n`./dev bench-pager --runs {args.runs}`, {datetime.date.today()}. Linux {platform.release()}, "
    head += f"{len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the end."
    (ROOT / "bench" / "pager.md").write_text(head + "\n" + "\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
