"""What a caller leaves to a process of ours, and we to our children: signals and descriptors. Real processes."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dhg
from dhg import proc

#: Where the package under test is.
SRC = str(Path(dhg.__file__).parents[1])


def run_code(
    code: str, words: str = "", *, before: str = "", timeout_s: float = 60.0
) -> subprocess.CompletedProcess[bytes]:
    """Run Python `code` with `words` of the shell's (arguments, redirections) where that did `before`."""
    return subprocess.run(
        ["/bin/sh", "-c", f'{before}\nexec "$0" -c "$1" {words}', sys.executable, code],
        env={**os.environ, "PYTHONPATH": SRC},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


CHILDREN = """
from dhg import cli, proc

def main():
    print(repr(proc.run(["sh", "-c", "echo out"], timeout_s=20)))
    with proc.spawn(["/bin/sh", "-c", "exit 3"]) as child:
        print(child.wait(20.0))
    return 7

cli.main = main
cli.run()
"""


def test_a_caller_that_ignores_sigchld() -> None:
    done = run_code(CHILDREN, before="trap '' CHLD")
    assert (done.stdout, done.stderr, done.returncode) == (b"'out\\n'\n3\n", b"", 7)


def test_children_do_not_ignore_sigchld() -> None:
    go, start = os.pipe()
    read, write = os.pipe()
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        child = proc.spawn(["/bin/sh", "-c", "read line; grep SigIgn /proc/self/status"], fds={0: go, 1: write})
    finally:
        signal.signal(signal.SIGCHLD, before)
        os.close(go)
        os.close(write)
    with child:
        os.write(start, b"\n")
        os.close(start)
        assert child.wait(20.0) == 0
    with open(read, "rb") as file:
        ignored = int(file.read().split()[1], 16)
    assert not ignored & 1 << (signal.SIGCHLD - 1)


def test_a_wait_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with proc.spawn(["/bin/sh", "-c", "exit 3"]) as child:
        assert child.wait(1e12) == 3
    monkeypatch.setattr(proc, "LONGEST_WAIT_S", 0.01)
    with proc.spawn(["/bin/sh", "-c", "exec sleep 60"]) as child:
        assert child.wait(0.1) is None


#: What `exec` does with a machine, without one.
EXEC = """
import os, sys, time
from dhg import cli, errors, proc
from dhg.cli import exec_
from dhg.wire import client, frames

class Place:
    began_ns, phases, version, engine, acceleration = 0, {}, "1", "qemu", "tcg"
    released, refused_write, files_error, command = False, False, None, ["true"]
    def run(self, request, **options):
        self.released = True
        return run(self, request, **options)
    def interrupt(self): return False
    def usage(self): return {}
    def __enter__(self): return self
    def __exit__(self, *exc): pass

def result(code=0, *fields):
    return client.Result(frames.RESULT_HEAD.pack(code, 0, 0, 0) + b"".join(frames.field(*one) for one in fields))

exec_.Run._place = lambda self: Place()
%s
cli.run()
"""


def run_exec(body: str, *args: str, before: str = "", after: str = "") -> subprocess.CompletedProcess[bytes]:
    """`dhg exec` with `args` (shell words), whose place has a `run` as defined by `body`."""
    return run_code(EXEC % body, f"exec {' '.join(args)} {after}", before=before)


def test_a_timeout_may_be_long() -> None:
    body = """
exec_.proc.LONGEST_WAIT_S = 0.01
def run(self, request, **options):
    time.sleep(0.5)
    print("done", flush=True)
    return result()
"""
    for timeout in ("9999999", "1e12", "1e308"):
        done = run_exec(body, "--timeout", timeout, "-c", "1")
        assert (done.stdout, done.stderr, done.returncode) == (b"done\n", b"", 0)
    done = run_exec(body.replace("0.5", "60"), "--timeout", "3", "-c", "1")
    expected = b"error: timed out after 3 s\nhint: the script was running\n"
    assert (done.stdout, done.stderr, done.returncode) == (b"", expected, 3)


def report(done: subprocess.CompletedProcess[bytes]) -> dict[str, object]:
    """The object that `--json` promises, and nothing else."""
    jsonschema = pytest.importorskip("jsonschema")
    found = json.loads(done.stdout.decode("ascii"))
    schema = json.loads((Path(__file__).parents[2] / "docs" / "exec.schema.json").read_text())
    jsonschema.validate(found, schema, cls=jsonschema.Draft202012Validator)
    assert found["exit_code"] == done.returncode, done.stderr
    assert isinstance(found, dict)
    return found


TERMINATED = """
def run(self, request, **options):
    options["stdout"](b"so far")
    self.released = %s
    os.kill(os.getpid(), %d)
    time.sleep(60)
"""


def test_json_of_a_run_that_is_ended_by_a_signal() -> None:
    for released, outcome in ((True, "unknown"), (False, "not_started")):
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            found = report(run_exec(TERMINATED % (released, number), "--json", "-c", "1"))
            assert (found["outcome"], found["exit_code"], found["stdout"]) == (outcome, code, "so far")


def test_json_of_tables_that_are_none() -> None:
    body = """
def run(self, request, **options):
    return result(0, (frames.F_TABLE, %s))
"""
    for text in ("'{'", "'[' * 100_000", "'{\"rows\": NaN}'", "'{\"rows\": 1e999}'", "'5'", "'1' * 5000"):
        done = run_exec(body % text, "--json", "-c", "1")
        found = report(done)
        error = found["error"]
        assert isinstance(error, dict)
        assert (found["outcome"], found["exit_code"], error["type"]) == ("unknown", 2, "ProtocolError")
        assert done.stderr.startswith(b"error: the script's tables came as ")


def test_json_of_texts_that_are_no_utf8() -> None:
    body = r"""
def run(self, request, **options):
    options["stdout"]("\u00e9".encode() + b"\xff")
    table = '{"name": "\\ud800", "row_count": 0, "is_refreshing": false, "columns": [], "rows": [], "preview": ""}'
    return result(0, (frames.F_TABLE, table))
"""
    for before in ("export PYTHONIOENCODING=ascii", "export PYTHONUTF8=0 LC_ALL=C"):
        found = report(run_exec(body, "--json", "-c", "1", before=before))
        assert found["stdout"] == "\u00e9\ufffd"
        assert isinstance(found["tables"], list)
        assert found["tables"][0]["name"] == "\ud800"
    found = report(run_exec(body, "--json", "\"$(printf 'no\\377file')\""))
    error = found["error"]
    assert isinstance(error, dict)
    assert error["message"] == "cannot read no\udcfffile: No such file or directory"


def test_json_keeps_so_much_and_no_more() -> None:
    body = """
from dhg.cli import report
report.MAX_OUTPUT_BYTES = 1 << 20
def run(self, request, **options):
    for _ in range(64):
        options["%s"](b"x" * 65536)
    print("not reached")
"""
    for name in ("stdout", "stderr"):
        found = report(run_exec(body % name, "--json", "-c", "1"))
        error = found["error"]
        assert isinstance(error, dict)
        assert (found["outcome"], found["exit_code"], found[name]) == ("unknown", 2, "x" * (1 << 20))
        assert error["message"] == f"the script printed more than 1 MiB to {name}, which --json keeps in memory"
        assert error["hint"] == "run it without --json, or have it print less"


UNTRANSLATED = """
def run(self, request, **options):
    os.%s
"""


def test_what_the_system_refuses_is_an_error_and_no_traceback() -> None:
    for call, message in (
        ("mkdir('/proc/x/y')", "/proc/x/y: No such file or directory"),
        ("mkdir(b'/proc/x/y')", "/proc/x/y: No such file or directory"),
        ("lseek(-1, 0, 0)", "Bad file descriptor"),
    ):
        done = run_exec(UNTRANSLATED % call, "-c", "1")
        assert (done.stdout, done.stderr, done.returncode) == (b"", f"error: {message}\n".encode(), 2)
        done = run_exec(UNTRANSLATED % call, "--json", "-c", "1")
        error = report(done)["error"]
        assert isinstance(error, dict)
        assert (error["type"], error["message"]) == ("HostError", message)
        done = run_exec(UNTRANSLATED % call, "--debug", "-c", "1")
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"Traceback" in done.stderr


def test_a_working_directory_that_is_gone() -> None:
    before = "cd $(mktemp -d) && rmdir $PWD"
    message = b"error: the working directory does not exist any more\nhint: cd to another one\n"
    done = run_exec(UNTRANSLATED % "getcwd()", "-c", "1", before=before)
    assert (done.stdout, done.stderr, done.returncode) == (b"", message, 2)
    done = run_exec(UNTRANSLATED % "getcwd()", "--json", "-c", "1", before=before)
    assert done.stderr == message
    assert report(done)["outcome"] == "unknown"


def test_output_that_cannot_be_written() -> None:
    full = b"error: No space left on device\n"
    done = run_code("from dhg.cli import run; run()", "--help >/dev/full")
    assert (done.stderr, done.returncode) == (full, 2)
    done = run_exec("def run(self, *_, **__): return result()", "--json", "-c", "1", after=">/dev/full")
    assert (done.stderr, done.returncode) == (b"error: cannot write the script's output: No space left on device\n", 2)


NOTHING = "def run(self, *_, **__): return result()"


def test_a_timeout_ends_the_wait_for_who_writes_to_a_fifo(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    expected = b"error: timed out after 1 s\nhint: the script did not run\n"
    done = run_exec(NOTHING, "--timeout", "1", str(fifo))
    assert (done.stdout, done.stderr, done.returncode) == (b"", expected, 3)
    done = run_exec(NOTHING, "--json", "--timeout", "1", str(fifo))
    assert (done.stderr, report(done)["outcome"]) == (expected, "timeout")
    # Somebody has opened it and writes nothing.
    writer = os.open(fifo, os.O_RDWR)
    done = run_exec(NOTHING, "--timeout", "1", str(fifo))
    os.close(writer)
    assert (done.stdout, done.stderr, done.returncode) == (b"", expected, 3)


def test_json_of_a_run_that_is_ended_before_it_began() -> None:
    body = f"{NOTHING}\nexec_.Source = lambda *_: (os.kill(os.getpid(), {signal.SIGTERM:d}), time.sleep(60))"
    done = run_exec(body, "--json", "-c", "1")
    assert (report(done)["outcome"], done.returncode) == ("not_started", 143)


DESCRIPTORS = """
import os, sys
from dhg import cli, proc

def main():
    found = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
    next_one = os.open("/dev/zero", os.O_RDONLY)
    print("out", flush=True)
    print("err", file=sys.stderr, flush=True)
    inherited = proc.run(["sh", "-c", "readlink /proc/self/fd/0"], timeout_s=20)
    child = proc.spawn(["/bin/sh", "-c", "echo child; echo child >&2"])
    with child:
        status = child.wait(20.0)
    said = repr((found, next_one > 2, sys.stdin.read(), inherited, status))
    os.write(os.open(sys.argv[1], os.O_WRONLY), said.encode())
    return 7

cli.main = main
cli.run()
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_closed_standard_descriptors(closed: tuple[int, ...], tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.touch()
    done = run_code(DESCRIPTORS, f"{said} {' '.join(f'{fd}>&-' for fd in closed)}")
    out, err = (b"" if fd in closed else data for fd, data in ((1, b"out\nchild\n"), (2, b"err\nchild\n")))
    assert (done.stdout, done.stderr, done.returncode) == (out, err, 7)
    found, above, read, inherited, status = ast.literal_eval(said.read_text())
    assert [name == "/dev/null" for name in found] == [fd in closed or fd == 0 for fd in range(3)]
    assert (above, read, inherited, status) == (True, "", "/dev/null\n", 0)


def test_exec_with_closed_standard_descriptors() -> None:
    body = """
def run(self, request, **options):
    assert options["stdin"] is None
    options["stdout"](b"out")
    options["stderr"](b"err")
    return result(7)
"""
    for redirect, out, err in (("2>&-", b"out", b""), (">&-", b"", b"err"), ("<&-", b"out", b"err")):
        done = run_exec(body, "-c", "1", after=redirect)
        assert (done.stdout, done.stderr, done.returncode) == (out, err, 7)
    done = run_exec(body, "--no-such-option", after="2>&-")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 2)
    done = run_exec(body, "-", after="<&-")
    assert (done.stdout, done.returncode) == (b"out", 7)


def test_a_child_may_be_given_our_descriptor_0() -> None:
    read, write = os.pipe()
    script = "import sys; from dhg import proc\nwith proc.spawn(['/bin/cat', '/proc/self/fd/9'], fds={9: 0}) as c: c.wait(20.0)"
    os.write(write, b"through 0")
    os.close(write)
    with open(read, "rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": SRC},
            stdin=file,
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert (done.stdout, done.stderr, done.returncode) == (b"through 0", b"", 0)


def test_output_to_a_pipe_that_does_not_block() -> None:
    body = """
def run(self, request, **options):
    for _ in range(64):
        options["%s"](bytes(range(256)) * 256)
    return result()
"""
    for name in ("stdout", "stderr"):
        read, write = os.pipe()
        os.set_blocking(write, False)
        argv = [sys.executable, "-c", EXEC % (body % name), "exec", "-c", "1"]
        out, err = (write, None) if name == "stdout" else (None, write)
        environ = {**os.environ, "PYTHONPATH": SRC}
        with subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err) as process:
            os.close(write)
            # It has filled the pipe by then, most of the time.
            time.sleep(0.5)
            with open(read, "rb") as file:
                assert file.read() == bytes(range(256)) * (256 * 64)
            assert process.wait(60) == 0


def test_a_timeout_ends_output_to_a_pipe_that_does_not_block() -> None:
    body = """
def run(self, request, **options):
    while True:
        options["stdout"](b"x" * 65536)
"""
    read, write = os.pipe()
    os.set_blocking(write, False)
    argv = [sys.executable, "-c", EXEC % body, "exec", "--timeout", "3", "-c", "1"]
    with subprocess.Popen(
        argv, env={**os.environ, "PYTHONPATH": SRC}, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(60) == 3
        assert process.stderr is not None
        assert process.stderr.read() == b"error: timed out after 3 s\nhint: the script was running\n"
    os.close(read)
    os.close(write)


def test_a_script_from_a_stdin_that_does_not_block() -> None:
    body = """
def run(self, request, **options):
    options["stdout"](request.source)
    return result()
"""
    read, write = os.pipe()
    os.set_blocking(read, False)
    argv = [sys.executable, "-c", EXEC % body, "exec", "-"]
    with subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": SRC}, stdin=read, stdout=subprocess.PIPE) as process:
        os.close(read)
        time.sleep(0.5)
        os.write(write, b"1")
        os.close(write)
        assert process.stdout is not None
        assert process.stdout.read() == b"1"


def test_more_rows_than_there_can_be() -> None:
    body = """
def run(self, request, **options):
    client.encode(request, end_mark=bytes(16))
    return result()
"""
    for rows, code in (("9" * 30, 0), ("9" * 5000, 2)):
        done = run_exec(body, "--rows", rows, "-c", "1")
        assert done.returncode == code
        assert b"Traceback" not in done.stderr
