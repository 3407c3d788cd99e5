"""Where things are, and the defaults. On the hot path: imports `os` only."""

from __future__ import annotations

import os

from .errors import UsageError

#: The Deephaven release that this release of dhg was tested with.
DEFAULT_DEEPHAVEN = "42.7"

#: The name of the snapshot without Deephaven: a plain Python in the same VM, quick to make, for trying a hypervisor.
BARE = "bare"

#: What `dhg vm prepare` gives a VM unless told otherwise, and a bare one.
DEFAULT_MEMORY_MIB = 2048
DEFAULT_BARE_MEMORY_MIB = 256

#: The next step where what is ours cannot be written.
HOME_HINT = "set DHG_HOME to a writable directory"


def home() -> str:
    """The data directory: `DHG_HOME`, by default `~/.dhg`. It need not exist."""
    path = os.environ.get("DHG_HOME") or os.path.join(os.path.expanduser("~"), ".dhg")
    if not os.path.isabs(path):
        path = os.path.abspath(path)
    return path


def snapshots_dir() -> str:
    """Where the snapshots are, one directory a Deephaven version."""
    return home() + "/snapshots"


def cache_dir() -> str:
    """Where the results of the build stages are, one directory a stage."""
    return home() + "/cache"


def engine() -> str | None:
    """The engine that `DHG_ENGINE` names, if it does. Raises `UsageError` for one that there is not."""
    return check_engine(os.environ["DHG_ENGINE"]) if os.environ.get("DHG_ENGINE") else None


def use_checkpoint() -> bool:
    """Whether a restore may use QEMU's checkpoint: `DHG_VM_RESTORE` (checkpoint, the default, or state).

    Raises `UsageError` for anything else.
    """
    way = os.environ.get("DHG_VM_RESTORE") or "checkpoint"
    if way not in ("checkpoint", "state"):
        raise UsageError(f"DHG_VM_RESTORE is {way!r}", hint="there are checkpoint and state")
    return way == "checkpoint"


def check_engine(name: str) -> str:
    """`name` itself if it is an engine's. Raises `UsageError` otherwise."""
    if name not in ("qemu", "firecracker"):
        raise UsageError(f"no such engine: {name!r}", hint="there are qemu and firecracker")
    return name


def check_version(version: str) -> str:
    """`version` itself if it is `bare` or can be the name of a release (letters, digits, `.`, `_`, `+`, `-`; at most 64).

    Raises `UsageError` otherwise: versions become directory names, and `clean` removes directories.
    """
    if version == BARE:
        return version
    allowed = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._+-"
    if not version or len(version) > 64 or not version[0].isdigit() or any(c not in allowed for c in version):
        raise UsageError(f"not a version: {version!r}", hint="versions look like 42.7; `dhg vm status` lists them")
    return version


def title(version: str) -> str:
    """What a snapshot of `version` holds, in words."""
    return "a bare Python" if version == BARE else f"Deephaven {version}"


def parse_size_mib(text: str) -> int:
    """MiB of a size such as `2G`, `1536M` or `2048` (MiB). Raises `UsageError` for anything else."""
    number, unit = text[:-1], text[-1:].upper()
    if unit.isdigit():
        number, unit = text, "M"
    factor = {"M": 1, "G": 1024}.get(unit)
    if factor is None or not number.isdigit():
        raise UsageError(f"not a memory size: {text!r}", hint="write it as 2G or 2048M")
    return int(number) * factor
