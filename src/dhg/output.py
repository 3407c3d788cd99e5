"""`--output NAME=FILE`: tables of a script become files of the host's, whole or not at all.

Beside each FILE a private directory is made, in which the script's VM (or server) writes. When the script has succeeded and
everything has arrived, the files are synced and renamed into place; otherwise the directories go away and older files are as they
were.
"""

from __future__ import annotations

import os
import tempfile
from stat import S_ISREG

from .errors import DhgError, HostError, UsageError
from .files import remove_tree, sync_dir, sync_file

FORMATS = ("parquet", "csv", "arrow")


class Output:
    """One table and where it goes."""

    def __init__(self, item: str) -> None:
        self.name, equals, path = item.partition("=")
        kind = os.path.splitext(path)[1][1:].lower()
        if not equals or not self.name.isidentifier() or not path:
            raise UsageError(f"--output takes NAME=FILE, not {item!r}", hint="NAME is a variable that holds a table")
        if kind not in FORMATS:
            raise UsageError(
                f"--output {item}: the format is told by the file's name", hint="it ends in .parquet, .csv or .arrow"
            )
        self.format = kind
        # As a program that opens FILE would: a symlink leads to what is written.
        self.target = os.path.realpath(path)
        self.path = path
        #: The directory that is written to; "" before `Outputs.open`.
        self.folder = ""

    @property
    def file(self) -> str:
        """The name of the file in `folder`."""
        return f"{self.name}.{self.format}"


class Outputs:
    """All outputs of a run. A context manager: leaving it removes what has not been delivered."""

    def __init__(self, items: list[str]) -> None:
        self.all = [Output(item) for item in items]
        for at, one in enumerate(self.all):
            if any(one.target == other.target for other in self.all[:at]):
                raise UsageError(f"--output names {one.path} twice")
            if os.path.lexists(one.target) and not S_ISREG(os.stat(one.target).st_mode):
                raise UsageError(f"--output {one.path}: it is there, and no regular file")

    def open(self) -> None:
        """Make the directories. Raises `HostError`: nothing is left."""
        try:
            for one in self.all:
                parent, name = os.path.split(one.target)
                one.folder = tempfile.mkdtemp(prefix=f".{name[:100]}.dhg-", dir=parent)
        except OSError as error:
            self.close()
            raise HostError(f"cannot write {one.path}: {error.strerror}") from None

    def deliver(self, error: str | None) -> None:
        """Put everything in place; `error` is what the guest says went wrong. Raises `DhgError`: nothing is changed then, unless
        a rename fails after others."""
        if error is not None:
            raise DhgError(f"--output {error}", hint="no output was written")
        mask = os.umask(0)
        os.umask(mask)
        try:
            for one in self.all:
                written = f"{one.folder}/{one.file}"
                if not S_ISREG(os.lstat(written).st_mode):
                    raise DhgError(f"--output {one.path}: what was written is no regular file")
                os.chmod(written, os.stat(one.target).st_mode & 0o777 if os.path.exists(one.target) else 0o666 & ~mask)
                sync_file(written)
            for one in self.all:
                os.rename(f"{one.folder}/{one.file}", one.target)
                sync_dir(os.path.dirname(one.target))
        except OSError as why:
            raise HostError(f"cannot write {one.path}: {why.strerror}", hint="the script ran") from None

    def close(self) -> None:
        """Remove the directories."""
        for one in self.all:
            if one.folder:
                remove_tree(one.folder)
                one.folder = ""

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
