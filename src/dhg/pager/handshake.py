"""The handshake: what a VMM sends to the process that is to serve its memory, as Firecracker does.

The VMM connects to a Unix stream socket and sends one message: JSON in UTF-8, a list of objects, with the userfaultfd attached to
its first byte (SCM_RIGHTS). One object a region of guest memory:

    base_host_virt_addr  where the region is in the VMM's address space, bytes
    size                 bytes
    offset               of the region's first byte in the snapshot's memory file, bytes
    page_size            bytes; 4096, or 2 MiB for hugetlbfs
    page_size_kib        its former name, also in bytes

The VMM has created the userfaultfd, agreed on the API and registered the regions. It sends nothing else, and gets no answer.
Fields: Firecracker's GuestRegionUffdMapping (src/vmm/src/persist.rs) and its
docs/snapshotting/handling-page-faults-on-snapshot-resume.md.
"""

from __future__ import annotations

import _json
import _socket
import os
import select
import struct
import time

from ..errors import DeadlineExceeded, ProtocolError
from .uffd import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: A message is some 130 bytes a region, and there are one or two.
MAX_MESSAGE = 1 << 16
MAX_REGIONS = 64
_PAGE_SIZES = (PAGE, 2 << 20, 1 << 30)
# asm-generic/socket.h, Linux 6.5; Python has no name for it.
SO_PEERPIDFD = 77


class Region:
    """A piece of guest memory: where it is in the VMM, and where its content is in the memory file; all in bytes."""

    __slots__ = ("address", "offset", "page_size", "size")

    def __init__(self, address: int, size: int, offset: int, page_size: int = PAGE) -> None:
        self.address = address
        self.size = size
        self.offset = offset
        self.page_size = page_size

    def __repr__(self) -> str:
        return f"Region({self.address:#x}, {self.size:#x}, {self.offset:#x}, {self.page_size})"


class Peer:
    """A VMM that has sent its message. `pidfd` becomes readable when it ends; `connection` is kept open until then."""

    __slots__ = ("connection", "pidfd", "regions", "uffd")

    def __init__(self, connection: _socket.socket, pidfd: int, uffd: int, regions: list[Region]) -> None:
        self.connection = connection
        self.pidfd = pidfd
        self.uffd = uffd
        self.regions = regions

    def close(self) -> None:
        """Close the descriptors."""
        self.connection.close()
        os.close(self.pidfd)
        os.close(self.uffd)


def parse(message: bytes, *, memory_bytes: int) -> list[Region]:
    """The regions that a message names, by address. `memory_bytes` is the size of the memory file.

    Raises `ProtocolError` for anything but a list of regions that do not overlap, have whole pages, and lie in the file: a file
    that is shorter than they need (by more than the rest of its last page) is no snapshot of this guest.
    """
    found = _decode(message)
    if not isinstance(found, list) or not 0 < len(found) <= MAX_REGIONS:
        raise ProtocolError(f"the VMM's message is not a list of 1 to {MAX_REGIONS} regions")
    regions = sorted((_region(item, memory_bytes) for item in found), key=lambda region: region.address)
    for name in ("address", "offset"):
        ends = 0
        for region in sorted(regions, key=lambda region: getattr(region, name)):
            if getattr(region, name) < ends:
                raise ProtocolError(f"regions overlap in their {name}: {regions}")
            ends = getattr(region, name) + region.size
    return regions


class _Context:
    """What the json module's scanner is told by its decoder."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float

    def __init__(self) -> None:
        self.memo: dict[str, str] = {}


def _decode(message: bytes) -> object:
    """The value of a JSON text, by the scanner inside the json module, whose import takes as long as an interpreter's start."""
    try:
        text = message.decode().strip(" \t\n\r")
        found, end = _json.make_scanner(_Context())(text, 0)  # type: ignore[arg-type]
        if end != len(text):
            raise ValueError(f"something follows at {end}")
    except (ValueError, StopIteration, RecursionError) as error:
        raise ProtocolError(f"the VMM's message is no JSON: {error}") from None
    return found


def _region(item: object, memory_bytes: int) -> Region:
    if not isinstance(item, dict):
        raise ProtocolError("a region is no object")
    page_size = item.get("page_size", item.get("page_size_kib", PAGE))
    numbers: list[Any] = [item.get("base_host_virt_addr"), item.get("size"), item.get("offset"), page_size]
    for name, value in zip(("base_host_virt_addr", "size", "offset", "page_size"), numbers, strict=True):
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ProtocolError(f"a region's {name} is {value!r}")
    region = Region(*numbers)
    if region.page_size not in _PAGE_SIZES:
        raise ProtocolError(f"pages of {region.page_size} bytes")
    if region.size == 0 or any(value % region.page_size for value in (region.address, region.size, region.offset)):
        raise ProtocolError(f"not whole pages: {region}")
    if region.address + region.size >= 1 << 63:
        raise ProtocolError(f"not an address range: {region}")
    if region.offset + region.size > -(-memory_bytes // PAGE) * PAGE:
        raise ProtocolError(
            f"the memory file is too short: {memory_bytes} bytes, the VMM expects {region.offset + region.size}",
            hint="the snapshot is damaged, or belongs to another VM",
        )
    return region


def accept(listener: _socket.socket, *, memory_bytes: int, timeout_s: float, leash: int = -1) -> Peer | None:
    """Wait for a VMM, and for its message however many pieces it comes in.

    None if `leash` (a descriptor) reports that whoever started us is gone, or the peer hangs up having sent nothing at all.
    Raises `ProtocolError` for a message that makes no sense, `DeadlineExceeded` after `timeout_s` seconds. Nothing stays open then.
    """
    ends = time.monotonic() + timeout_s
    if not _wait(listener.fileno(), leash, ends):
        return None
    # The socket module would cost as much to import as the rest of the pager.
    connection = _socket.socket(fileno=listener._accept()[0])  # type: ignore[attr-defined]
    fds: list[int] = []
    try:
        message = _receive(connection, leash, ends, fds)
        if message is None:
            raise _Nobody
        if len(fds) != 1:
            raise ProtocolError(f"{len(fds)} descriptors came with the VMM's message; one is expected")
        regions = parse(message, memory_bytes=memory_bytes)
        # Without O_NONBLOCK poll(2) reports an error instead of waiting (userfaultfd(2)).
        os.set_blocking(fds[0], False)
        return Peer(connection, _pidfd(connection), fds[0], regions)
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        connection.close()
        if isinstance(error, _Nobody):
            return None
        raise


class _Nobody(Exception):
    pass


def _wait(fd: int, leash: int, ends: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if leash >= 0:
        poller.register(leash, select.POLLIN)
    events = poller.poll(max(0.0, ends - time.monotonic()) * 1000)
    if not events:
        raise DeadlineExceeded("no VMM has sent its memory layout in time")
    return all(ready != leash for ready, _ in events)


def _receive(connection: _socket.socket, leash: int, ends: float, fds: list[int]) -> bytes | None:
    """The message; descriptors that come with it are added to `fds`. There is no length and no end mark, only the JSON's end."""
    message = b""
    while True:
        if not _wait(connection.fileno(), leash, ends):
            return None
        try:
            data, ancillary, flags, _ = connection.recvmsg(MAX_MESSAGE, _socket.CMSG_SPACE(16 * 4))
        except ConnectionError:
            data, ancillary, flags = b"", [], 0
        for level, kind, content in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fds.extend(struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4]))
        if flags & _socket.MSG_CTRUNC:
            raise ProtocolError("more descriptors came with the VMM's message than one")
        message += data
        if len(message) > MAX_MESSAGE:
            raise ProtocolError(f"the VMM's message is longer than {MAX_MESSAGE} bytes")
        if not data:
            if not message and not fds:
                return None
            raise ProtocolError(f"the VMM hung up after {len(message)} bytes of its message")
        if whole(message) and fds:
            return message


def whole(message: bytes) -> bool:
    """Whether `message` is a whole JSON list: its brackets are balanced (there are no strings with brackets in it)."""
    text = message.strip()
    if not text.startswith(b"["):
        # Never to become a list: let `parse` say so.
        return bool(text)
    return text.endswith(b"]") and text.count(b"[") == text.count(b"]") and text.count(b"{") == text.count(b"}")


def _pidfd(connection: _socket.socket) -> int:
    """A descriptor for the process at the other end."""
    try:
        fd: int = connection.getsockopt(_socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        pid, _, _ = struct.unpack("iII", connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
        fd = os.pidfd_open(pid)
    os.set_inheritable(fd, False)
    return fd


def listen(path: str) -> _socket.socket:
    """A listening socket at `path`. Raises `OSError`."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener
