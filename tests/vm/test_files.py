"""The host's files in a real VM: real scripts, real files."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.conftest import DHG, Completed, Dhg
from tests.counting import Counts
from tests.posix import POSIX

from dhg import machine, proc
from dhg.share import start
from dhg.wire import client, frames

HINT = b"hint: the script tried to write to files of this host"


def ok(done: Completed) -> str:
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return done.stdout.decode()


READING = """
import glob, mmap, os, pathlib, subprocess, sys
import helpers, package.inner
print(os.getcwd(), sys.path[0], __file__, sys.argv)
print(helpers.X, helpers.__file__, package.inner.Y)
print(sorted(os.listdir()))
print(os.path.exists('prices.csv'), os.path.exists('nothing'), os.path.isdir('data'), os.stat('prices.csv').st_size)
print(sorted(glob.glob('**/*.txt', recursive=True)))
print([(top, sorted(names)) for top, _, names in os.walk('data')])
print(pathlib.Path(__file__).parent.joinpath('größe ☃ 🎈.txt').read_text())
with open('prices.csv', 'rb') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
    print(view[:3], view.find(b'3,4'))
print(subprocess.run(['cat', 'data/a.txt'], capture_output=True).stdout, subprocess.getoutput('ls data'))
print(open('link.txt').read(), os.readlink('link.txt'), open('folder/a.txt').read(), os.path.islink('folder'))
for name in ('absolute', 'outside', '../secret', 'loop', '/workspace/../secret'):
    try:
        print(name, open(name).read())
    except OSError as error:
        print(name, error.strerror)
with open('huge', 'rb') as file:
    file.seek(19 << 30)
    print(file.read(4), os.path.getsize('huge') >> 30)
    for line in open('/proc/meminfo'):
        if line.startswith('Cached:'):
            assert int(line.split()[1]) < 1_000_000
import pandas
print(pandas.read_csv('prices.csv').b.tolist(), pandas.read_parquet('t.parquet').x.sum())
from deephaven import parquet, read_csv
from deephaven.pandas import to_pandas
print(to_pandas(read_csv('prices.csv')).b.tolist(), to_pandas(read_csv('/workspace/prices.csv')).a.tolist())
print(parquet.read('t.parquet').size)
import jpy
print(jpy.get_type('java.nio.file.Files').readString(jpy.get_type('java.nio.file.Path').of('data/a.txt', [])))
print(jpy.get_type('java.io.File')('prices.csv').getAbsolutePath())
print(os.access('prices.csv', os.R_OK), os.access('prices.csv', os.W_OK), os.access('.', os.X_OK))
"""

READ = """\
/workspace /workspace /workspace/report.py ['report.py', '1']
42 /workspace/helpers.py 43
['absolute', 'data', 'folder', 'größe ☃ 🎈.txt', 'helpers.py', 'huge', 'link.txt', 'loop', 'outside', 'package', \
'prices.csv', 'report.py', 't.parquet']
True False True 12
['data/a.txt', 'data/sub/b.txt', 'folder/a.txt', 'folder/sub/b.txt', 'größe ☃ 🎈.txt', 'link.txt']
[('data', ['a.txt']), ('data/sub', ['b.txt'])]
hello ☃
b'a,b' 8
b'in a' a.txt
sub
in a data/a.txt in a True
absolute No such file or directory
outside No such file or directory
../secret No such file or directory
loop Too many levels of symbolic links
/workspace/../secret No such file or directory
b'tail' 20
[2, 4] 499500
[2, 4] [1, 3]
1000
in a
/workspace/prices.csv
True False True
"""


def test_nothing_is_left_of_the_rehearsals_files(dhg: Dhg, tmp_path: Path) -> None:
    """`prepare` has used files of these names (snapshot/rehearsal.py), in the VM of which this is a clone."""
    (tmp_path / "dhg_rehearsal.py").write_text("rows = 'mine'\n")
    (tmp_path / "dhg_rehearsal.csv").write_text("x\n1\n2\n")
    (tmp_path / "dhg_rehearsal.none").write_text("there")
    code = """
import os, sys
print("dhg_rehearsal" in sys.modules, repr(sys.path[0]), sorted(os.listdir()))
import dhg_rehearsal
from deephaven import read_csv
print(dhg_rehearsal.rows, read_csv("dhg_rehearsal.csv").size, open("dhg_rehearsal.none").read())
"""
    found = ok(dhg("exec", "--vm", "--no-show-tables", "-c", code, cwd=tmp_path))
    names = ["dhg_rehearsal.csv", "dhg_rehearsal.none", "dhg_rehearsal.py"]
    assert found == f"False '' {names}\nmine 2 there\n"


def test_a_script_finds_its_files_as_if_there_were_no_vm(dhg: Dhg, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    work = tmp_path / "work"
    for folder in ("data/sub", "package"):
        (work / folder).mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    for name, text in {
        "report.py": READING,
        "helpers.py": "X = 42",
        "package/inner.py": "Y = 43",
        "prices.csv": "a,b\n1,2\n3,4\n",
        "data/a.txt": "in a",
        "data/sub/b.txt": "in b",
        "größe ☃ 🎈.txt": "hello ☃",
    }.items():
        (work / name).write_text(text)
    for name, target in {
        "link.txt": "data/a.txt",
        "folder": "data",
        "absolute": str(tmp_path / "secret"),
        "outside": "../secret",
        "loop": "loop",
    }.items():
        os.symlink(target, work / name)
    with (work / "huge").open("wb") as file:
        file.truncate(20 << 30)
        os.pwrite(file.fileno(), b"tail", 19 << 30)
    pyarrow.parquet.write_table(pyarrow.table({"x": range(1000)}), work / "t.parquet")
    done = dhg("exec", "--vm", "--no-show-tables", "report.py", "1", cwd=work)
    assert ok(done) == READ
    assert done.stderr == b""
    assert not (work / "__pycache__").exists()


def test_where_a_script_lies_and_what_it_is_told(dhg: Dhg, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (work / "sub" / "beside.py").write_text("")
    show = "import os, sys; print(os.getcwd(), [sys.path[0]], globals().get('__file__'), sys.argv)"
    (work / "sub" / "s.py").write_text(f"import beside\n{show}\n")
    os.symlink("sub/s.py", work / "link.py")
    other = tmp_path / "other.py"
    other.write_text(show)
    paths = {
        "sub/s.py": f"/workspace ['/workspace/sub'] /workspace/sub/s.py {['sub/s.py']}",
        str(work / "sub" / "s.py"): f"/workspace ['/workspace/sub'] /workspace/sub/s.py {[str(work / 'sub' / 's.py')]}",
        "link.py": f"/workspace ['/workspace/sub'] /workspace/link.py {['link.py']}",
        "../other.py": f"/workspace ['/workspace'] ../other.py {['../other.py']}",
    }
    for path, wanted in paths.items():
        assert ok(dhg("exec", "--vm", path, cwd=work)) == wanted + "\n"
    assert ok(dhg("exec", "--vm", "-c", show, cwd=work)) == "/workspace [''] None ['-c']\n"
    assert ok(dhg("exec", "--vm", "-", cwd=work, stdin=show.encode())) == "/workspace [''] None ['-']\n"
    code = "import beside; print(beside.__file__)"
    assert ok(dhg("exec", "--vm", "-c", code, cwd=work / "sub")) == "/workspace/beside.py\n"


READ_ONLY = """
import errno, os, shutil, subprocess
tries = {
    'open w': lambda: open('a', 'w'), 'open a': lambda: open('a', 'a'), 'open r+': lambda: open('a', 'r+'),
    'new': lambda: open('n', 'x'),
    'mkdir': lambda: os.mkdir('n'), 'unlink': lambda: os.unlink('a'), 'rmdir': lambda: os.rmdir('d'),
    'rename': lambda: os.rename('a', 'n'),
    'link': lambda: os.link('a', 'n'), 'symlink': lambda: os.symlink('a', 'n'), 'truncate': lambda: os.truncate('a', 0),
    'chmod': lambda: os.chmod('a', 0o600), 'utime': lambda: os.utime('a'), 'chown': lambda: os.chown('a', 0, 0),
    'copy': lambda: shutil.copy('a', 'n'), 'mkfifo': lambda: os.mkfifo('n'),
}
for name, attempt in tries.items():
    try:
        attempt()
        print(name, 'works')
    except OSError as error:
        if error.errno != errno.EROFS:
            print(name, error)
print(subprocess.run('echo x > n', shell=True, capture_output=True).stderr)
from deephaven import empty_table, write_csv
try:
    write_csv(empty_table(1), 'n.csv')
except Exception as error:
    print('Read-only file system' in str(error))
shutil.copy('a', '/tmp/a')
print(open('/tmp/a').read())
"""


def test_read_only_by_default_and_a_hint(dhg: Dhg, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "d").mkdir()
    (tmp_path / "s.py").write_text(READ_ONLY)
    before = {path: path.lstat() for path in [tmp_path, *tmp_path.iterdir()]}
    done = dhg("exec", "--vm", "--no-show-tables", "s.py", cwd=tmp_path)
    assert ok(done) == "b'/bin/sh: 1: cannot create n: Read-only file system\\n'\nTrue\na\n"
    assert done.stderr.startswith(HINT), done.stderr
    assert done.stderr.count(b"\n") == 1
    for path, was in before.items():
        now = path.lstat()
        assert (now.st_mtime_ns, now.st_ctime_ns, now.st_mode) == (was.st_mtime_ns, was.st_ctime_ns, was.st_mode), path
    quiet = dhg("exec", "--vm", "--quiet", "-c", "open('a', 'w')", cwd=tmp_path)
    assert (quiet.returncode, quiet.stderr.endswith(b"OSError: [Errno 30] Read-only file system: 'a'\n")) == (1, True)
    as_json = dhg("exec", "--vm", "--json", "-c", "open('a', 'w')", cwd=tmp_path)
    assert b'"hint": "the script tried to write' in as_json.stdout


WITH_DEEPHAVEN = """
from deephaven import empty_table, parquet, read_csv, write_csv
t = empty_table(1000).update(['x = i', 's = `v` + i'])
parquet.write(t, 't.parquet'); write_csv(t, 't.csv')
assert parquet.read('t.parquet').size == read_csv('t.csv').size == 1000
print(os.statvfs('.').f_blocks > 0, 'all good')
"""


def test_read_write_as_a_local_file_system(dhg: Dhg, tmp_path: Path) -> None:
    done = dhg("exec", "--vm", "--rw", "--no-show-tables", "-c", POSIX + WITH_DEEPHAVEN, cwd=tmp_path)
    assert ok(done) == "True all good\n"
    assert done.stderr == b""
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["big", "dd", "f", "q", "r2", "s", "s2", "t.csv", "t.parquet", "top", "x2", "x3"]
    )
    assert (tmp_path / "x3").read_text() == "2more"
    assert (tmp_path / "f").stat().st_uid == os.geteuid()
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o755
    assert (tmp_path / "big").read_bytes()[5000:5005] == b"MMAP!"
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1001


def test_files_that_change_between_and_during_runs(dhg: Dhg, tmp_path: Path) -> None:
    file = tmp_path / "f"
    for text in ("one", "two, longer", ""):
        file.write_text(text)
        assert ok(dhg("exec", "--vm", "-c", "print(repr(open('f').read()))", cwd=tmp_path)) == f"{text!r}\n"
    code = """
import os, sys, time
print(open('f').read(), os.path.exists('new'), flush=True)
sys.stdin.readline()
until = time.monotonic() + 20
while open('f').read() != 'after' and time.monotonic() < until:
    time.sleep(0.1)
while not os.path.exists('new') and time.monotonic() < until:
    time.sleep(0.1)
print(open('f').read(), open('new').read(), sorted(os.listdir()))
"""
    file.write_text("before")
    read, write = os.pipe()
    out: list[bytes] = []

    def printed(data: bytes) -> None:
        out.append(data)
        if b"False" in data:
            replacement = tmp_path / "g"
            replacement.write_text("after")
            os.rename(replacement, file)
            (tmp_path / "new").write_text("new")
            os.write(write, b"\n")

    with machine.restore() as vm:
        request = client.Request(code.encode(), stdin=True)
        vm.run(
            request,
            stdout=printed,
            stderr=out.append,
            deadline=proc.Deadline(90),
            stdin=read,
            shares=((str(tmp_path), "r"),),
        )
    os.close(read)
    os.close(write)
    assert b"".join(out).decode() == "before False\nafter new ['f', 'new']\n"


def test_mounts_and_no_workspace(dhg: Dhg, tmp_path: Path) -> None:
    for name in ("work", "a", "b", "c d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(f"in {name}")
    work = tmp_path / "work"
    code = f"""
import os
print(open('f').read(), open('{tmp_path}/a/f').read(), open('/mnt/b/f').read(), open('/x/y/f').read())
open('/x/y/new', 'w').write('written')
for path in ('f', '/mnt/b/f'):
    try:
        open(path, 'w')
    except OSError as error:
        print(error)
"""
    mounts = [f"--mount={tmp_path}/a", "--mount=../b:/mnt/b:ro", f"--mount={tmp_path}/c d:/x/y:rw"]
    done = dhg("exec", "--vm", *mounts, "-c", code, cwd=work)
    assert ok(done) == (
        "in work in a in b in c d\n"
        "[Errno 30] Read-only file system: 'f'\n[Errno 30] Read-only file system: '/mnt/b/f'\n"
    )
    assert (tmp_path / "c d" / "new").read_text() == "written"
    code = """
import os
print(os.getcwd(), os.listdir(), open('/mnt/b/f').read())
for place in ('/run/dhg/shares/0', '/run/dhg/shares/2', '/run/dhg/shares/0/f'):
    try:
        print(os.listdir(place))
    except OSError as error:
        print(place, error.errno in (2, 20, 116))
open('mine', 'w').write('x')
print(os.listdir())
"""
    done = dhg("exec", "--vm", "--no-workspace", "--mount=../b:/mnt/b", "-c", code, cwd=work)
    places = "".join(f"/run/dhg/shares/{place} True\n" for place in ("0", "2", "0/f"))
    assert ok(done) == f"/workspace [] in b\n{places}['mine']\n"
    assert os.listdir(work) == ["f"]
    script = tmp_path / "b" / "s.py"
    script.write_text("import sys; print(__file__, sys.path[0])")
    assert ok(dhg("exec", "--vm", "--mount=../b:/mnt/b", str(script), cwd=work)) == "/mnt/b/s.py /mnt/b\n"


def test_dhgignore_hides(dhg: Dhg, tmp_path: Path) -> None:
    (tmp_path / ".dhgignore").write_text(".env\n.git/\n")
    (tmp_path / ".env").write_text("KEY=1")
    (tmp_path / ".git").mkdir()
    (tmp_path / "a").write_text("a")
    code = "import os; print(sorted(os.listdir()), os.path.exists('.env'), os.path.exists('.git'), open('a').read())"
    assert ok(dhg("exec", "--vm", "-c", code, cwd=tmp_path)) == "['.dhgignore', 'a'] False False a\n"
    # One that cannot be read hides nothing: then nothing is shared.
    (tmp_path / ".dhgignore").write_text("[z-a]\n")
    done = dhg("exec", "--vm", "-c", code, cwd=tmp_path)
    assert done.returncode == 1
    assert b"error: this host's files were not to be had: cannot use .dhgignore: line 1 is no pattern" in done.stderr


TABLES = "from deephaven import empty_table\nt = empty_table({rows}).update(['x = i', 's = `v` + i', 'd = i / 4.0'])\n"


def test_outputs(dhg: Dhg, tmp_path: Path) -> None:
    import pyarrow.csv
    import pyarrow.ipc
    import pyarrow.parquet

    (tmp_path / "sub").mkdir()
    (tmp_path / "old.csv").write_text("old")
    (tmp_path / "old.csv").chmod(0o600)
    os.symlink("sub/real.parquet", tmp_path / "link.parquet")
    names = ["t=link.parquet", "t=old.csv", "t=sub/t.arrow"]
    outputs = [word for name in names for word in ("--output", name)]
    rows = 300_000
    done = dhg("exec", "--vm", "--no-show-tables", *outputs, "-c", TABLES.format(rows=rows), cwd=tmp_path)
    assert ok(done) == ""
    assert done.stderr == b""
    found = [
        pyarrow.parquet.read_table(tmp_path / "sub" / "real.parquet"),
        pyarrow.csv.read_csv(tmp_path / "old.csv"),
        pyarrow.ipc.open_file(tmp_path / "sub" / "t.arrow").read_all(),
    ]
    for table in found:
        assert table.num_rows == rows
        assert table.column("x").to_pylist()[::1000] == list(range(0, rows, 1000))
        assert table.column("s").to_pylist()[-1] == f"v{rows - 1}"
    assert stat.S_IMODE((tmp_path / "old.csv").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "sub" / "t.arrow").stat().st_mode) == 0o644
    assert sorted(os.listdir(tmp_path)) == ["link.parquet", "old.csv", "sub"]
    assert sorted(os.listdir(tmp_path / "sub")) == ["real.parquet", "t.arrow"]


@pytest.mark.parametrize("mode", [["--vm"], []], ids=["vm", "embedded"])
def test_outputs_whole_or_not_at_all(dhg: Dhg, tmp_path: Path, mode: list[str]) -> None:
    (tmp_path / "t.csv").write_text("old")
    code = TABLES.format(rows=3)

    def run(*args: str) -> Completed:
        done = dhg("exec", *mode, "--no-show-tables", *args, cwd=tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["t.csv"]
        return done

    done = run("--output", "t=t.csv", "--output", "u=u.parquet", "-c", code)
    assert (done.returncode, (tmp_path / "t.csv").read_text()) == (2, "old")
    assert b"error: --output u: the script has left nothing of that name\nhint: no output was written" in done.stderr
    if mode:
        done = run("--output", "t=t.csv", "-c", code + "raise SystemExit(3)")
        assert (done.returncode, (tmp_path / "t.csv").read_text()) == (3, "old")
        assert b"hint: the script failed, so no output was written" in done.stderr
        done = run("--output", "code=t.csv", "-c", "code = 1")
        assert b"error: --output code: is no table but of type int" in done.stderr
    done = run("--output", "t=t.csv", "-c", code)
    assert (ok(done), (tmp_path / "t.csv").read_text()) == ("", "x,s,d\n0,v0,0.0\n1,v1,0.25\n2,v2,0.5\n")


def test_outputs_of_a_client_that_is_killed_leave_nothing(tmp_path: Path) -> None:
    code = TABLES.format(rows=3) + "print('ready', flush=True)\nimport time; time.sleep(60)"
    argv = [DHG, "exec", "--vm", "--output", "t=t.csv", "-c", code]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert len(os.listdir(tmp_path)) == 1
        child.kill()
    until = time.monotonic() + 20
    while os.listdir(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert os.listdir(tmp_path) == []


def test_usage(dhg: Dhg, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.csv")
    for args, said in (
        (["--vm", "--output", "t=t.xlsx"], "ends in .parquet, .csv or .arrow"),
        (["--vm", "--output", "t.csv"], "--output takes NAME=FILE"),
        (["--vm", "--output", "t=a.csv", "--output", "u=./a.csv"], "names ./a.csv twice"),
        (["--vm", "--output", "t=fifo.csv"], "no regular file"),
        (["--vm", "--output", "t=none/t.csv"], "cannot write none/t.csv: No such file"),
        (["--vm", "--mount", "none"], "there is no directory none"),
        (["--vm", "--mount", "/usr"], "/usr is taken in the VM"),
        (["--vm", "--mount", ".:/workspace"], "/workspace is taken in the VM"),
        (["--vm", "--mount", ".:/mnt/../etc"], "/etc is taken in the VM"),
        (["--vm", "--rw", "--no-workspace"], "which --no-workspace takes away"),
        (["--rw"], "--rw needs --vm"),
        (["--mount", "."], "--mount needs --vm"),
    ):
        done = dhg("exec", *args, "-c", "print('ran')", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, b""), args
        assert said in done.stderr.decode(), args
    assert os.listdir(tmp_path) == ["fifo.csv"]


def test_eight_at_once_see_their_own(dhg: Dhg, tmp_path: Path) -> None:
    def one(number: int) -> str:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "who.py").write_text(f"me = {number}")
        (folder / "data").write_text(str(number) * 100_000)
        code = "import who; print(who.me, set(open('data').read())); open('out', 'w').write(str(who.me))"
        return ok(dhg("exec", "--vm", "--rw", "-c", code, cwd=folder))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [f"{i} {{'{i}'}}\n" for i in range(8)]
    assert [(tmp_path / str(i) / "out").read_text() for i in range(8)] == [str(i) for i in range(8)]


def run_in(folder: Path, code: str, **options: object) -> tuple[machine.Machine, str]:
    """The machine that was, and what the script printed."""
    out: list[bytes] = []
    with machine.restore() as vm:
        request = client.Request(code.encode(), flags=frames.FLAG_TABLES, **options)  # type: ignore[arg-type]
        shares = ((str(folder), "w"),)
        vm.run(request, stdout=out.append, stderr=out.append, deadline=proc.Deadline(90), shares=shares)
    return vm, b"".join(out).decode()


def test_a_script_that_touches_no_file_starts_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    serve = machine.Machine._serve_files

    def noted(self: machine.Machine, shares: start.Shares) -> int:
        started.append(shares)
        return serve(self, shares)

    monkeypatch.setattr(machine.Machine, "_serve_files", noted)
    for code in (
        "print('hello')",
        "from deephaven import empty_table; t = empty_table(5).update('x = i')",
        "import sys, os, json, pandas; print(os.getcwd())",
        "1 / 0",
    ):
        run_in(tmp_path, code)
        assert started == [], code
    assert run_in(tmp_path, "import os; print(os.listdir())")[1] == "[]\n"
    assert len(started) == 1


SMALL = {
    "by name": """
for i in range(1000):
    name = f'small/file{i}.txt'
    size = os.stat(name).st_size
    with open(name) as file:
        assert file.read() == f'file {i}' * 30 and size == 30 * len(f'file {i}')
""",
    "listed": """
for name in os.listdir('small'):
    with open('small/' + name) as file:
        assert file.read() == f'file {name[4:-4]}' * 30
""",
    "glob": """
for name in glob.glob('small/*.txt'):
    with open(name, 'rb') as file:
        assert len(file.read()) == os.stat(name).st_size
""",
    "scandir": """
for entry in os.scandir('small'):
    assert entry.stat().st_size == len(pathlib.Path(entry.path).read_text())
""",
    "cat": """
assert subprocess.getoutput('cat small/*.txt | wc -c') == str(sum(30 * len(f'file {i}') for i in range(1000)))
""",
}


@pytest.mark.parametrize("how", SMALL)
def test_a_thousand_small_files_take_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    (tmp_path / "work" / "small").mkdir(parents=True)
    for i in range(1000):
        (tmp_path / "work" / "small" / f"file{i}.txt").write_text(f"file {i}" * 30)
    counts = Counts(tmp_path / "counts")
    monkeypatch.setattr(start, "CODE", counts.code)
    code = "import glob, os, pathlib, subprocess" + SMALL[how] + "print('all good')"
    assert run_in(tmp_path / "work", code)[1] == "all good\n"
    # The machine is closed: what is left of it is what was counted. A thousand and more, were each file asked for.
    assert counts.answered() < 250, counts.read()


def test_files_that_change_here_or_there_while_they_are_read(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"f{i:02}").write_text(f"old {i}")
    code = """
import os, sys, time
for i in range(6):
    assert open(f'f{i:02}').read() == f'old {i}'
# These are with the relay by now; this host changes some of them, and the script others.
print('go', flush=True)
sys.stdin.readline()
open('f08', 'w').write('mine')
os.unlink('f09')
os.rename('f10', 'moved')
for i in (6, 7, 11, 12, 13, 14):
    size, text = os.stat(f'f{i:02}').st_size, open(f'f{i:02}').read()
    assert text in (f'old {i}', f'changed {i}' * i), text
assert open('f08').read() == 'mine' and not os.path.exists('f09') and not os.path.exists('f10')
assert open('moved').read() == 'old 10'
time.sleep(1.1)
print([open(f'f{i:02}').read() == f'changed {i}' * i for i in (7, 12, 13)], open('f14').read())
"""
    read, write = os.pipe()
    out: list[bytes] = []

    def printed(data: bytes) -> None:
        out.append(data)
        if data.startswith(b"go"):
            for i in (7, 12, 13):
                (tmp_path / "new").write_text(f"changed {i}" * i)
                os.rename(tmp_path / "new", tmp_path / f"f{i:02}")
            os.write(write, b"\n")

    with machine.restore() as vm:
        vm.run(
            client.Request(code.encode(), stdin=True),
            stdout=printed,
            stderr=out.append,
            deadline=proc.Deadline(90),
            stdin=read,
            shares=((str(tmp_path), "w"),),
        )
    os.close(read)
    os.close(write)
    assert b"".join(out).decode() == "go\n[True, True, True] old 14\n"
    assert (tmp_path / "f08").read_text() == "mine"


def test_a_server_that_is_gone_is_an_error_and_no_wait(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("f")
    code = """
import os
print(open('f').read(), flush=True)
import time
time.sleep(1.5)
try:
    os.stat('g')
except OSError as error:
    print(error.strerror)
"""
    out: list[bytes] = []
    with machine.restore() as vm:

        def printed(data: bytes) -> None:
            if not out:
                assert vm._server is not None
                os.kill(vm._server.process.pid, signal.SIGKILL)
            out.append(data)

        shares = ((str(tmp_path), "r"),)
        vm.run(
            client.Request(code.encode()),
            stdout=printed,
            stderr=out.append,
            deadline=proc.Deadline(60),
            shares=shares,
        )
    assert b"".join(out).decode() in (
        "f\nTransport endpoint is not connected\n",
        "f\nSoftware caused connection abort\n",
    )
    assert vm.files_error is not None


def test_a_guest_that_talks_nonsense_hurts_nobody(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("f")
    # The guest's root takes the relay's place and says what it likes.
    code = """
import os, signal, time
print(open('f').read())
for name in os.listdir('/proc'):
    if name.isdigit() and b'relay.py' in open(f'/proc/{name}/cmdline', 'rb').read():
        os.kill(int(name), signal.SIGKILL)
time.sleep(0.5)
# A write to a port whose host has hung up waits; that is the guest's affair.
port = os.open('/run/dhg/files', os.O_RDWR | os.O_NONBLOCK)
for _ in range(20):
    try:
        os.write(port, os.urandom(5000))
    except BlockingIOError:
        pass
    time.sleep(0.02)
print('done')
"""
    began = time.monotonic()
    vm, out = run_in(tmp_path, code)
    assert out == "f\ndone\n"
    assert vm.files_error is not None and "the guest sent a message of" in vm.files_error
    assert time.monotonic() - began < 60
    assert (tmp_path / "f").read_text() == "f"


def test_special_files_are_seen_and_not_opened(dhg: Dhg, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        if os.geteuid() == 0:
            os.mknod(tmp_path / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        code = """
import os, socket, stat
print(sorted(os.listdir()), stat.S_ISFIFO(os.stat('fifo').st_mode), stat.S_ISSOCK(os.stat('socket').st_mode))
try:
    socket.socket(socket.AF_UNIX).connect('socket')
except OSError as error:
    print(error.strerror)
try:
    print(open('zero', 'rb').read(4))
except OSError as error:
    print(error.errno in (2, 13))
# A pipe is one between programs of the VM.
fd = os.open('fifo', os.O_RDWR | os.O_NONBLOCK)
os.write(fd, b'x')
"""
        done = dhg("exec", "--vm", "-c", code, cwd=tmp_path)
        names = sorted(os.listdir(tmp_path))
        assert ok(done) == f"{names} True True\nConnection refused\nTrue\n"
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 10) == b""
    os.close(reader)
