"""Snapshots made by the stand-in for Firecracker (standin.py), which is what can be run without usable KVM."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from dhg import proc
from dhg.engine import firecracker
from dhg.pager import uffd
from dhg.snapshot import store

MEMORY_MIB = 64


def stand_in(folder: Path, version: str = "1.16.0", faults: str = "-") -> str:
    """A program that is taken for Firecracker of `version`; its log is `requests` in `folder`. Its path."""
    # Its address space is bounded as Firecracker's is; threads' arenas would fill that.
    program = folder / f"firecracker-{version}-{faults}"
    python = [sys.executable, str(Path(__file__).with_name("standin.py")), version, str(folder / "requests"), faults]
    program.write_text(f'#!/bin/sh\nexport MALLOC_ARENA_MAX=1\nexec {shlex.join(python)} "$@"\n')
    program.chmod(0o755)
    return str(program)


def requests(folder: Path) -> list[str]:
    """The log's lines, and begin a new one."""
    log = folder / "requests"
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return lines


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DHG_HOME of its own."""
    monkeypatch.setenv("DHG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DHG_ENGINE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def needs_uffd() -> None:
    """Skip where memory cannot be served."""
    why = uffd.available()
    if why is not None:
        pytest.skip(why)


def make_snapshot(folder: Path, home: Path, program: str) -> str:
    """Boot, freeze and store a snapshot with the version `1`; its directory."""
    for name in ("kernel", "initramfs", "image"):
        (folder / name).write_bytes(b"x")
    spec = firecracker.Spec(
        program,
        firecracker.version_of(program),
        memory_mib=MEMORY_MIB,
        vcpus=1,
        kernel=str(folder / "kernel"),
        initramfs=str(folder / "initramfs"),
        image=str(folder / "image"),
    )
    path = home / "snapshots" / "1" / ".firecracker-0"
    path.mkdir(parents=True)
    console = os.open(folder / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        with firecracker.boot(spec, console=console, timeout_s=60) as vm:
            data = b""
            while b"deephaven=" not in data:
                data += vm.control.recv(4096)
            firecracker.freeze(vm, str(path / "state"), str(path / "ram"))
    finally:
        os.close(console)
    (path / "lock").touch()
    launch = store.launch_bytes(
        version="1",
        engine="firecracker",
        engine_version=spec.version,
        accel="tcg",  # so that no /dev/kvm is looked for
        memory_mib=MEMORY_MIB,
        argv=[program],
        checked=[program],
        own=[(str(path / name), str(path / name)) for name in ("ram", "state")],
    )
    (path / "launch").write_bytes(launch)
    os.symlink(path.name, path.parent / "firecracker")
    return str(path)


@pytest.fixture
def deadline() -> proc.Deadline:
    """For one run."""
    return proc.Deadline(60.0)
