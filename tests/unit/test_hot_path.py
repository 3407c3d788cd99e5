"""What `dhg exec --vm` imports. Each module here costs; one that is added must be worth it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ALLOWED = {
    "dhg",
    "dhg.cli",
    "dhg.cli.exec_",
    "dhg.cli.options",
    "dhg.config",
    "dhg.engine",
    "dhg.engine.qmp",
    "dhg.errors",
    "dhg.machine",
    "dhg.proc",
    "dhg.snapshot",
    "dhg.snapshot.readahead",
    "dhg.snapshot.store",
    "dhg.wire",
    "dhg.wire.frames",
    "__future__",
    "_socket",
    "_struct",
    "fcntl",
}
#: When QEMU starts already, on another CPU.
MEANWHILE = {"dhg.wire.client", "resource", "select"}

SCRIPT = """
import sys
before = set(sys.modules)
from dhg.cli import main
try:
    main(["exec", "--vm", "-c", "pass"])
except BaseException:
    pass
print("\\n".join(sorted(set(sys.modules) - before)))
"""


def loaded(**env: str) -> set[str]:
    argv = [sys.executable, "-c", SCRIPT]
    env = {**os.environ, **env}
    return set(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60, env=env).stdout.split())


def test_the_hot_path_imports_nothing_else() -> None:
    found = loaded()
    assert found - ALLOWED - MEANWHILE == set()
    assert "dhg.wire.client" in found


def test_what_can_wait_is_imported_while_qemu_starts(tmp_path: Path) -> None:
    """Without a snapshot there is no QEMU."""
    found = loaded(DHG_HOME=str(tmp_path))
    assert found - ALLOWED == set()
    assert "dhg.engine.qmp" in found


def test_what_lies_beside_the_command_is_not_imported(tmp_path: Path) -> None:
    shutil.copy(Path(sys.executable).with_name("dhg"), tmp_path)
    (tmp_path / "fcntl.py").write_text("raise SystemExit('another')")
    done = subprocess.run([tmp_path / "dhg", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["dhg"]), done.stderr
