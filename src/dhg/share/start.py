"""Starts the server in a process of its own: a slow file system does not hold up a script's output, and what parses a guest's bytes
holds nothing but the shared directories."""

from __future__ import annotations

import os
import sys

from .. import proc
from ..errors import UsageError

#: The server's descriptors: the channel, and from FD_SHARES on one a share.
FD_CHANNEL, FD_SHARES = 3, 4
ADDRESS_SPACE_BYTES = 1 << 30
#: A server has nothing to do when its VM is gone; one that does not end waits for a file system that hangs.
END_S = 2.0

#: Exit status of a server that refused a guest's attempt to write.
REFUSED_WRITE = 16

CODE = "import sys; sys.path.insert(0, sys.argv[1]); from dhg.share import main; sys.exit(main.main(sys.argv[2:]))"


def server(channel: int, shares: tuple[tuple[str, bool], ...], *, log: int) -> proc.Process:
    """Start a server for `shares`, pairs of a directory and whether the guest may write there; the directory "" is none.

    It ends when the other side of `channel` does, and says in the file `log` why if it was for another reason. Raises
    `UsageError` for a directory that cannot be opened, `HostError`.
    """
    fds = {1: log, 2: log, FD_CHANNEL: channel}
    args: list[str] = []
    try:
        for number, (path, writable) in enumerate(shares):
            if path:
                fd = FD_SHARES + len(args)
                fds[fd] = open_share(path)
                args.append(f"{number}{'w' if writable else 'r'}")
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


def end(child: proc.Process, log: int) -> tuple[bool, str | None]:
    """Wait for a server whose VM is gone; whether it refused a write, and what went wrong with it, if anything did."""
    status = child.wait(END_S)
    child.stop()
    said = proc.tail(os.pread(log, 65536, 0).decode("utf-8", "replace"))
    os.close(log)
    if status == REFUSED_WRITE or status == 0:
        return status == REFUSED_WRITE, None
    return False, said or (f"the server ended with status {status}" if status is not None else "a file system hangs")
