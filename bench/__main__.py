"""The benchmark: whole processes, timed from outside. `./dev bench [--runs N] [--no-plain]`.

Every row is a command that a user could type. Medians, with the spread, and the same job done by a plain Deephaven server
(`python` with deephaven-server, a JVM on this host) in the same run. Prints a table and a
breakdown by phase, and writes both to bench/results.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import breakdown
from dhg.snapshot import inventory, store

ROOT = Path(__file__).resolve().parent.parent
DHG = str(Path(sys.executable).with_name("dhg"))
PLAIN = ROOT / ".dev" / "plain"
DEADLINE_S = 300.0

HELLO = "print('hello')"
MILLION = "from deephaven import empty_table; t = empty_table(1_000_000).update('x = i'); print(t.size)"
UNUSUAL = (
    "from deephaven import empty_table; t = empty_table(5000).update(['g = i % 9', 'v = sin(i)']);"
    "print(t.partition_by('g').merge().group_by('g').ungroup().size)"
)
CSV = """
from deephaven import agg, read_csv
from deephaven.pandas import to_pandas
with open('/tmp/t.csv', 'w') as file:
    file.write('sym,price,qty\\n' + ''.join(f'S{i % 9},{i / 7},{i}\\n' for i in range(10_000)))
t = read_csv('/tmp/t.csv').agg_by([agg.avg('price'), agg.sum_('qty')], by=['sym'])
print(to_pandas(t.head(10)).to_string(index=False))
"""
TEN_MB = "import sys; data = b'x' * 10_000_000"
TEN_MB_OUT = TEN_MB + "; sys.stdout.buffer.write(data)"


class Row(NamedTuple):
    """One line of the table. Times in ms."""

    name: str
    target: float | None
    unit: str
    values: list[float]


def timed(argv: list[str], *, expect: bytes | None = None) -> float:
    """Milliseconds that a command takes; it must succeed, and print `expect` first."""
    begin = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S, check=False)
    took = (time.perf_counter() - begin) * 1000
    if done.returncode or (expect is not None and not done.stdout.startswith(expect)):
        raise SystemExit(f"{argv} ended with {done.returncode}: {done.stdout[:200]!r} {done.stderr.decode()[-2000:]}")
    return took


def repeat(runs: int, job: Callable[[], float]) -> list[float]:
    """The results of `job`, after one run that does not count."""
    job()
    return [job() for _ in range(runs)]


def dhg(code: str, expect: bytes | None = None) -> Callable[[], float]:
    """A job: run `code` in a VM."""
    return lambda: timed([DHG, "exec", "--vm", "-c", code], expect=expect)


def drop_caches() -> bool:
    """Drop the host's page cache; False where that is not allowed."""
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def cold_hello() -> float:
    """Hello after the page cache was dropped; the interpreter's own files are read again first, the snapshot's are not."""
    drop_caches()
    subprocess.run([DHG, "--version"], capture_output=True, timeout=DEADLINE_S, check=True)
    return dhg(HELLO, b"hello\n")()


def at_once(count: int) -> float:
    """Milliseconds until `count` hellos that were started together are all done."""
    begin = time.perf_counter()
    argv = [DHG, "exec", "--vm", "-c", HELLO]
    running = [subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for _ in range(count)]
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in running]
    took = (time.perf_counter() - begin) * 1000
    if outputs != [b"hello\n"] * count:
        raise SystemExit(f"{count} at once: {outputs}")
    return took


def client_share() -> float:
    """Milliseconds from the start of the interpreter until QEMU is spawned, as --verbose tells."""
    done = subprocess.run(
        [DHG, "exec", "--vm", "--verbose", "-c", "pass"], capture_output=True, timeout=DEADLINE_S, check=True, text=True
    )
    phases = dict(line[5:].rsplit(maxsplit=2)[:2] for line in done.stderr.splitlines())
    return sum(float(phases[name]) for name in ("interpreter start", "client", "spawn"))


def memory_per_vm(count: int) -> list[float]:
    """PSS of each of `count` VMs that have printed hello and stay, in MB."""
    code = "print('hello', flush=True); import time; time.sleep(600)"
    argv = [DHG, "exec", "--vm", "-c", code]
    running = [subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        sizes = []
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline() != b"hello\n":
                raise SystemExit("a VM did not say hello")
        for process in running:
            child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
            rollup = Path(f"/proc/{child}/smaps_rollup").read_text()
            sizes.append(next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1000)
    finally:
        for process in running:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)
    return sizes


def throughput(runs: int) -> list[float]:
    """MB/s of 10 MB of stdout, from the time it takes beyond a script that makes the same 10 MB and keeps them."""
    base = statistics.median(repeat(runs, dhg(TEN_MB)))
    return [10_000 / max(0.1, value - base) for value in repeat(runs, dhg(TEN_MB_OUT))]


def plain_python(version: str) -> str | None:
    """A Python with deephaven-server beside a JVM on this host; None if there is no JVM."""
    java = subprocess.run(["sh", "-c", "command -v java"], capture_output=True, check=False)
    if java.returncode:
        return None
    stamp = PLAIN / f"has-{version}"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", PLAIN], check=True, timeout=600)
        subprocess.run([PLAIN / "bin/pip", "install", "-q", f"deephaven-server=={version}"], check=True, timeout=1800)
        stamp.touch()
    return str(PLAIN / "bin/python")


def plain(python: str, code: str) -> float:
    """Milliseconds of a script in a plain server that is started for it."""
    before = (
        "import os\nfrom deephaven_server import Server\n"
        "Server(port=0, jvm_args=['-Xmx1g', '-XX:+UseSerialGC'], default_jvm_args=['-XX:+OmitStackTraceInFastThrow']).start()\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(before + code + "\nimport sys\nsys.stdout.flush()\nos._exit(0)\n")
        script.flush()
        return timed([python, script.name])


def measure(runs: int, version: str, *, with_plain: bool) -> list[Row]:
    """All rows."""
    rows: list[Row] = []

    def add(name: str, target: float | None, unit: str, values: list[float]) -> None:
        rows.append(Row(name, target, unit, values))
        print(line(rows[-1]), flush=True)

    add("floor: python -c pass", None, "ms", repeat(runs, lambda: timed([sys.executable, "-c", "pass"])))
    qemu = inventory.survey()["host"]["qemu"]["path"]
    add("floor: qemu --version", None, "ms", repeat(runs, lambda: timed([qemu, "--version"])))
    add("hello, warm page cache", 100, "ms", repeat(runs, dhg(HELLO, b"hello\n")))
    if drop_caches():
        add("hello, page cache dropped", 250, "ms", repeat(runs, cold_hello))
    add("empty_table(1_000_000).update", 500, "ms", repeat(runs, dhg(MILLION, b"1000000\n")))
    add("a kind of query not warmed up", 1500, "ms", repeat(runs, dhg(UNUSUAL, b"5000\n")))
    add("read_csv 10,000 rows, agg, preview", 700, "ms", repeat(runs, dhg(CSV)))
    add("eight hellos at once", 600, "ms", repeat(runs, lambda: at_once(8)))
    add("client's own share", 25, "ms", repeat(runs, client_share))
    add("memory of a VM (PSS, 8 running)", 60, "MB", memory_per_vm(8))
    add("10 MB of stdout", 200, "MB/s", throughput(runs))
    python = plain_python(version) if with_plain else None
    if python:
        add("plain server: hello", None, "ms", repeat(5, lambda: plain(python, HELLO)))
        add("plain server: 1M-row update", None, "ms", repeat(3, lambda: plain(python, MILLION)))
    return rows


def line(row: Row) -> str:
    """A row of the Markdown table."""
    middle = statistics.median(row.values)
    target = "" if row.target is None else f"{row.target:g}"
    ratio = "" if row.target is None else f"{middle / row.target:.2f}"
    spread = f"{min(row.values):.1f} | {max(row.values):.1f}"
    return f"| {row.name} | {target} | {middle:.1f} {row.unit} | {spread} | {ratio} | {len(row.values)} |"


HEAD = "| what | target | median | min | max | median / target | runs |\n|---|---|---|---|---|---|---|"


def main() -> None:
    """Measure, print, write bench/results.md."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="runs of each row (default 30)")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain Deephaven server out")
    args = parser.parse_args()
    host = inventory.survey()
    # The one that `exec --vm` takes, which the rows below measure.
    version = store.resolve_version(None)
    snapshot = next(item for item in host["snapshots"] if item["fits"] and item["version"] == version)
    kvm = host["host"]["kvm"]
    usable = "usable" if kvm["usable"] else "not usable"
    print(f"Measured under {snapshot['accel'].upper()}. KVM here: {usable} ({kvm['reason']}).\n\n{HEAD}", flush=True)
    rows = measure(args.runs, snapshot["version"], with_plain=not args.no_plain)
    built = snapshot["prepare_s"]
    extra = [
        Row("snapshot on disk", 400, "MB", [snapshot["disk_bytes"] / 1e6]),
        Row("prepare, all but the snapshot cached", 60, "s", [built]),
    ]
    for row in extra:
        print(line(row))
    where = host["host"]
    machine = (
        f"{where['cpu']}, {where['cpus']} CPUs, {where['memory_mib'] >> 10} GiB, Linux {where['kernel']}, "
        f"Python {platform.python_version()}, QEMU {where['qemu']['version']}, acceleration {snapshot['accel']}, "
        f"{snapshot['memory_mib']} MiB and {snapshot['vcpus']} vCPU a VM, Deephaven {snapshot['version']}"
    )
    text = f"# Benchmark\n\n`./dev bench`, {datetime.date.today()}. {machine}.\n\nWhole processes from outside.\n\n"
    text += "\n".join([HEAD, *(line(row) for row in rows + extra)]) + "\n"
    argv = [DHG, "exec", "--vm", "--verbose", "-c", HELLO]
    found = breakdown.phases(argv, runs=args.runs, timeout_s=DEADLINE_S)
    print(breakdown.text(found))
    text += f"\n## A hello by phase\n\nMedians of {args.runs} runs; as a picture in [hello.svg](hello.svg).\n\n"
    text += f"```\n{breakdown.text(found)}\n```\n"
    (ROOT / "bench" / "hello.svg").write_text(breakdown.svg(found))
    (ROOT / "bench" / "results.md").write_text(text)


if __name__ == "__main__":
    main()
