"""What a caller leaves to a process of ours, and we to our children: signals and descriptors. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
import os
from dhg import cli, compiler, proc

def main():
    print(repr(proc.run(["sh", "-c", "echo out"], timeout_s=20)))
    found = compiler.Compilation(b"1", "x")
    os.kill(found._child.pid, proc.SIGKILL)
    found.code()
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
    done = run_exec(body.replace("0.5", "60"), "--timeout", "1", "-c", "1")
    expected = b"error: timed out after 1 s\nhint: the script was running\n"
    assert (done.stdout, done.stderr, done.returncode) == (b"", expected, 3)
