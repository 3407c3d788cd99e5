"""Firecracker's API: HTTP/1.1 over a Unix socket, as much of it as is spoken there.

By hand: http.client and json would take longer to import than a restore lasts. Requests are small objects of texts, numbers and truth
values; of answers the status counts, and for one that refuses, its text. The requests are those of Firecracker's OpenAPI
description (src/firecracker/swagger/firecracker.yaml); tests hold them against it.
"""

from __future__ import annotations

import _socket
import select

from .. import proc
from ..errors import DeadlineExceeded, MachineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Value = str | int | bool | Mapping[str, "Value"]

#: How long to wait before the next try to connect: nothing tells when the socket is there, only that the process has ended.
CONNECT_PAUSE_S = 0.001
_MAX_ANSWER = 1 << 20


def encode(value: Value) -> str:
    """JSON. Raises `UnicodeEncodeError` for a text that is not Unicode (a path in another encoding)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        value.encode()
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(char if char >= " " else f"\\u{ord(char):04x}" for char in escaped) + '"'
    return "{" + ",".join(f"{encode(name)}:{encode(item)}" for name, item in value.items()) + "}"


class Api:
    """A connection to the API of one Firecracker."""

    __slots__ = ("_socket",)

    def __init__(self, path: str, process: proc.Process, deadline: proc.Deadline) -> None:
        """Connect to the socket at `path` as soon as `process` has made it.

        Raises `MachineError` if the process ends before, `DeadlineExceeded`.
        """
        self._socket = connect(path, process, deadline)

    def request(self, method: str, path: str, body: Mapping[str, Value], *, deadline: proc.Deadline) -> None:
        """Send a request and wait until it is done. Raises `MachineError` if it is refused, `DeadlineExceeded`."""
        data = encode(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        try:
            self._socket.sendall(head.encode() + data)
            status, text = self._answer(deadline)
        except OSError as error:
            raise MachineError(f"Firecracker went away at {method} {path}: {error.strerror}") from error
        if status // 100 != 2:
            raise MachineError(f"Firecracker refused {method} {path} ({status})", detail=text)

    def _answer(self, deadline: proc.Deadline) -> tuple[int, str]:
        data = b""
        poller = select.poll()
        poller.register(self._socket.fileno(), select.POLLIN)
        while True:
            head, blank, body = data.partition(b"\r\n\r\n")
            if blank:
                status, length = _head(head)
                if len(body) >= length:
                    return status, body[:length].decode("utf-8", "replace")
            if not poller.poll(deadline.left() * 1000):
                raise DeadlineExceeded(f"Firecracker did not answer within {deadline.timeout_s:g} s")
            part = self._socket.recv(65536)
            data += part
            if not part or len(data) > _MAX_ANSWER:
                raise MachineError("Firecracker gave no whole answer", detail=data[:1000].decode("utf-8", "replace"))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _head(head: bytes) -> tuple[int, int]:
    """Status and length of the body."""
    lines = head.split(b"\r\n")
    words = lines[0].split(b" ", 2)
    length = 0
    try:
        if not words[0].startswith(b"HTTP/1."):
            raise ValueError
        status = int(words[1])
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                length = int(value)
    except (IndexError, ValueError):
        raise MachineError(f"Firecracker's answer is no HTTP: {lines[0][:100]!r}") from None
    # 1xx would be followed by the answer proper, and 204 has no body whatever the length says; Firecracker sends no 1xx unasked.
    return status, 0 if status == 204 else length


def connect(path: str, process: proc.Process, deadline: proc.Deadline) -> _socket.socket:
    """Connect to the Unix socket at `path`, which `process` is about to make."""
    while True:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
        except BaseException:
            sock.close()
            raise
        if process.wait(CONNECT_PAUSE_S) is not None:
            raise MachineError(f"Firecracker ended with status {process.status}")
        if deadline.left() == 0.0:
            raise DeadlineExceeded(f"Firecracker did not make its socket within {deadline.timeout_s:g} s")
