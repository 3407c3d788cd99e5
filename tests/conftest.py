"""What all tests share: a clean environment, the `dhg` command, and a look for leftovers at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

DHG = str(Path(sys.executable).with_name("dhg"))
#: A VM under emulation on a busy machine; whatever takes longer hangs.
DEADLINE_S = 100.0

Completed = subprocess.CompletedProcess[bytes]
Dhg = Callable[..., Completed]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "DHG_VERSION",
        "DHG_QEMU",
        "DHG_VM_RESTORE",
        "DHG_VM_EAGER_UFFD",
        "DHG_VM_MEMORY",
        "DHG_FIRECRACKER",
        "DHG_ENGINE",
        "DHG_VM_CHUNK",
        "PYTHONPATH",
    ):
        monkeypatch.delenv(name, raising=False)


def run_dhg(
    *args: str,
    stdin: bytes = b"",
    env: dict[str, str] | None = None,
    timeout_s: float = DEADLINE_S,
    cwd: Path | None = None,
) -> Completed:
    """Run the installed command as a user does."""
    return subprocess.run(
        [DHG, *args],
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        check=False,
    )


@pytest.fixture
def dhg() -> Dhg:
    """The command line."""
    return run_dhg


def qemus_of(home: Path) -> list[int]:
    """The pids of QEMUs whose command line names `home`."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    argv: Sequence[bytes] = file.read().split(b"\0")
            except OSError:
                continue
            if argv and b"qemu-system" in argv[0] and any(os.fsencode(home) in arg for arg in argv):
                found.append(int(name))
    return found


def share_stages(home: Path) -> None:
    """Give a home the build stages of the real one, so that a prepare there makes a snapshot only."""
    from dhg import config

    (home / "cache").mkdir(mode=0o700, parents=True)
    for stage in ("base", "image"):
        os.makedirs(f"{config.cache_dir()}/{stage}", exist_ok=True)
        os.symlink(f"{config.cache_dir()}/{stage}", home / "cache" / stage)


def gone(pid: int, within_s: float) -> bool:
    """Whether a process ends within that time; one that only waits to be reaped (by whoever adopted it) has ended."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="session", autouse=True)
def _nothing_left() -> Iterator[None]:
    before = set(os.listdir("/tmp"))
    yield
    from dhg import config

    assert qemus_of(Path(config.home())) == [], "QEMU processes are left"
    left = [name for name in set(os.listdir("/tmp")) - before if name.startswith("dhg")]
    assert left == [], "temporary files are left"
