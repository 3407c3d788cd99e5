"""Working sets: which pages of a snapshot a typical script touches, noted by a recording run.

The file, all numbers unsigned little-endian:

    offset  bytes  field
    0       8      "dhg-ws1\\n"
    8       8      size of the memory file, bytes
    16      8      its modification time, ns since the epoch: a file that was made anew has another working set
    24      4      the page size, bytes
    28      4      count of ranges
    32      8 each first page and count of pages, 4 bytes each, ascending, not touching each other

The set of pages that is touched repeats from run to run, their order does not: so it is kept sorted, and copied in that order.
"""

from __future__ import annotations

import os
from struct import Struct

from .uffd import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = b"dhg-ws1\n"
_HEAD = Struct("<8sQQII")
_RANGE = Struct("<II")
#: Ranges that are at most this many pages apart are copied as one: a call costs more than three pages do.
MERGE_GAP = 3

#: First page and count of pages.
Range = tuple[int, int]


def merge(pages: Iterable[int], *, gap: int = MERGE_GAP) -> list[Range]:
    """Ranges that cover `pages` (in any order), those up to `gap` pages apart joined."""
    ranges: list[Range] = []
    start = end = -1
    for page in sorted(pages):
        if start >= 0 and page <= end + gap:
            end = max(end, page + 1)
        else:
            if start >= 0:
                ranges.append((start, end - start))
            start, end = page, page + 1
    if start >= 0:
        ranges.append((start, end - start))
    return ranges


def save(path: str, ranges: list[Range], memory: os.stat_result) -> None:
    """Write the file (whole or not at all) for the memory file whose stat is `memory`."""
    data = _HEAD.pack(MAGIC, memory.st_size, memory.st_mtime_ns, PAGE, len(ranges))
    data += b"".join(_RANGE.pack(*item) for item in ranges)
    fd = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.rename(f"{path}.tmp", path)


def load(path: str, memory: os.stat_result) -> list[Range]:
    """The ranges; empty if the file is missing, damaged, or of another memory file: it only makes things faster."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return []
    if len(data) < _HEAD.size:
        return []
    magic, size, mtime_ns, page_size, count = _HEAD.unpack_from(data)
    if (magic, size, mtime_ns, page_size) != (MAGIC, memory.st_size, memory.st_mtime_ns, PAGE):
        return []
    if len(data) != _HEAD.size + count * _RANGE.size:
        return []
    ranges = list(_RANGE.iter_unpack(data[_HEAD.size :]))
    end = 0
    for first, pages in ranges:
        if first < end or not pages:
            return []
        end = first + pages
    return ranges if end <= -(-size // PAGE) else []
