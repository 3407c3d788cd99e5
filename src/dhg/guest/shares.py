"""The host's directories in the guest's tree: /workspace and what `--mount` adds. What is mounted where; the files come by `relay`.

Guest code: standard library only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence

from . import relay

WORKSPACE = "/workspace"

# linux/mount.h, sys/mount.h
MS_BIND = 0x1000
MNT_DETACH = 2


def ready() -> Callable[[Sequence[str], bool], None]:
    """Call once, before the freeze: from now on requests go to the host. Returns `arrange`, with its C library loaded."""
    os.path.lexists(f"{relay.SHARES}/{relay.POKE.decode()}")
    libc = ctypes.CDLL(None, use_errno=True)

    def check(status: int, path: str) -> None:
        if status:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)

    def arrange(mounts: Sequence[str], workspace: bool) -> None:
        """Mount share 1, 2, ... on the directories `mounts`, made if need be; without `workspace`, take that away.

        Raises `OSError`.
        """
        if not workspace:
            check(libc.umount2(WORKSPACE.encode(), MNT_DETACH), WORKSPACE)
            # The working directory was in what has been taken away; what is below is empty and the VM's own.
            os.chdir(WORKSPACE)
        for number, target in enumerate(mounts, start=1):
            os.makedirs(target, exist_ok=True)
            source = f"{relay.SHARES}/{number}"
            check(libc.mount(os.fsencode(source), os.fsencode(target), None, MS_BIND, None), target)

    return arrange
