"""Running the guest's own programs natively in the tree that becomes its root file system."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator

from .. import proc
from ..errors import DeadlineExceeded, ImageError

#: For the host's programs that this takes, some of which a user's PATH may lack, and for the guest's.
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
PYTHON = "/usr/bin/python3"
#: Whatever the time of a source is: in the image all times are one, and bytecode that names another is compiled anew at each import.
COMPILE = (PYTHON, "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash")


def run(tree: str, argv: list[str], *, mounts: bool, timeout_s: float, log: str) -> None:
    """Run a program in `tree` as root, or as what a user namespace calls so.

    With `mounts` it has /proc, /dev, and /tmp and /root of its own.

    Raises what `proc.run` raises.
    """
    where = shlex.quote(tree)
    # Mounts end with the namespace, so the tree can be removed whatever happens.
    mount = f"mount -t proc proc {where}/proc && mount --rbind /dev {where}/dev && "
    # What a program leaves in them is not the image's.
    mount += "".join(f"mount -t tmpfs tmpfs {where}/{name} && " for name in ("tmp", "root"))
    user = ["-r"] if os.geteuid() else []
    if mounts:
        shell = ["sh", "-c", f'{mount}exec chroot {where} "$@"', "sh"]
        argv = ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child", *shell, *argv]
    else:
        argv = [*(["unshare", *user] if user else []), "chroot", tree, *argv]
    proc.run(argv, timeout_s=timeout_s, log=log, env=ENV)


def can_mount(tree: str, log: str) -> bool:
    """Whether this host lets us mount in a namespace, which takes root with all its capabilities or user namespaces."""
    try:
        run(tree, ["/usr/bin/test", "-e", "/proc/self/exe"], mounts=True, timeout_s=60, log=log)
    except (proc.CommandFailed, DeadlineExceeded):
        return False
    return True


def compile_python(tree: str, folders: list[str], *, mounts: bool, log: str) -> None:
    """Compile the Python sources in `folders` by the guest's own Python: the host's may be another version.

    Raises `ImageError` if that did not work: the guest would compile each module that it imports, under emulation.
    """
    # Several at a time takes semaphores, which are in /dev/shm.
    argv = [*COMPILE, *(["-j0"] if mounts else []), *folders]
    try:
        run(tree, argv, mounts=mounts, timeout_s=1800, log=log)
    except proc.CommandFailed as error:
        # compileall counts any file that is no Python 3 (test data of some package) as a failure.
        if error.status != 1:
            raise
    left = [folder for folder in folders if not any(_compiled(tree + folder))]
    if left:
        raise ImageError(
            f"no Python module was compiled in {', '.join(left)}", hint=f"the compiler's words are in {log}"
        )


def _compiled(folder: str) -> Iterator[str]:
    """The compiled modules directly in `folder` and in its packages that are taken whatever the source's time is (PEP 552)."""
    for name in ("__pycache__", *(f"{name}/__pycache__" for name in os.listdir(folder))):
        if os.path.isdir(f"{folder}/{name}"):
            for item in os.scandir(f"{folder}/{name}"):
                with open(item.path, "rb") as file:
                    if file.read(8)[4:] == b"\1\0\0\0":
                        yield item.path
