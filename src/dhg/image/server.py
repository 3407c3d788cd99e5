"""The server, started and warmed up natively, as a file system that a guest under emulation starts it from: a stage of its own.

In it are `start`, the process as a program (engine/serverprocess.py), and what it has written to /tmp and to root's home. It
depends on the root image, on the guest's code, of which the process is made, and on the memory of the VM.

Where the host does not let us (namespaces, ptrace), the guest starts the server itself: a minute more of `prepare`.
"""

from __future__ import annotations

import array
import os
import shlex
import socket
import struct
import time

from .. import proc
from ..engine import machinecode, ptrace, resume, serverprocess
from ..errors import DeadlineExceeded, DhgError, ImageError
from ..files import remove_tree
from ..guest import native
from . import build, kernel
from .tree import ENV, PYTHON

#: Natively it takes ten seconds.
TIMEOUT_S = 300.0
#: The first thread's number, and on: above what a guest has given out when it starts the program (`init`).
FIRST_PID = 9001
#: The kernel keeps a little of the memory for itself; of the rest the Java heap gets half, as in a VM (guest/jvm.py).
KERNEL_MIB = 68
_READY_FD, _LEASH_FD = 3, 4
_MAIN = "import sys; sys.path[0] = '/run/dhg/lib'; from dhg.guest import native; native.main(int(sys.argv[1]), int(sys.argv[2]))"


def heap_mib(memory_mib: int) -> int:
    """The size of the Java heap in a VM of so much memory, in MiB."""
    return (memory_mib - KERNEL_MIB) // 2


def sources() -> str:
    """What stands for the code that the process is made of and by, as an input of the stage's key."""
    files = kernel.guest_files()
    parts = [f"{name}\0{files[name].hex()}" for name in sorted(files) if name.startswith("dhg/lib/")]
    for module in (machinecode, ptrace, resume, serverprocess):
        with open(str(module.__file__)) as file:
            parts.append(file.read())
    with open(__file__) as file:
        parts.append(file.read())
    return "\0".join(parts)


def key(root: str, memory_mib: int) -> str:
    """The name of the stage's result for the root image in the directory `root`."""
    return build.stage_key(os.path.basename(root), str(memory_mib), sources())


def make(root: str, memory_mib: int, log: str) -> str:
    """The path of `server.erofs` for a root image, from the cache or made. Raises `DhgError` where that does not work here."""

    def make_in(tmp: str) -> None:
        tree = f"{tmp}/tree"
        proc.run(["fsck.erofs", f"--extract={tree}", f"{root}/root.erofs"], timeout_s=300, log=log)
        kernel.put_library(f"{tree}/run/dhg/lib")
        os.makedirs(f"{tree}/workspace", exist_ok=True)
        out = f"{tmp}/out"
        os.mkdir(out)
        before = {name: set(os.listdir(f"{tree}/{name}")) for name in ("tmp", "root")}
        _start(tree, f"{out}/start", heap_mib(memory_mib), log)
        for name, old in before.items():
            os.mkdir(f"{out}/{name}")
            for new in set(os.listdir(f"{tree}/{name}")) - old:
                os.rename(f"{tree}/{name}/{new}", f"{out}/{name}/{new}")
        remove_tree(tree)
        proc.run(["mkfs.erofs", "--quiet", "-T0", "--all-root", f"{tmp}/server.erofs", out], timeout_s=300, log=log)
        remove_tree(out)

    return build.cached("server", key(root, memory_mib), make_in) + "/server.erofs"


def _start(tree: str, target: str, heap: int, log: str) -> None:
    """Start the server in `tree`, and write its process to `target` when it is ready."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    # It waits to be written down, and for nothing else: it has to end with us.
    leash, hand = os.pipe2(os.O_CLOEXEC)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # What is received comes with the sender's number as it is here, whatever it is in its namespace.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        child = proc.spawn(
            _argv(tree, heap),
            program=proc.find_program("unshare"),
            fds={1: fd, 2: fd, _READY_FD: theirs.fileno(), _LEASH_FD: leash},
            env=ENV,
        )
        theirs.close()
        with child:
            proc.kill_with_us(child.pid, leash)
            pid = _ready(ours)
            serverprocess.write(pid, target, os.path.realpath(tree))
            child.kill()
    except OSError as error:
        raise ImageError(f"the server was not started natively: {error}") from error
    finally:
        ours.close()
        theirs.close()
        for number in (fd, leash, hand):
            os.close(number)


def _argv(tree: str, heap: int) -> list[str]:
    where = shlex.quote(tree)
    # A process of its own, not the namespace's first: that number is init's in a guest.
    script = (
        f"mount -t proc proc {where}/proc && mount --rbind /dev {where}/dev"
        f" && cd {where}/workspace && echo {FIRST_PID - 1} > {where}/proc/sys/kernel/ns_last_pid || exit"
        f'\nchroot {where} "$@" {_LEASH_FD}<&- &\nwait $!'
    )
    user = ["-r"] if os.geteuid() else []
    # Its clock begins at zero, as a guest's does.
    clocks = [
        f"--{name}=-{int(time.clock_gettime(clock))}"
        for name, clock in (("monotonic", time.CLOCK_MONOTONIC), ("boottime", time.CLOCK_BOOTTIME))
    ]
    namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--time", *clocks, "--fork", "--kill-child"]
    variables = [f"{name}={value}" for name, value in (native.environ() | native.LIBRARIES).items()]
    program = [
        "/usr/bin/env",
        "-i",
        "-C",
        "/workspace",
        *variables,
        PYTHON,
        "-u",
        "-c",
        _MAIN,
        str(_READY_FD),
        str(heap),
    ]
    return ["unshare", *user, *namespaces, "sh", "-c", script, "sh", *program]


def _ready(ours: socket.socket) -> int:
    """Wait until the server is ready; the number of its process."""
    deadline = proc.Deadline(TIMEOUT_S)
    ours.settimeout(deadline.left())
    size = struct.calcsize("3i")
    try:
        data, extra, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(size))
    except TimeoutError:
        raise DeadlineExceeded(f"the server was not ready within {TIMEOUT_S:g} s") from None
    if not data:
        raise ImageError("the server ended before it was ready")
    for level, kind, content in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return array.array("i", content[:size])[0]
    raise ImageError("the kernel does not say who has sent something")


def try_to_make(root: str, memory_mib: int, log: str) -> tuple[str, str]:
    """What `make` returns, or an empty path and why there is none."""
    try:
        return make(root, memory_mib, log), ""
    except (DhgError, OSError) as error:
        return "", str(error)
