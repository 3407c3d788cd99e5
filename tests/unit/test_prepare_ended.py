"""A prepare that is ended: what it started ends, too, and what it was building goes; where it was killed, the next one sees to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.conftest import gone

import dhg
from dhg import config
from dhg.image import build

# `dhg vm prepare` with one stage, which a shell and what it starts take for ever over. It prints where the stage is made.
PREPARE = """
import sys
from dhg import cli, proc
from dhg.image import build as image
from dhg.snapshot import build

deaf_to = sys.argv.pop()
script = f'''
cd "$1"
trap "" {deaf_to}
sleep 1000 & echo $! > child
echo $$ > shell.tmp; mv shell.tmp shell
while :; do wait; done
'''

def prepare(**_):
    def stage(tmp):
        print(tmp, flush=True)
        proc.run(["sh", "-c", script, "sh", tmp], timeout_s=1000, log=tmp + "/log")
    return image.cached("base", "key", stage)

build.prepare = prepare
cli.run()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DHG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@contextmanager
def preparing(
    *, deaf_to: str = "HUP", ignored: signal.Signals | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], list[int], Path]]:
    """A prepare at work: the process, the pids of what it started, and the directory of the unfinished stage."""
    before = signal.signal(ignored, signal.SIG_IGN) if ignored else None
    env = {**os.environ, "PYTHONPATH": str(Path(dhg.__file__).parents[1])}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", PREPARE, "vm", "prepare", deaf_to],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
    finally:
        if ignored:
            signal.signal(ignored, before)
    pids: list[int] = []
    try:
        assert process.stdout is not None
        tmp = Path(process.stdout.readline().decode().strip())
        while not (tmp / "shell").exists():
            assert process.poll() is None
            time.sleep(0.01)
        pids += [int((tmp / name).read_text()) for name in ("shell", "child")]
        yield process, pids, tmp
    finally:
        process.kill()
        process.communicate()
        for pid in pids:
            if not gone(pid, 0.1):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_of_one_that_is_told_to_end(number: signal.Signals, home: Path) -> None:
    with preparing() as (process, pids, tmp):
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (128 + number, b"", b"")
        assert all(gone(pid, 2.0) for pid in pids)
        assert os.listdir(tmp.parent) == [".lock"]


def test_more_signals_cut_nothing_short(home: Path) -> None:
    # What it started has to be killed, after two seconds.
    with preparing(deaf_to="HUP TERM") as (process, pids, tmp):
        process.send_signal(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM
        assert all(gone(pid, 2.0) for pid in pids)
        assert os.listdir(tmp.parent) == [".lock"]


def test_under_nohup_a_hangup_is_ignored(home: Path) -> None:
    with preparing(ignored=signal.SIGHUP) as (process, _, tmp):
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert tmp.exists()


def test_what_an_orphan_writes_is_not_the_next_builds(home: Path) -> None:
    with preparing() as (process, pids, tmp):
        process.kill()
        process.communicate()
        assert not any(gone(pid, 0.1) for pid in pids)

        def stage(ours: str) -> None:
            assert ours != str(tmp)
            assert not tmp.exists()
            # As the orphan might.
            tmp.mkdir()
            (tmp / "orphan").touch()
            Path(ours, "result").touch()

        result = build.cached("base", "key", stage)
        assert os.listdir(result) == ["result"]
        assert sorted(os.listdir(f"{config.cache_dir()}/base")) == [".lock", tmp.name, "key"]
        build.cached("base", "other", lambda _: None)
        assert sorted(os.listdir(f"{config.cache_dir()}/base")) == [".lock", "key", "other"]
