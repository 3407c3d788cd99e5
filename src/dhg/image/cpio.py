"""Writes the `newc` cpio archives that the kernel unpacks as an initramfs.

Layout from the kernel's Documentation/driver-api/early-userspace/buffer-format.rst: a header of 110 ASCII
characters (magic 070701 and thirteen 8-digit hexadecimal numbers), the name with a final NUL, the data; name and data
each padded to four bytes. Archives may follow one another.
"""

from __future__ import annotations


class Archive:
    """Collects entries; `whole()` gives the archive. Owner is root, times are zero: equal input, equal bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._seen: set[str] = set()

    def directory(self, name: str) -> None:
        """Add a directory, and those above it, unless they are there."""
        if name in self._seen or not name:
            return
        self.directory(name.rpartition("/")[0])
        self._seen.add(name)
        self._entry(name, 0o040755, b"")

    def file(self, name: str, data: bytes, *, mode: int = 0o644) -> None:
        """Add a regular file, and the directories above it."""
        self.directory(name.rpartition("/")[0])
        self._entry(name, 0o100000 | mode, data)

    def device(self, name: str, major: int, minor: int) -> None:
        """Add a character device, and the directories above it."""
        self.directory(name.rpartition("/")[0])
        self._entry(name, 0o020600, b"", device=(major, minor))

    def whole(self) -> bytes:
        """The archive's bytes; nothing can be added after that."""
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _entry(self, name: str, mode: int, data: bytes, *, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        numbers = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
        head = b"070701" + b"".join(b"%08x" % number for number in numbers) + raw
        self._parts += [head, b"\0" * (-len(head) % 4), data, b"\0" * (-len(data) % 4)]
