"""What `dhg exec --vm` imports. Each module here costs; one that is added must be worth it."""

from __future__ import annotations

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
    "dhg.wire.client",
    "dhg.wire.frames",
    "__future__",
    "_socket",
    "_struct",
    "fcntl",
    "select",
    # By machine.run and proc.limit, when QEMU runs already.
    "resource",
}

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


def test_the_hot_path_imports_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert loaded - ALLOWED == set()
    assert "dhg.engine.qmp" in loaded


def test_what_lies_beside_the_command_is_not_imported(tmp_path: Path) -> None:
    shutil.copy(Path(sys.executable).with_name("dhg"), tmp_path)
    (tmp_path / "select.py").write_text("raise SystemExit('another')")
    done = subprocess.run([tmp_path / "dhg", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["dhg"]), done.stderr
