"""Run in a VM of QEMU: the relay as it is under Firecracker, over vsock connections of the guest's kernel with itself (its
loopback transport), with the host's server at their other end.

Expects the module at /mnt/modules and this package at /mnt/site. Ends with status 0 if all is as it should be.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import sys

sys.path.insert(0, "/mnt/site")

from dhg.guest import relay, vsock
from dhg.share.nodes import Share
from dhg.share.server import Server

#: linux/vm_sockets.h: VMADDR_CID_LOCAL. asm/unistd_64.h: init_module.
LOCAL, INIT_MODULE = 1, 175
libc = ctypes.CDLL(None, use_errno=True)


def check(status: int) -> None:
    """Raise what a C function that failed has left."""
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def connect() -> socket.socket:
    """As Firecracker does it for the host."""
    made = socket.socket(socket.AF_VSOCK)
    made.connect((LOCAL, vsock.FILES))
    return made


def start_relay() -> int:
    """Mount at /tmp/mount and start the relay, up to the freeze; its pid."""
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    check(libc.mount(b"dhg", b"/tmp/mount", b"fuse", 6, options))
    relay.SHARES = "/tmp/mount"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            vsock.serve_files(fuse)
            status = 0
        finally:
            os._exit(status)
    os.close(fuse)
    assert os.listdir("/tmp/mount/0") == []
    assert not os.path.lexists("/tmp/mount/.frozen")
    return pid


def start_server(host: socket.socket) -> int:
    """Serve /tmp/ro as share 0, /tmp/rw as share 1; the pid."""
    pid = os.fork()
    if pid == 0:
        shares = [Share(n, os.open(f"/tmp/{name}", os.O_PATH), writable=n == 1) for n, name in enumerate(("ro", "rw"))]
        try:
            Server(host.fileno(), shares).serve()
        finally:
            os._exit(0)
    return pid


def write(path: str, data: bytes) -> None:
    """Make a file."""
    with open(path, "wb") as file:
        file.write(data)


def read(path: str) -> bytes:
    """What is in a file."""
    with open(path, "rb") as file:
        return file.read()


def fails(path: str, *numbers: int, write: bool = False) -> None:
    """Opening it fails with one of these."""
    try:
        open(path, "w" if write else "r").close()
    except OSError as error:
        assert error.errno in numbers, error
        return
    raise AssertionError(f"{path} can be opened")


def main() -> None:
    """All of it."""
    module = read("/mnt/modules/vsock_loopback.ko")
    check(libc.syscall(INIT_MODULE, module, len(module), b""))
    for name in ("mount", "ro", "rw"):
        os.mkdir(f"/tmp/{name}")
    big = os.urandom(5_000_001)
    write("/tmp/ro/big", big)
    write("/tmp/ro/small", b"small")
    carrier = start_relay()
    # The kernel takes them, and the relay is still where it was frozen; these are given up again.
    for _ in range(3):
        connect().close()
    host = connect()
    assert not select.select([host], [], [], 0.3)[0]
    server = start_server(host)
    assert read("/tmp/mount/0/small") == b"small"
    assert read("/tmp/mount/0/big") == big
    assert sorted(os.listdir("/tmp/mount/0")) == ["big", "small"]
    write("/tmp/mount/1/new", big)
    assert read("/tmp/rw/new") == big
    fails("/tmp/mount/0/new", errno.EROFS, write=True)
    # A server that dies, whereupon the client closes the channel: an error, and no wait.
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    host.shutdown(socket.SHUT_RDWR)
    fails("/tmp/mount/0/other", errno.ENOTCONN, errno.ECONNABORTED)
    assert os.waitpid(carrier, 0)[1] == 0
    print("good")


if __name__ == "__main__":
    main()
