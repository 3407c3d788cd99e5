"""Starts the server in a process of its own: a slow file system does not hold up a script's output, and what parses a guest's bytes
holds nothing but the shared directories."""

from __future__ import annotations

import os
import sys

from .. import proc
from ..errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    Shares = tuple[tuple[str, str], ...]

#: The server's descriptors beside 0, 1 and 2: the channel, and from FD_SHARES on one a share.
FD_CHANNEL, FD_SHARES = 3, 4

#: What a guest may do in a share. A temporary one is removed if we go away before the VM does.
READ_ONLY, WRITABLE, TEMPORARY = "r", "w", "t"
ADDRESS_SPACE_BYTES = 1 << 30
#: A server has nothing to do when its VM is gone; one that does not end waits for a file system that hangs.
END_S, KILL_S = 2.0, 0.5

#: Exit status of a server that refused a guest's attempt to write.
REFUSED_WRITE = 16

CODE = "import sys; sys.path.insert(0, sys.argv[1]); from dhg.share import main; sys.exit(main.main(sys.argv[2:]))"


class FileServer:
    """A running server for `shares`, pairs of a directory (or "", for none) and READ_ONLY, WRITABLE or TEMPORARY.

    It serves `channel`, and ends when the other side of it does. Raises `UsageError` for a directory that cannot be opened,
    `HostError`.
    """

    __slots__ = ("_alive", "_log", "process")

    def __init__(self, channel: int, shares: Shares) -> None:
        self._log = os.memfd_create("dhg-files-log")
        # Its other end tells the server whether we are still there.
        alive, self._alive = os.pipe2(os.O_CLOEXEC)
        try:
            self.process = _spawn(channel, shares, log=self._log, alive=alive)
        except BaseException:
            os.close(self._log)
            os.close(self._alive)
            raise
        finally:
            os.close(alive)

    def leave(self) -> None:
        """Say that we see to TEMPORARY directories ourselves. Call it before the other side of the channel is closed."""
        try:
            os.write(self._alive, b".")
        except OSError:
            pass

    def kill(self) -> str | None:
        """End it at once, and leave the channel as it is, for another to serve it. What went wrong, if it had ended by itself."""
        ended = self.process.poll() is not None
        if not ended:
            os.kill(self.process.pid, proc.SIGKILL)
        _, why = self.end()
        return why if ended else None

    def end(self) -> tuple[bool, str | None]:
        """When the other side is gone: whether the guest tried to write where it may not, and what went wrong, if anything."""
        status = self.process.wait(END_S)
        if status is None:
            # Not Process.kill, which waits: in a system call that does not return not even KILL ends it at once.
            os.kill(self.process.pid, proc.SIGKILL)
            self.process.wait(KILL_S)
        self.process.close()
        said = proc.tail(os.pread(self._log, 65536, 0).decode("utf-8", "replace"))
        os.close(self._log)
        os.close(self._alive)
        if status in (0, REFUSED_WRITE):
            return status == REFUSED_WRITE, None
        if status is None:
            return False, "a file system of the host's does not answer"
        return False, said or f"the server ended with status {status}"


def _spawn(channel: int, shares: Shares, *, log: int, alive: int) -> proc.Process:
    fds = {0: alive, 1: log, 2: log, FD_CHANNEL: channel}
    args: list[str] = []
    try:
        for number, (path, mode) in enumerate(shares):
            if path:
                fd = FD_SHARES + len(args)
                fds[fd] = open_share(path)
                args.append(f"{number}{mode}")
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        argv = [sys.executable, "-I", "-S", "-c", CODE, package, *args]
        child = proc.spawn(argv, fds=fds)
    finally:
        for number, fd in fds.items():
            if number > FD_CHANNEL:
                os.close(fd)
    proc.limit(child.pid, address_space_bytes=ADDRESS_SPACE_BYTES, files=False)
    return child


def open_share(path: str) -> int:
    """A descriptor of a directory that is to be shared. Raises `UsageError`."""
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot share {path}: {error.strerror}") from None
