"""A script ends as that of `python script.py` does: threads, handlers, files, streams; in a VM and in the embedded server."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Completed, run_dhg

Exec = Callable[..., Completed]


@pytest.fixture(params=["vm", "embedded"])
def run(request: pytest.FixtureRequest) -> Exec:
    mode = ["--vm"] if request.param == "vm" else []

    def call(*args: str, rw: bool = False, cwd: Path | None = None) -> Completed:
        return run_dhg("exec", *mode, *(["--rw"] if rw and mode else []), *args, cwd=cwd)

    return call


def ended(done: Completed, out: str, code: int = 0) -> None:
    assert (done.stdout.decode(), done.returncode) == (out, code), done.stderr.decode()


def test_the_end_of_a_forked_child_is_not_that_of_the_script(run: Exec) -> None:
    code = """
import atexit, os, sys, time
atexit.register(lambda: print('handler of', who))
who = 'the parent'
for number in range(3):
    if os.fork() == 0:
        who = f'child {number}'
        if number == 2:
            raise SystemExit(5)
        sys.exit(number)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
time.sleep(0.3)
sys.exit(7)
"""
    lines = "".join(f"handler of child {number}\n{status}\n" for number, status in enumerate((0, 1, 5)))
    ended(run("-c", code), f"{lines}handler of the parent\n", 7)


def test_executors_and_threads_that_start_threads(run: Exec) -> None:
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor()
print(pool.submit(lambda: 1).result())
def tick(number):
    print('tick', number)
    if number < 4:
        threading.Timer(0.1, tick, [number + 1]).start()
tick(1)
"""
    ended(run("-c", code), "1\ntick 1\ntick 2\ntick 3\ntick 4\n")


def test_files_that_are_left_open_are_complete(run: Exec, tmp_path: Path) -> None:
    code = """
import csv, gzip, io, logging.handlers, mmap, zipfile
f = open('a.csv', 'w', newline='')
csv.writer(f).writerow([1, 2])
def later():
    g = open('b.txt', 'w')
    g.write('b')
    def inner():
        return g
    inner.again = inner
    return inner
later = later()
z = gzip.open('c.gz', 'wt')
z.write('c')
y = io.TextIOWrapper.__new__(io.TextIOWrapper)
y.__init__(gzip.open('y.gz', 'wb'))
y.write('y')
with open('d', 'wb') as d:
    d.truncate(4096)
d = open('d', 'r+b')
m = mmap.mmap(d.fileno(), 4096)
m[:1] = b'd'
d.close()
a = zipfile.ZipFile('e.zip', 'w')
a.writestr('e', 'e')
h = logging.handlers.MemoryHandler(100, target=logging.FileHandler('f.log'))
logging.getLogger().addHandler(h)
logging.warning('f')
class Last:
    def __del__(self):
        print('gone')
last = Last()
"""
    ended(run("-c", code, rw=True, cwd=tmp_path), "gone\n")
    assert (tmp_path / "a.csv").read_text() == "1,2\n"
    assert (tmp_path / "b.txt").read_text() == "b"
    assert gzip.decompress((tmp_path / "c.gz").read_bytes()) == b"c"
    # Which is older than what it writes to.
    assert gzip.decompress((tmp_path / "y.gz").read_bytes()) == b"y"
    assert (tmp_path / "d").read_bytes() == b"d" + bytes(4095)
    assert (tmp_path / "e.zip").read_bytes()[-22:-18] == b"PK\5\6"
    assert (tmp_path / "f.log").read_text() == "f\n"


def test_temporary_directories_go(run: Exec, tmp_path: Path) -> None:
    code = "import tempfile; t = tempfile.TemporaryDirectory(dir='.'); print(len(t.name) > 0)"
    ended(run("-c", code, rw=True, cwd=tmp_path), "True\n")
    assert list(tmp_path.iterdir()) == []


TEE = """
import sys
class Tee:
    def __init__(self, out):
        self.out = out
    def write(self, text):
        return self.out.write(text)
    def flush(self):
        {flush}
sys.stdout = Tee(sys.stdout)
for number in range(300):
    print('row', number)
print('TOTAL', end='')
"""


@pytest.mark.parametrize("flush", ["pass", "raise TypeError('flush')"])
def test_all_of_stdout_arrives_behind_an_object_of_the_scripts(flush: str, run: Exec) -> None:
    ended(run("-c", TEE.format(flush=flush)), "".join(f"row {number}\n" for number in range(300)) + "TOTAL")


def test_all_of_stdout_arrives_where_another_has_taken_its_place(run: Exec) -> None:
    code = """
import io, sys
for number in range(300):
    print(number)
sys.stdout.flush()
sys.stdout.buffer.write(b'tail')
sys.stdout = io.StringIO()
print('nowhere')
"""
    ended(run("-c", code), "".join(f"{number}\n" for number in range(300)) + "tail")


def test_descriptors_that_are_redirected_or_closed(run: Exec, tmp_path: Path) -> None:
    code = """
import os
print('before', flush=True)
fd = os.open('run.log', os.O_WRONLY | os.O_CREAT, 0o644)
os.dup2(fd, 1)
os.system('echo child')
print('print')
"""
    ended(run("-c", code, rw=True, cwd=tmp_path), "before\n")
    assert (tmp_path / "run.log").read_bytes() == b"child\nprint\n"
    ended(run("-c", "import os\nwith os.fdopen(1, 'w') as f: f.write('report')"), "report")
    ended(run("-c", "import os; os.close(1); os.close(2)"), "")


@pytest.mark.parametrize(
    "code",
    [
        "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')",
        "import sys; sys.stdout.close()",
        "import sys; del sys.stdout",
    ],
)
def test_tables_are_shown_where_the_script_has_taken_its_stdout_apart(code: str, run: Exec) -> None:
    done = run("-c", f"from deephaven import empty_table\nt = empty_table(1).update('x = 5')\n{code}")
    assert b"=== Table: t (1 row, static) ===" in done.stdout, done.stderr.decode()
    assert done.returncode == 0


def test_ends_that_cannot_be_said_as_they_are(run: Exec) -> None:
    done = run("-c", r"raise ValueError('bad \ud83d value')")
    assert done.returncode == 1
    assert rb"ValueError: bad \ud83d value" in done.stderr
    found = json.loads(run("--json", "-c", r"raise ValueError('bad \ud83d value')").stdout)
    assert (found["outcome"], found["error"]["type"]) == ("failed", "ValueError")
    done = run("-c", "import sys; sys.stderr.close(); sys.exit('message')")
    assert (done.returncode, done.stderr) == (1, b"message\n")
    for end in ("sys.exit('message')", "raise ValueError"):
        done = run("-c", f"import os, sys; print('out'); sys.stderr.close(); os.close(2); {end}")
        assert (done.returncode, done.stdout, done.stderr) == (1, b"out\n", b"")


def test_json_has_array_columns(run: Exec) -> None:
    code = """
from deephaven import empty_table
t = empty_table(10).update(['Key = i % 2', 'V = i', 'S = `s` + i']).group_by('Key')
one = empty_table(1).update(['Key = i', 'V = i * 0.5']).group_by('Key')
"""
    found = json.loads(run("--json", "-c", code).stdout)
    assert found["outcome"] == "completed", found
    t, one = found["tables"]
    assert t["rows"] == [
        {"Key": number, "V": list(range(number, 10, 2)), "S": [f"s{each}" for each in range(number, 10, 2)]}
        for number in range(2)
    ]
    assert one["rows"] == [{"Key": 0, "V": [0.0]}]


def test_a_time_zone_and_builtins(run: Exec) -> None:
    code = "import datetime; print(datetime.datetime.now().astimezone().utcoffset(), __builtins__.len('abc'))"
    ended(run("--env", "TZ=Asia/Tokyo", "-c", code), "9:00:00 3\n")
