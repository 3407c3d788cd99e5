"""The stand-in's guest: the real keeper, runner and relay, in processes of this host's, with a Unix socket for each vsock port.

guest.py FOLDER LEASH boot|restored: the directory of the sockets; a descriptor, with whose other end all of it dies. A guest that is
restored goes on where one that boots is frozen.

Where it may (as root, with /dev/fuse) it has the host's files, mounted in a mount namespace of its own: /run/dhg/shares as in a VM,
/mnt/workspace for what is /workspace there, and the rest of /mnt for `--mount`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from dhg.guest import exchange, relay, runner, script, shares, stdio, vsock
from dhg.wire import frames

FOLDER, LEASH, BOOT = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "boot"
F_SETSIG = 10
# linux/sched.h, sys/mount.h
CLONE_NEWNS = 0x20000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 1 << 18
#: Listeners that nobody accepts from.
PORTS: list[socket.socket] = []


def listen(port: int) -> socket.socket:
    """A listener at the port."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(f"{FOLDER}/{port}")
    made.listen(4)
    return made


def die_with_the_stand_in() -> None:
    """Keeper, runner and relay."""
    os.setpgid(0, 0)
    fcntl.fcntl(LEASH, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(LEASH, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(LEASH, fcntl.F_SETFL, os.O_ASYNC)


def mount_files() -> bool:
    """What `init` does: mount, start the relay, go to the workspace. False where it cannot be; then only the port is there."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        PORTS.append(listen(vsock.FILES))
        return False
    libc = ctypes.CDLL(None, use_errno=True)

    def check(status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    for folder in (b"/run", b"/mnt"):
        check(libc.mount(b"empty", folder, b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m"))
    shares.WORKSPACE = "/mnt/workspace"
    for made in (relay.SHARES, shares.WORKSPACE):
        os.makedirs(made)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    check(libc.mount(b"dhg", relay.SHARES.encode(), b"fuse", MS_NOSUID | MS_NODEV, options))
    if os.fork() == 0:
        try:
            vsock.serve_files(fuse, listen)
        finally:
            os._exit(0)
    os.close(fuse)
    check(libc.mount(f"{relay.SHARES}/0".encode(), shares.WORKSPACE.encode(), None, shares.MS_BIND, None))
    os.chdir(shares.WORKSPACE)
    return True


class Guest(runner.Runner):
    """A clone that leaves this host's clock and name as they are."""

    def __init__(self, arrange: Callable[..., None] | None) -> None:
        super().__init__(-1, clone=False)
        self.clone = arrange is not None
        self.arrange = arrange

    def wake(self, request: exchange.Request) -> None:
        """Of what a clone does, the mounts."""
        if request.mounts or request.flags & frames.FLAG_NO_WORKSPACE:
            self.arrange(request.mounts, not request.flags & frames.FLAG_NO_WORKSPACE)


def main() -> None:
    """As `runner.main_vm`, without what needs a VM."""
    die_with_the_stand_in()
    there = mount_files()
    channels = vsock.Channels(vsock.keep(), runner.hello({}), listen)
    guest = Guest(shares.ready() if there else None)
    guest.own_main()
    control = -1
    if BOOT:
        control = channels.prepare()
        runner.log(control, "warm-up")
    guest.stdin, guest.ends = runner.attach_ports(False)
    script.settle()
    sys.path[0] = ""
    if BOOT:
        versions = {"python": sys.version.split()[0], "deephaven": "stand-in"}
        stdio.write_all(control, runner.hello(versions))
    channels.stdin, channels.ends, guest.meet = guest.stdin, guest.ends, channels.meet
    guest.use(channels.meet(-1))
    guest.serve()
    threading.Event().wait()


if __name__ == "__main__":
    main()
