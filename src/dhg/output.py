"""`--output NAME=FILE`: tables of a script become files of the host's, whole or not at all.

Beside each FILE a private directory is made, in which the script's VM (or server) writes. When the script has succeeded and
everything has arrived, the files are synced and renamed into place; otherwise the directories go away and older files are as they
were.

The script may be hostile and its VM still alive, and a VM that may write beside FILE can rename the directory away and put a symlink
in its place. So the directories are held open, and everything is done by descriptors; of what lies in them nothing is believed.
"""

from __future__ import annotations

import os
from errno import EEXIST
from stat import S_ISREG

from .errors import DhgError, HostError, UsageError
from .files import remove_open

FORMATS = ("parquet", "csv", "arrow")
#: A script that makes directories faster than they are removed does not hold up its user for longer.
REMOVE_S = 20.0

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        #: The directory that is written to; "" before `open`.
        self.folder = ""
        #: And its descriptor.
        self.fd = self._parent = self._written = -1

    @property
    def file(self) -> str:
        """The name of the file in `folder`."""
        return f"{self.name}.{self.format}"

    def open(self) -> None:
        """Make the directory. Raises `OSError`; call `close` then, too."""
        parent, name = os.path.split(self.target)
        self._parent = os.open(parent, _FOLDER)
        folder = f".{name[:100]}.dhg-{os.urandom(6).hex()}"
        os.mkdir(folder, 0o700, dir_fd=self._parent)
        self.folder = f"{parent}/{folder}"
        self.fd = os.open(folder, _FOLDER, dir_fd=self._parent)
        # Not ours: it would be emptied.
        if os.listdir(self.fd):
            os.close(self.fd)
            self.fd = -1
            raise FileExistsError(EEXIST, "somebody put another directory in place of ours")

    def check(self, mask: int) -> None:
        """Look at the file that was written, give it the mode that it is to have, and sync it. Raises `DhgError`, `OSError`."""
        # Without opening what may be a pipe or a device, and whatever its mode.
        found = os.open(self.file, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            status = os.fstat(found)
            # One that has another name, too, may be a file of the host's, whose mode is not ours to change.
            if not S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise DhgError(f"--output {self.path}: what was written is no regular file")
            if status.st_mode & 0o400 == 0:
                os.chmod(f"/proc/self/fd/{found}", 0o600)
            self._written = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(found)
        old = self._status(os.path.basename(self.target), self._parent)
        os.fchmod(self._written, old.st_mode & 0o777 if old and S_ISREG(old.st_mode) else 0o666 & ~mask)
        os.fsync(self._written)

    def put(self) -> None:
        """Rename the file that was checked into place. Raises `DhgError`, `OSError`."""
        name = os.path.basename(self.target)
        found = self._status(self.file, self.fd)
        if found is None or not os.path.samestat(found, os.fstat(self._written)):
            raise DhgError(f"--output {self.path}: what was written was replaced meanwhile")
        os.rename(self.file, name, src_dir_fd=self.fd, dst_dir_fd=self._parent)
        # Between the look and the rename there is a moment. Another file is just other content, as the script could have
        # written it; a symlink would lead whoever reads FILE to what the script itself cannot read.
        found = self._status(name, self._parent)
        if found is not None and not S_ISREG(found.st_mode):
            os.unlink(name, dir_fd=self._parent)
            raise DhgError(f"--output {self.path}: what was written was replaced meanwhile")
        os.fsync(self._parent)

    @staticmethod
    def _status(name: str, folder: int) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Remove the directory, if there is one."""
        if self.fd >= 0:
            remove_open(self.fd, self._parent, os.path.basename(self.folder), timeout_s=REMOVE_S)
        elif self.folder:
            try:
                os.rmdir(os.path.basename(self.folder), dir_fd=self._parent)
            except OSError:
                pass
        for fd in (self.fd, self._parent, self._written):
            if fd >= 0:
                os.close(fd)
        self.folder, self.fd, self._parent, self._written = "", -1, -1, -1


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
                one.open()
        except OSError as error:
            self.close()
            raise HostError(f"cannot write {one.path}: {error.strerror}") from None

    def deliver(self, error: str | None) -> None:
        """Put everything in place; `error` is what the guest says went wrong. Raises `DhgError`: nothing is changed then, unless
        a rename fails after others or the script's VM lives and interferes."""
        if error is not None:
            raise DhgError(f"--output {error}", hint="no output was written")
        mask = os.umask(0)
        os.umask(mask)
        try:
            for one in self.all:
                one.check(mask)
            for one in self.all:
                one.put()
        except OSError as why:
            raise HostError(f"cannot write {one.path}: {why.strerror}", hint="the script ran") from None

    def close(self) -> None:
        """Remove the directories."""
        for one in self.all:
            one.close()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
