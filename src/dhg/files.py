"""Files and directories: private, atomic, durable. Not on the hot path."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import config
from .errors import HostError


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
    """Remove a directory whatever the modes in it are. Does nothing if it is not there."""

    def retry(function: Callable[[str], object], name: str, _: object) -> None:
        try:
            os.chmod(os.path.dirname(name), 0o700)
            function(name)
        except OSError:
            pass

    if os.path.lexists(path):
        shutil.rmtree(path, onerror=retry)


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
