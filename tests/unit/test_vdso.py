"""The stand-in for the kernel's vdso, made of this host's (guest/vdso.py)."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator

import pytest

from dhg.guest import vdso


class Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


@pytest.fixture
def image() -> bytes:
    place, end = vdso.find()
    assert place, "this kernel has no vdso"
    return ctypes.string_at(place, end - place)


@pytest.fixture
def place(image: bytes) -> Iterator[int]:
    """Where the stand-in is, in memory that can be executed."""
    area = mmap.mmap(-1, len(image), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    held = ctypes.c_char.from_buffer(area)
    at = ctypes.addressof(held)
    area[:] = vdso.stand_in(image, at)
    yield at
    del held


def monotonic_ns(function: int) -> int:
    found = Timespec()
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(Timespec))(function)
    assert call(time.CLOCK_MONOTONIC, ctypes.byref(found)) == 0
    return int(found.s) * 1_000_000_000 + int(found.ns)


def right(function: int) -> bool:
    before = time.monotonic_ns()
    return before <= monotonic_ns(function) <= time.monotonic_ns()


def test_its_functions_tell_the_time(image: bytes, place: int) -> None:
    found = vdso.symbols(image)
    assert set(vdso.FUNCTIONS) <= set(found)
    assert right(place + found["__vdso_clock_gettime"])
    wanted = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(place + found["__vdso_time"])
    assert abs(wanted(None) - time.time()) < 2


def test_others_are_not_there(image: bytes, place: int) -> None:
    known = {vdso.symbols(image)[name] for name in vdso.FUNCTIONS}
    for at in set(vdso.symbols(image).values()) - known:
        assert ctypes.CFUNCTYPE(ctypes.c_long)(place + at)() == -38


def test_the_loader_finds_its_tables(image: bytes, place: int) -> None:
    stand_in = ctypes.string_at(place, len(image))
    assert vdso.symbols(stand_in) == vdso.symbols(image)
    first = min(vdso.symbols(image).values())
    assert stand_in[:first] == image[:first]
    assert stand_in != image


def test_it_goes_over_to_the_kernels(image: bytes, place: int) -> None:
    known = vdso.Known()
    real, end = vdso.find()
    known.place = place
    pointer = ctypes.c_uint64.from_address(place + known.functions["__vdso_clock_gettime"] + 8)
    assert not real <= pointer.value < end
    assert known.connect()
    assert pointer.value == real + known.functions["__vdso_clock_gettime"]
    assert right(place + known.functions["__vdso_clock_gettime"])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda image: b"MZ" + image[2:], "no ELF"),
        (lambda image: image[:32] + bytes(8) + image[40:56] + bytes(2) + image[58:], "no symbols"),
        (lambda image: image[:200], "no symbols"),
    ],
)
def test_something_else(change: object, what: str, image: bytes) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match=what):
        vdso.stand_in(change(image), 0x1000)
