"""Decompresses LZ4's legacy frames, in which a kernel may be packed: the standard library has no LZ4.

Layout (lz4_Frame_format.md, "Legacy frame"): the magic 02 21 4c 18, then blocks: the size of the compressed block (4 bytes,
little-endian), the block, which gives 8 MiB, the last one less. A block (lz4_Block_format.md) is a sequence of tokens: the
number of literals (high four bits), the literals, the distance back (2 bytes, little-endian), the length of the match less 4
(low four bits). A number of 15 goes on with bytes that are added, as long as they are 255. The last sequence ends with its
literals.
"""

from __future__ import annotations

from ..errors import ImageError

MAGIC = b"\x02\x21\x4c\x18"
BLOCK = 8 << 20


def decompress(data: bytes) -> bytes:
    """What a legacy frame holds; up to 4 bytes after it are ignored (a kernel has its size there). Raises `ImageError`."""
    if data[:4] != MAGIC:
        raise ImageError("no LZ4 frame")
    out = []
    at = 4
    while at + 4 < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if size > len(data) - at:
            raise ImageError("an LZ4 block is cut short")
        try:
            out.append(_block(data[at : at + size]))
        except IndexError:
            raise ImageError("an LZ4 block is damaged") from None
        at += size
    return b"".join(out)


def _block(data: bytes) -> bytes:
    out = bytearray()
    at, end = 0, len(data)
    while True:
        token = data[at]
        at += 1
        count = token >> 4
        if count == 15:
            while (more := data[at]) == 255:
                count += 255
                at += 1
            count += more
            at += 1
        if count:
            if count > end - at:
                raise IndexError
            out += data[at : at + count]
            at += count
        if at == end:
            return bytes(out)
        distance = data[at] | data[at + 1] << 8
        at += 2
        count = (token & 15) + 4
        if count == 19:
            while (more := data[at]) == 255:
                count += 255
                at += 1
            count += more
            at += 1
        start = len(out) - distance
        if start < 0 or not distance or len(out) + count > BLOCK:
            raise IndexError
        if distance >= count:
            out += out[start : start + count]
        else:
            # The match overlaps what it makes: the distance is a period.
            period = out[start:]
            out += (period * (count // distance + 1))[:count]
