"""The server: answers the guest's file system requests from directories of the host, over a stream socket.

Nothing that arrives is trusted. A length that cannot be ends the connection; anything else that makes no sense is answered with an
error. Node ids and handles are keys of tables (`nodes`), names are single components, files are found beneath the shared directory
(`beneath`) and opened only if they are regular files or directories. The messages are laid out in `protocol`.
"""

from __future__ import annotations

import errno
import os
from struct import error as StructError

from .nodes import ROOT_ID, Share, refuse
from .protocol import (
    BATCH_FORGET,
    BATCH_IN,
    FORGET,
    FORGET_IN,
    FORGET_ONE,
    IN,
    MAX_MESSAGE,
    ONE_WAY,
    OUT,
    RELEASE,
    RELEASE_IN,
    RELEASEDIR,
    SEEN,
    USED,
    USED_IN,
)
from .writing import Writer


class Gone(Exception):
    """The other side has closed the connection."""


class Broken(Exception):
    """The other side sent what cannot be a message."""


class Server:
    """Answers requests on the socket `fd` from `shares`, until the other side is gone."""

    def __init__(self, fd: int, shares: list[Share], *, max_handles: int = 4096) -> None:
        self.fd = fd
        #: Messages that go before the reply which is being made, in one write with it.
        self._before: list[bytes] = []
        self.files = Writer(shares, max_handles=max_handles, send=self._before.append)
        self.tables = self.files.tables
        self._operations = self.files.operations()

    def serve(self) -> None:
        """Answer until the other side is gone. Raises `Broken`."""
        buffer = memoryview(bytearray(MAX_MESSAGE))
        have = 0
        try:
            while True:
                try:
                    got = os.readv(self.fd, (buffer[have:],))
                except ConnectionError:
                    return
                if not got:
                    return
                have += got
                start = 0
                while have - start >= IN.size:
                    length = IN.unpack_from(buffer, start)[0]
                    if not IN.size <= length <= MAX_MESSAGE:
                        raise Broken(f"a message of {length} bytes")
                    if have - start < length:
                        break
                    self._message(buffer[start : start + length])
                    start += length
                if start:
                    buffer[: have - start] = bytes(buffer[start:have])
                    have -= start
        except Gone:
            return
        finally:
            self.tables.close_all()

    def _message(self, message: memoryview) -> None:
        _, opcode, unique, node = IN.unpack_from(message)
        body = message[IN.size :]
        if opcode in ONE_WAY:
            self._one_way(opcode, node, body)
            return
        error, reply = 0, b""
        handler = self._operations.get(opcode)
        try:
            if handler is None:
                raise refuse(errno.ENOSYS)
            found = handler(node, body)
            if isinstance(found, int):
                OUT.pack_into(self.files.out, 0, OUT.size + found, 0, unique)
                self._send(self.files.out[: OUT.size + found])
                return
            reply = found
        except OSError as why:
            error = why.errno or errno.EIO
        except (OverflowError, ValueError, StructError):
            error = errno.EINVAL
        except MemoryError:
            error = errno.ENOMEM
        self._send(memoryview(b"".join((*self._before, OUT.pack(OUT.size + len(reply), -error, unique), reply))))
        self._before.clear()

    def _send(self, data: memoryview) -> None:
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except ConnectionError:
            raise Gone from None

    def _one_way(self, opcode: int, node: int, body: memoryview) -> None:
        try:
            if opcode == FORGET:
                self.tables.forget(node, FORGET_IN.unpack_from(body)[0])
            elif opcode in (RELEASE, RELEASEDIR) and node != ROOT_ID:
                self.tables.close(RELEASE_IN.unpack_from(body)[0], node)
            elif opcode == USED:
                self.files.ahead.used(USED_IN.unpack_from(body)[0], node)
            elif opcode == SEEN:
                self.files.ahead.seen(node)
            elif opcode == BATCH_FORGET:
                count = BATCH_IN.unpack_from(body)[0]
                data = body[BATCH_IN.size : BATCH_IN.size + count * FORGET_ONE.size]
                for one, times in FORGET_ONE.iter_unpack(data):
                    self.tables.forget(one, times)
        except (OSError, StructError):
            pass  # there is no reply in which to say so
