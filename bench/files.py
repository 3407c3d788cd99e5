"""The benchmark of the host's files: `python -m bench.files [--runs N]`. Prints a table.

Each run is one VM, in which the same work is done on /workspace and on the guest's own memory, so that they can be compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DHG = str(Path(sys.executable).with_name("dhg"))
DEADLINE_S = 600.0
CSV_BYTES = 100_000_000
FILES = 1000

SCRIPT = """
import gc, json, os, shutil, time
from deephaven import read_csv
found = {}

def timed(name, job):
    begin = time.monotonic()
    job()
    found[name] = time.monotonic() - begin

def small(folder):
    for i in range(FILES):
        path = f'{folder}/file{i:04}.txt'
        size = os.stat(path).st_size
        with open(path) as file:
            assert len(file.read()) == size

def raw(path):
    with open(path, 'rb', buffering=0) as file:
        while file.read(1 << 20):
            pass

def csv(path):
    table = read_csv(path)
    assert table.size == ROWS
    del table
    gc.collect()

timed('first touch', lambda: os.stat('small'))
timed('1,000 files stat and read, workspace', lambda: small('small'))
shutil.copytree('small', '/tmp/small')
timed('1,000 files stat and read, memory', lambda: small('/tmp/small'))
timed('100 MB read, workspace', lambda: raw('big.csv'))
shutil.copy('big.csv', '/tmp/big.csv')
timed('100 MB read, memory', lambda: raw('/tmp/big.csv'))
# Once without counting: what is executed first is slower. Then each with the file out of the guest's cache.
csv('/tmp/big.csv')
for turn in range(2):
    fd = os.open('big.csv', os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    timed(f'read_csv of 100 MB, workspace ({turn + 1})', lambda: csv('big.csv'))
    timed(f'read_csv of 100 MB, memory ({turn + 1})', lambda: csv('/tmp/big.csv'))
print(json.dumps(found))
"""


def make(folder: Path) -> int:
    """Write the data; the number of rows of the CSV file."""
    (folder / "small").mkdir()
    for i in range(FILES):
        (folder / "small" / f"file{i:04}.txt").write_text(f"line of file {i}\n" * 20)
    random.seed(1)
    rows = size = 0
    with (folder / "big.csv").open("w") as file:
        size += file.write("sym,price,qty,ts\n")
        while size < CSV_BYTES:
            size += file.write(
                f"S{random.randrange(500)},{random.random() * 100:.4f},{random.randrange(10**6)},"
                f"{1_700_000_000 + random.randrange(10**7)}\n"
            )
            rows += 1
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.files", description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    results: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="dhg-bench-") as name:
        code = SCRIPT.replace("ROWS", str(make(Path(name)))).replace("FILES", str(FILES))
        for _ in range(runs):
            argv = [DHG, "exec", "--vm", "--no-show-tables", "-c", code]
            done = subprocess.run(argv, cwd=name, capture_output=True, timeout=DEADLINE_S, check=False)
            if done.returncode:
                raise SystemExit(done.stderr.decode())
            results.append(json.loads(done.stdout))
    print("| seconds in the VM | median | runs |\n|---|---|---|")
    for name in results[0]:
        values = [result[name] for result in results]
        print(f"| {name} | {statistics.median(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |")
    ratios = [
        result[f"read_csv of 100 MB, memory ({turn})"] / result[f"read_csv of 100 MB, workspace ({turn})"]
        for result in results
        for turn in (1, 2)
    ]
    print(f"\nread_csv from /workspace at {statistics.median(ratios):.0%} of the speed from memory (pairs: ", end="")
    print(", ".join(f"{ratio:.0%}" for ratio in ratios) + ")")


if __name__ == "__main__":
    main()
