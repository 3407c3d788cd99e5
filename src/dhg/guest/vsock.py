"""The channels under Firecracker: a vsock listener each, which is what survives a snapshot.

Guest code: standard library only. While the VM is prepared, the host connects to the control port alone. A restored guest goes on in
`accept`; the host connects to every port, and a HELLO on control says that all are there. If a connection is lost before a
request came (the device is reset at the restore), the host makes them all anew: the first byte of each is the number of the
try, so that connections of different tries are not mixed.

The relay has a listener of its own for the host's files. To that the host connects once, after HELLO, when no reset is to come any
more: a request that has been written to a connection that is lost then could not be had back from the kernel.

The keeper is the parent of the runner's process. It is handed the connections, so that none is closed when the runner
dies, and says DIED then, as `init` does under QEMU.
"""

from __future__ import annotations

import _socket
import os
import select
import struct
from collections.abc import Callable

from ..wire import frames
from . import relay
from .stdio import write_all

#: The channels' ports, as in engine/vsock.py.
PORTS = {"control": 1024, "stdout": 1025, "stderr": 1026, "stdin": 1027}
FILES = 1028
CID_ANY = 0xFFFFFFFF

Listen = Callable[[int], _socket.socket]


def listen(port: int) -> _socket.socket:
    """A listener at a vsock port."""
    sock = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    sock.bind((CID_ANY, port))
    sock.listen(4)
    return sock


def accept(listener: _socket.socket) -> int:
    """The next connection, as a descriptor; blocks."""
    fd: int = listener._accept()[0]  # type: ignore[attr-defined]
    return fd


def accept_try(listener: _socket.socket) -> tuple[int, int]:
    """The next connection on which the number of a try comes, and that number; blocks."""
    while True:
        fd = accept(listener)
        try:
            number = os.read(fd, 1)
        except ConnectionError:
            number = b""
        if number:
            return fd, number[0]
        os.close(fd)


def accept_alive(listener: _socket.socket) -> int:
    """The next connection that the host has not given up, as a descriptor; blocks."""
    while True:
        fd = accept(listener)
        lost = select.poll()
        lost.register(fd, select.POLLRDHUP)
        if not lost.poll(0):
            return fd
        os.close(fd)


def serve_files(fuse: int, make: Listen = listen) -> None:
    """The relay's process, as `relay.main` is under QEMU; `fuse` is the descriptor of /dev/fuse."""
    listener = make(FILES)
    carrier = relay.Relay(fuse, -1)
    relay.begin(fuse)
    # Frozen in here, without a connection. That of a clone's host is taken by the kernel: this process does not wake up before there
    # is something to ask, and then no request is in its hands that could be lost.
    asked = select.poll()
    asked.register(fuse, select.POLLIN)
    asked.poll()
    carrier.port = accept_alive(listener)
    try:
        carrier.carry()
    except ConnectionError:
        pass  # the host is gone in the middle of a message


class Channels:
    """The listeners, and the connections once `meet` has returned."""

    def __init__(self, keeper: _socket.socket, greeting: bytes, make: Listen = listen) -> None:
        self._listeners = {name: make(port) for name, port in PORTS.items()}
        self._keeper = keeper
        #: The descriptor that becomes the channel of the script's stdin.
        self.stdin = 0
        #: Those that are stdout and stderr once more, see stdio.attach.
        self.ends = (1, 2)
        #: What is written to control when all connections are there.
        self.greeting = greeting

    def prepare(self) -> int:
        """The control connection of the preparing host."""
        return accept(self._listeners["control"])

    def meet(self, control: int) -> int:
        """Wait for the host of a clone; descriptors `stdin`, 1 and 2 are the channels then. The new control connection.

        `control`, if not -1, is an older one that is given up.
        """
        while True:
            if control >= 0:
                os.close(control)
            try:
                control = self._meet()
                write_all(control, self.greeting)
                return control
            except ConnectionError:
                continue

    def _meet(self) -> int:
        found = {name: accept_try(listener) for name, listener in self._listeners.items()}
        while len({number for _, number in found.values()}) > 1:
            newest = max(number for _, number in found.values())
            for name, (fd, number) in found.items():
                if number != newest:
                    os.close(fd)
                    found[name] = accept_try(self._listeners[name])
        fds = {name: fd for name, (fd, _) in found.items()}
        for name, fd in zip(("stdout", "stderr"), self.ends, strict=True):
            os.dup2(fds[name], fd, inheritable=fd < 3)
        for name, fd in (("stdin", self.stdin), ("stdout", 1), ("stderr", 2)):
            os.dup2(fds[name], fd, inheritable=fd < 3)
            os.close(fds[name])
        rights = struct.pack("iii", fds["control"], 1, 2)
        self._keeper.sendmsg([b"\0"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        return fds["control"]


def keep() -> _socket.socket:
    """Fork: returns in the child, which is to be the runner, the socket for `Channels`. The parent waits for the child's end, says
    DIED where a host is there to hear it, and ends with the child's status.

    To be called first of all, while this process is small and has one thread.
    """
    ours, theirs = _socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        return theirs
    theirs.close()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    code = code if code >= 0 else 128 - code
    _report(ours, code)
    os._exit(code)


def _report(handed: _socket.socket, code: int) -> None:
    """Write DIED to the control connection that was handed over last, if any."""
    control = -1
    handed.setblocking(False)
    # Those before the last are of connections that were lost.
    kept: list[int] = []
    while True:
        try:
            data, ancillary, _, _ = handed.recvmsg(16, 256)
        except OSError:
            break
        if not data:
            break
        for _, _, content in ancillary:
            kept += struct.unpack(f"{len(content) // 4}i", content)
            control = kept[-3]
    if control >= 0:
        try:
            write_all(control, frames.frame(frames.DIED, frames.field(frames.F_EXIT, code)))
            # The host ends the VM when it has read that. Until then no channel may be closed: an end of output that came
            # before would look like the end of the VM.
            while os.read(control, 4096):
                pass
        except OSError:
            pass
