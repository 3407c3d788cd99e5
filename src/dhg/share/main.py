"""The process of the server: takes the descriptors it inherited, serves, and says by its exit status what it saw."""

from __future__ import annotations

import os
from stat import S_ISREG

from ..errors import DhgError, HostError
from . import beneath
from .nodes import Share
from .server import Broken, Server
from .start import FD_CHANNEL, FD_SHARES, READ_ONLY, REFUSED_WRITE, TEMPORARY

IGNORE = b".dhgignore"
#: Descriptors for the server itself, beside those that a guest may hold.
SPARE_FDS = 64


def main(words: list[str]) -> int:
    """Serve the shares that `words` name, as in `0r`: number, then READ_ONLY, WRITABLE or TEMPORARY; the exit status."""
    import resource

    os.umask(0)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 4096 + SPARE_FDS
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        beneath.check()
        shares = [
            share(int(word[:-1]), FD_SHARES + at, writable=word[-1] != READ_ONLY) for at, word in enumerate(words)
        ]
        status = 0
    except DhgError as error:
        # Every request is answered all the same, with an error: a guest that is not answered waits.
        os.write(2, f"{error}\n".encode())
        shares, status = [], 2
    server = Server(FD_CHANNEL, shares, max_handles=limit - SPARE_FDS)
    # The guest's kernel may still know what another server gave out before the freeze (snapshot/rehearsal.py).
    server.tables.begin_at(int.from_bytes(os.urandom(4)) << 24)
    try:
        server.serve()
    except Broken as error:
        os.write(2, f"the guest sent {error}\n".encode())
        status = 1
    temporary = [FD_SHARES + at for at, word in enumerate(words) if word[-1] == TEMPORARY]
    if temporary and not os.read(0, 1):
        # Whoever started us was killed, and cannot do it any more.
        for fd in temporary:
            remove(fd)
    return status or (REFUSED_WRITE if server.files.refused_write else 0)


def share(number: int, fd: int, *, writable: bool) -> Share:
    """The share of a directory, with what its .dhgignore says. Raises `HostError`: then nothing may be shared."""
    made = Share(number, fd, writable=writable)
    try:
        found = beneath.find(fd, IGNORE)
    except FileNotFoundError:
        return made
    try:
        status = os.fstat(found)
        if not S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        data = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(data, "rb") as file:
            text = file.read(1 << 21)
        from .ignore import Patterns

        made.patterns = Patterns(text)
        made.guard = (status.st_dev, status.st_ino)
    except (OSError, ValueError) as error:
        raise HostError(f"cannot use .dhgignore: {error}; nothing is shared") from None
    finally:
        os.close(found)
    return made


def remove(fd: int) -> None:
    """Remove an open directory by the name that it has now, if it still has it by then."""
    from ..files import remove_open

    parent, name = os.path.split(os.readlink(f"/proc/self/fd/{fd}"))
    try:
        # Its guest may have taken our own right to look into it.
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
        above = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    except OSError:
        return
    # This process ends now, and closes both.
    remove_open(top, above, name)
