"""The kernel inside the bzImage, and the decompressor that the standard library lacks."""

from __future__ import annotations

import lzma
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhg.errors import ImageError
from dhg.image import kernel, lz4

ELF = b"\x7fELF" + bytes(range(256)) * 40


def bzimage(payload: bytes, *, protocol: int = 0x20F, sectors: int = 3) -> bytes:
    """A bzImage with a payload somewhere in its protected-mode code."""
    code = (sectors or 4) * 512 + 512
    head = bytearray(code + 100)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    struct.pack_into("<II", head, 0x248, 100, len(payload))
    return bytes(head) + payload + b"what follows"


def lz4_literals(data: bytes) -> bytes:
    """A legacy frame that only has literals."""
    count = len(data)
    block = bytes([min(count, 15) << 4])
    if count >= 15:
        block += b"\xff" * ((count - 15) // 255) + bytes([(count - 15) % 255])
    block += data
    return lz4.MAGIC + struct.pack("<I", len(block)) + block


@pytest.mark.parametrize("sectors", [0, 1, 30])
def test_each_compression(sectors: int) -> None:
    size = struct.pack("<I", len(ELF))
    gzip = zlib.compressobj(wbits=31)
    for payload in (
        lzma.compress(ELF, lzma.FORMAT_XZ) + size,
        gzip.compress(ELF) + gzip.flush(),
        lz4_literals(ELF) + size,
    ):
        assert kernel.vmlinux(bzimage(payload, sectors=sectors)) == ELF


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"MZ", "no bzImage"),
        (bzimage(b"x", protocol=0x207), "no bzImage"),
        (bzimage(b"\x28\xb5\x2f\xfd rest"), "not known"),
        (bzimage(lzma.compress(b"no elf", lzma.FORMAT_XZ)), "no ELF"),
        (bzimage(lzma.compress(ELF, lzma.FORMAT_XZ)[:50] + bytes(9)), "damaged"),
        (bzimage(lz4_literals(ELF)[:-20]), "cut short"),
    ],
)
def test_what_is_no_kernel(image: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        kernel.vmlinux(image)


def test_lz4_matches() -> None:
    # From the description of the format: 3 literals, a match of 9 at distance 3 (it overlaps itself); then literals alone.
    block = b"\x35abc\x03\x00" + b"\x20yz"
    frame = lz4.MAGIC + struct.pack("<I", len(block)) + block
    assert lz4.decompress(frame) == b"abcabcabcabcyz"
    # A long match: 15 + 255 + 10 + 4, at a distance that is longer than it.
    text = bytes(range(250)) * 2
    block = lz4_literals(text)[8:]
    long = bytes([block[0] | 15]) + block[1:] + struct.pack("<H", 400) + b"\xff\x0a" + b"\x10!"
    frame = lz4.MAGIC + struct.pack("<I", len(long)) + long
    assert lz4.decompress(frame) == text + text[100:384] + b"!"
    # Two blocks.
    assert lz4.decompress(frame + frame[4:]) == (text + text[100:384] + b"!") * 2


@pytest.mark.parametrize(
    "block", [b"\x04\x00\x00", b"\x14a\x02\x00\x00", b"\x1fa\x01\x00", b"\xf0", b"\x40abc", b"\x14a\x01"]
)
def test_lz4_blocks_that_make_no_sense(block: bytes) -> None:
    with pytest.raises(ImageError):
        lz4.decompress(lz4.MAGIC + struct.pack("<I", len(block)) + block)


@settings(deadline=None)
@given(st.binary())
def test_lz4_fails_in_an_orderly_way(data: bytes) -> None:
    try:
        lz4.decompress(lz4.MAGIC + struct.pack("<I", len(data)) + data)
    except ImageError:
        pass
