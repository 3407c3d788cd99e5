"""Files and directories: private, atomic, durable. Not on the hot path."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from . import config
from .errors import HostError

#: How often a tree that others change meanwhile is gone through.
REMOVE_TRIES = 4
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _lock_file(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", hint=config.HOME_HINT) from error


@contextmanager
def locked(path: str, *, shared: bool = False) -> Iterator[None]:
    """Hold an exclusive (or shared) lock on the file `path` (made if need be); waits for whoever holds it. Raises `HostError`."""
    fd = _lock_file(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def try_lock(path: str) -> int | None:
    """A descriptor that holds the exclusive lock on the file `path` (made if need be) until it is closed; None if taken.

    Raises `HostError`.
    """
    fd = _lock_file(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def private_dir(path: str) -> str:
    """Make a directory that only its owner can enter, with those above it; `path`. Raises `HostError`."""
    try:
        _make_private(path)
        # Below our home also what was there before, made by hand or by another release.
        folder = path
        while folder.startswith(config.home() + "/"):
            if os.stat(folder).st_mode & 0o077:
                os.chmod(folder, 0o700)
            folder = os.path.dirname(folder)
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}", hint=config.HOME_HINT) from error
    return path


def _make_private(path: str) -> None:
    # One by one: makedirs would give its mode to the last only.
    if os.path.isdir(path):
        return
    _make_private(os.path.dirname(path))
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        # Another command may have been quicker; a file in the way is an error.
        if not os.path.isdir(path):
            raise


def remove_tree(path: str) -> None:
    """Remove a directory whatever the modes in it are, as far as that goes. Does nothing if it is not there, or is a symlink.

    See `remove_open` for what holds while others change the tree.
    """
    parent, name = os.path.split(path.rstrip("/"))
    try:
        above = os.open(parent or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        top = _enter(above, name)
        try:
            remove_open(top, above, name)
        finally:
            os.close(top)
    except OSError:
        pass
    finally:
        os.close(above)


def remove_open(top: int, above: int, name: str, *, timeout_s: float = float("inf")) -> None:
    """Empty the open directory `top`, and remove it if it still is what the directory `above` has as `name`.

    Others, a hostile script among them, may rename, link and chmod in the tree meanwhile: nothing is reached by a path, no symlink
    is followed, and no mode is changed but those of directories in the tree. Where that gets in the way, or takes more than
    `timeout_s` seconds, something is left. Both descriptors stay open. Raises no `OSError`.
    """
    until = time.monotonic() + timeout_s
    # Again if something was moved about or made meanwhile, but not for ever.
    for _ in range(REMOVE_TRIES):
        try:
            # Another directory that has the name by now stays, even an empty one.
            if _empty(top, until) and os.path.samestat(
                os.stat(name, dir_fd=above, follow_symlinks=False), os.fstat(top)
            ):
                os.rmdir(name, dir_fd=above)
                return
        except OSError:
            pass
        if time.monotonic() >= until:
            return


def _empty(top: int, until: float) -> bool:
    """Remove what is in a directory; False if it is late, or somebody moved a directory that we were in. Raises `OSError`.

    One descriptor, however deep the tree is: the way back up is `..`, and has to lead to where we came from.
    """
    if os.fstat(top).st_mode & 0o700 != 0o700:
        os.fchmod(top, 0o700)
    # A descriptor of its own: that of `top` stays as it is, and is the caller's.
    here = os.open(".", _READ, dir_fd=top)
    try:
        #: Of each directory above: what it is, the name by which we left it, what else in it is to be entered.
        levels: list[tuple[os.stat_result, str, list[str]]] = []
        folders = _unlink_files(here)
        while time.monotonic() < until:
            if folders:
                name = folders.pop()
                try:
                    below = _enter(here, name)
                except OSError:
                    continue
                levels.append((os.fstat(here), name, folders))
                here, left = below, here
                os.close(left)
                folders = _unlink_files(here)
            elif levels:
                came_from, name, folders = levels.pop()
                here, left = os.open("..", _READ, dir_fd=here), here
                os.close(left)
                if not os.path.samestat(os.fstat(here), came_from):
                    return False
                try:
                    os.rmdir(name, dir_fd=here)
                except OSError:
                    pass
            else:
                return True
        return False
    finally:
        os.close(here)


def _enter(above: int, name: str) -> int:
    """Open a directory to read it, whatever its mode. Raises `OSError`, also for a symlink."""
    # What cannot be read can be opened so, and its mode changed without naming it again.
    found = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        if os.fstat(found).st_mode & 0o700 != 0o700:
            try:
                os.chmod(f"/proc/self/fd/{found}", 0o700)
            except PermissionError:
                # Somebody else's; what their mode allows may be enough.
                pass
        return os.open(".", _READ, dir_fd=found)
    finally:
        os.close(found)


def _unlink_files(fd: int) -> list[str]:
    """Remove what is no directory from an open directory; the names of the rest."""
    rest = []
    for name in os.listdir(fd):
        try:
            os.unlink(name, dir_fd=fd)
        except OSError:
            rest.append(name)
    return rest


def sync_dir(path: str) -> None:
    """fsync a directory, so that the names in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: str) -> None:
    """fsync a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: str) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises `OSError`."""
    # Loads OpenSSL, which the file server of a VM, an importer of this module, can do without.
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: str, data: bytes) -> None:
    """Write a private file, and have it on disk. Raises `OSError`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
