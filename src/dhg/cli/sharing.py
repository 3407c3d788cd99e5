"""Which of the host's directories a run gets, where they are in the VM, and which tables come back: --rw, --mount, --no-workspace,
--output. Imported only for a script that is a file, or if one of these is asked for."""

from __future__ import annotations

import os

from ..errors import UsageError
from ..share.start import READ_ONLY, TEMPORARY, WRITABLE
from ..wire import frames
from .options import Values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..output import Outputs
    from ..share.start import Shares

WORKSPACE = "/workspace"
#: Where the guest finds share N whether it is mounted elsewhere or not (guest/relay.py).
SHARES = "/run/dhg/shares"
MAX_MOUNTS = 32

#: Directories of the VM that a mount must not cover: what runs there would lose its files.
TAKEN = ("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "root", "run", "sbin", "sys", "usr", "var")


class Mount:
    """HOST[:GUEST][:rw] of `--mount`. Without GUEST the directory is where it is on the host."""

    def __init__(self, text: str) -> None:
        path, _, mode = text.rpartition(":")
        self.writable = mode == "rw"
        if not path or mode not in ("rw", "ro"):
            path = text
        host, _, guest = path.rpartition(":/")
        self.host, self.guest = (host, f"/{guest}") if host else (path, os.path.abspath(path))
        self.guest = os.path.normpath(self.guest)
        if not os.path.isdir(self.host):
            raise UsageError(f"--mount {text}: there is no directory {self.host}", hint="--mount HOST[:GUEST][:rw]")
        if self.guest in ("/", "//", WORKSPACE) or self.guest.split("/")[1] in TAKEN or "\0" in self.guest:
            raise UsageError(
                f"--mount {text}: {self.guest} is taken in the VM",
                hint=f"--mount {self.host}:/mnt/NAME mounts it there",
            )


class Plan:
    """What of the host's a run gets."""

    __slots__ = ("file", "flags", "folder", "mounts", "outputs", "shares")

    def __init__(self, values: Values, filename: str) -> None:
        in_vm = values.flag("vm")
        wanted = [name for name in ("rw", "mount", "no_workspace") if values.flag(name)]
        if wanted and not in_vm:
            name = wanted[0].replace("_", "-")
            raise UsageError(f"--{name} needs --vm: without it the script has all of this host's files")
        workspace = not values.flag("no_workspace")
        if values.flag("output") and values.flag("host"):
            raise UsageError("--output does not go with --host: the tables are in that server")
        if values.flag("rw") and not workspace:
            raise UsageError("--rw is about the working directory, which --no-workspace takes away")
        mounts = [Mount(text) for text in values.texts("mount")]
        if len(mounts) > MAX_MOUNTS:
            raise UsageError(f"{len(mounts)} mounts; at most {MAX_MOUNTS}")
        self.shares: Shares = (("." if workspace else "", WRITABLE if values.flag("rw") else READ_ONLY),)
        self.shares += tuple((mount.host, WRITABLE if mount.writable else READ_ONLY) for mount in mounts)
        self.mounts = tuple(mount.guest for mount in mounts)
        self.flags = 0 if workspace else frames.FLAG_NO_WORKSPACE
        if any(access == WRITABLE for _, access in self.shares):
            self.flags |= frames.FLAG_WRITABLE
        self.outputs: Outputs | None = None
        if values.flag("output"):
            from ..output import Outputs

            self.outputs = Outputs(values.texts("output"))
        self.file: str | None = None
        self.folder: str | None = None
        if filename[:1] == "<":
            return
        path = os.path.abspath(filename)
        if not in_vm:
            self.folder = os.path.dirname(path)
            return
        folders = [(os.path.realpath(mount.host), mount.guest) for mount in mounts]
        if workspace:
            folders.append((os.path.realpath("."), WORKSPACE))
        # The innermost of them that holds it.
        folders.sort(key=lambda pair: -len(pair[0]))
        real = in_guest(os.path.realpath(path), folders)
        self.file = in_guest(path, folders) or real
        # A script that the VM cannot see is sent all the same; beside it in the VM there is nothing.
        self.folder = os.path.dirname(real) if real else WORKSPACE

    def open(self, *, in_vm: bool) -> tuple[str, ...]:
        """Make the outputs' directories and share them; what the request says of the outputs. Raises `DhgError`."""
        items: list[str] = []
        if self.outputs is None:
            return ()
        self.outputs.open()
        for one in self.outputs.all:
            place = f"{SHARES}/{len(self.shares)}" if in_vm else one.folder
            # Not by its name, which by now may be another's.
            self.shares += ((f"/proc/self/fd/{one.fd}", TEMPORARY),)
            items.append(f"{one.name}\0{one.format}\0{place}/{one.file}\0")
        return tuple(items)


def in_guest(path: str, folders: list[tuple[str, str]]) -> str | None:
    """Where a path of the host's is in the guest, by pairs of a host's directory and the guest's."""
    for host, guest in folders:
        if path.startswith(host.rstrip("/") + "/"):
            return f"{guest}/{path[len(host.rstrip('/')) + 1 :]}"
    return None
