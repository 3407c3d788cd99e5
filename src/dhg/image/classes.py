"""The archive of classes (class data sharing) in a root image: made by the image's own JVM, natively, in its tree.

Under emulation the start of the JVM is mostly the loading of classes; out of an archive they are mapped.
An image without one works the same, slower; so does one whose archive the JVM does not accept.
"""

from __future__ import annotations

import os

from .. import proc
from ..errors import DeadlineExceeded
from ..files import remove_tree
from . import kernel
from .tree import PYTHON, run

#: Where it is in the image; guest/jvm.py names it, too.
ARCHIVE = "usr/local/lib/dhg/classes.jsa"
#: Any that compresses references as a VM's does: the archive depends on no more of it.
HEAP_MIB = 990
TIMEOUT_S = 900.0
_WORK = "dhg-training"
_MAIN = (
    f"import sys; sys.path[0] = '/{_WORK}'; from dhg.guest import training; training.main('/{ARCHIVE}', '{HEAP_MIB}')"
)


def sources() -> str:
    """What an archive is made with, as an input of a stage's key."""
    files = kernel.guest_files()
    used = ("jvm", "queries", "training", "preview")
    return "\0".join([_MAIN, *(files[f"dhg/lib/dhg/guest/{name}.py"].decode() for name in used)])


def make(tree: str, log: str, *, mounts: bool) -> bool:
    """Make the archive in the root file system `tree`; False, with the reason in `log`, where that did not work.

    It takes `mounts`, see `tree.run`.
    """
    work = f"{tree}/{_WORK}"
    kernel.put_library(work)
    os.makedirs(os.path.dirname(f"{tree}/{ARCHIVE}"), exist_ok=True)
    try:
        if mounts:
            run(tree, [PYTHON, "-c", _MAIN], mounts=True, timeout_s=TIMEOUT_S, log=log)
    except (proc.CommandFailed, DeadlineExceeded):
        # Half of one is none.
        if os.path.exists(f"{tree}/{ARCHIVE}"):
            os.unlink(f"{tree}/{ARCHIVE}")
    finally:
        remove_tree(work)
    made = os.path.isfile(f"{tree}/{ARCHIVE}")
    if not made:
        with open(log, "a") as file:
            file.write("no archive of classes: prepare takes a minute more, and a query's first run is slower\n")
    return made


def freeze_times(tree: str) -> None:
    """Give the jars the time that all files have in the image: the archive holds them to it."""
    for folder, _, names in os.walk(tree):
        for name in names:
            if name.endswith(".jar") and not os.path.islink(f"{folder}/{name}"):
                os.utime(f"{folder}/{name}", (0, 0))
