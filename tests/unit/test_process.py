"""What a caller leaves to a process of ours, and we to our children: signals and descriptors. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import dhg
from dhg import proc

#: Where the package under test is.
SRC = str(Path(dhg.__file__).parents[1])


def run_code(code: str, *, shell: str = "", timeout_s: float = 60.0) -> subprocess.CompletedProcess[bytes]:
    """Run Python `code` below a shell that did `shell` before."""
    return subprocess.run(
        ["/bin/sh", "-c", f'{shell}\nexec "$0" -c "$1"', sys.executable, code],
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
    done = run_code(CHILDREN, shell="trap '' CHLD")
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
