"""The host's end of Firecracker's vsock device: a Unix socket through which the guest's ports are reached.

A connection begins with one line, `CONNECT <port>`, answered with `OK <number>` once the guest has a listener there (Firecracker's
docs/vsock.md). Nobody listening is an end of file. The guest's listeners survive a snapshot, connections do not. The first byte
on a channel of a clone is the number of the try, see guest/vsock.py.
"""

from __future__ import annotations

import _socket
import select

from .. import proc
from ..errors import DeadlineExceeded

#: The channels and their ports, as in guest/vsock.py.
CHANNELS = (("control", 1024), ("stdout", 1025), ("stderr", 1026), ("stdin", 1027))
#: The port of the relay, which takes no tries: guest/vsock.py says why.
FILES = 1028

#: How long to wait for a guest that does not listen yet, before asking again.
PAUSE_S = 0.05


class Refused(Exception):
    """Nobody listens at the port, or the connection was reset."""


def connect(path: str, port: int, deadline: proc.Deadline) -> _socket.socket:
    """A connection to a port of the guest behind the socket at `path`. Raises `Refused`, `DeadlineExceeded`."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        try:
            sock.connect(path)
            sock.sendall(b"CONNECT %d\n" % port)
            answer = _line(sock, deadline)
        except OSError as error:
            raise Refused(f"port {port}: {error.strerror}") from error
        if not answer.startswith(b"OK "):
            raise Refused(f"port {port}: {answer!r}")
        return sock
    except BaseException:
        sock.close()
        raise


def _line(sock: _socket.socket, deadline: proc.Deadline) -> bytes:
    """The first line that comes, and not a byte more: the next ones are the guest's."""
    poller = select.poll()
    poller.register(sock.fileno(), select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not poller.poll(deadline.left() * 1000):
            raise DeadlineExceeded(f"the guest did not answer within {deadline.timeout_s:g} s")
        part = sock.recv(1)
        if not part or len(line) > 64:
            return line
        line += part
    return line


def connect_all(path: str, number: int, deadline: proc.Deadline) -> list[_socket.socket]:
    """A connection for each channel, in order, by try `number` (1 to 255). Raises as `connect`; none stays open then."""
    found: list[_socket.socket] = []
    try:
        for _, port in CHANNELS:
            found.append(connect(path, port, deadline))
            try:
                found[-1].sendall(bytes([number]))
            except OSError as error:
                raise Refused(f"port {port}: {error.strerror}") from error
    except BaseException:
        for sock in found:
            sock.close()
        raise
    return found
