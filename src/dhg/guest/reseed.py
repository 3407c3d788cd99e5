"""Random numbers after a restore: every generator whose state is in the snapshot gets a new one from the kernel's.

Guest code: standard library and Deephaven only. The kernel's own generator is seeded by the runner first.

The state of a generator is a cell, some bytes at an address that is found before the freeze; a clone overwrites them. Calling
`seed` instead, in CPython, NumPy and above all in the JVM, would cost a clone under emulation a third of its time: all that code
has to be translated first. Each cell is tried before the freeze: what is written there must be what the generator then has, and
`prepare` compares what two clones draw. A generator that is not where it is expected makes no snapshot.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from typing import Any

#: CPython 3.11 to 3.14, Modules/_randommodule.c: PyObject_HEAD, int index, uint32_t state[624].
_RANDOM_INDEX, _RANDOM_STATE, _WORDS = 16, 20, 624


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


class Cells:
    """The states that a clone overwrites. `names` are those of the generators that were found here."""

    def __init__(self) -> None:
        self._views: list[tuple[memoryview, int, int]] = []
        self._size = 0
        self.names: list[str] = []

    def add(self, name: str, view: memoryview) -> None:
        """Add a cell."""
        self._views.append((view, self._size, self._size + len(view)))
        self._size += len(view)
        self.names.append(name)

    def overwrite(self) -> None:
        """Give every generator a new state. On the hot path."""
        data = os.urandom(self._size)
        for view, start, end in self._views:
            view[:] = data[start:end]


def python(cells: Cells) -> None:
    """CPython's `random`, and NumPy's global generator where there is NumPy. Raises `RuntimeError`."""
    import random

    generator: Any = random._inst
    generator.seed()
    generator.gauss_next = None
    state = _view(id(generator) + _RANDOM_STATE, _WORDS * 4)
    state[:] = wanted = os.urandom(_WORDS * 4)
    found = generator.getstate()[1]
    if struct.pack(f"<{_WORDS}I", *found[:-1]) != wanted or found[-1] != _WORDS:
        raise RuntimeError("CPython's random has its state elsewhere than expected")
    cells.add("random", state)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed()
    legacy = numpy.random.mtrand._rand
    # numpy/random/src/mt19937/mt19937.h: uint32_t key[624], int pos.
    state = _view(legacy._bit_generator.ctypes.state_address, _WORDS * 4)
    state[:] = wanted = os.urandom(_WORDS * 4)
    if legacy.get_state(legacy=False)["state"]["key"].tobytes() != wanted:
        raise RuntimeError("NumPy's generator has its state elsewhere than expected")
    cells.add("numpy.random", state)


def forget() -> None:
    """Drop what cannot be overwritten, right before the freeze: the generator of tempfile's names; its next use makes another."""
    vars(tempfile)["_name_sequence"] = None


class Jvm:
    """The JVM's generators, found by Cells.java, which is in the image's own jar (jvm.py). Raises `RuntimeError`."""

    def __init__(self) -> None:
        import jpy

        made = jpy.get_type("Cells")()
        self._ask = jpy.cast(made, "java.util.function.LongUnaryOperator").applyAsLong
        self._found: list[memoryview] = []

    def find(self, cells: Cells) -> None:
        """Find the cells. Right after a full collection: only another one moves objects that have survived it."""
        count = self._ask(-1)
        maps = _writable()
        shift: int | None = None
        for number in range(count):
            reference, offset = self._ask(4 * number), self._ask(4 * number + 1)
            mark = self._ask(4 * number + 2) & (2**64 - 1)
            for candidate in (0, 3) if shift is None else (shift,):
                # References may be stored in 32 bits, whole or in units of 8 bytes.
                address = (reference << candidate) + offset
                if any(start <= address < end for start, end in maps):
                    view = _view(address, 8)
                    if int.from_bytes(view, "little") == mark:
                        shift = candidate
                        self._found.append(view)
                        cells.add(f"java {number}", view)
                        break
            else:
                raise RuntimeError(f"cell {number} of the JVM's random numbers is not where its reference says")

    def check(self) -> None:
        """That the cells still are where they were found. Raises `RuntimeError`."""
        for number, view in enumerate(self._found):
            view[:] = wanted = os.urandom(8)
            if self._ask(4 * number + 3) & (2**64 - 1) != int.from_bytes(wanted, "little"):
                raise RuntimeError(f"cell {number} of the JVM's random numbers has moved")
        self._ask(-1)


def _writable() -> list[tuple[int, int]]:
    """The address ranges of this process that can be written (proc(5): maps)."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            span, mode = line.split()[:2]
            if mode[1] == "w":
                start, _, end = span.partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found
