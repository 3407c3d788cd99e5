"""What `dhg exec --vm` imports. Each module here costs; one that is added must be worth it."""

from __future__ import annotations

import subprocess
import sys

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
    "struct",
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
