"""The kernel's vdso: system calls that a process makes without the kernel, such as what time it is (vdso(7), x86-64).

The C library keeps the addresses of its functions, and a process that goes on under another kernel finds others there. So something
of ours takes the place of the old one, whose functions jump to wherever a pointer says: at first to the system call itself, and
then, once the process looks around (`connect`), to the other kernel's.

Guest code, and the host's (engine/serverprocess.py): standard library only.
"""

from __future__ import annotations

import struct

#: The functions that glibc uses, and the numbers of their system calls.
FUNCTIONS = {
    "__vdso_clock_gettime": 228,
    "__vdso_gettimeofday": 96,
    "__vdso_time": 201,
    "__vdso_getcpu": 309,
    "__vdso_clock_getres": 229,
}
#: Of a replaced function: `jmp [rip + 2]`, two bytes of nothing, and the pointer, which is replaced at once as it is aligned.
_JUMP, _POINTER_AT, _SLOT = b"\xff\x25\x02\0\0\0\xcc\xcc", 8, 16
#: mov rax, -ENOSYS; ret.
_NONE = b"\x48\xc7\xc0\xda\xff\xff\xff\xc3"
_PT_LOAD, _PT_DYNAMIC, _DT_NULL, _DT_STRTAB, _DT_SYMTAB = 1, 2, 0, 5, 6
_SYMBOL = struct.Struct("<IBBHQQ")
_FUNCTION = 2


def find() -> tuple[int, int]:
    """Where this process has the kernel's vdso: first address, and the one after the last. Zeros if it has none."""
    with open("/proc/self/maps") as file:
        for line in file:
            if line.endswith("[vdso]\n"):
                begin, end = line.split(maxsplit=1)[0].split("-")
                return int(begin, 16), int(end, 16)
    return 0, 0


def symbols(image: bytes) -> dict[str, int]:
    """The functions in a vdso, by name: where each begins. Raises `ValueError` for something that is no vdso."""
    if image[:5] != b"\x7fELF\2":
        raise ValueError("the vdso is no ELF file")
    try:
        at, size, count = *struct.unpack_from("<Q", image, 32), *struct.unpack_from("<HH", image, 54)
        segments = [struct.unpack_from("<IIQQ", image, at + number * size) for number in range(count)]
        base = next(address - offset for kind, _, offset, address in segments if kind == _PT_LOAD)
        at = next(offset for kind, _, offset, _ in segments if kind == _PT_DYNAMIC)
        found = dict[int, int]()
        while (entry := struct.unpack_from("<QQ", image, at))[0] != _DT_NULL:
            found[entry[0]] = entry[1] - base
            at += 16
        # The names come right after the symbols (arch/x86/entry/vdso/vdso-layout.lds.S).
        first, names = found[_DT_SYMTAB], found[_DT_STRTAB]
        table = [_SYMBOL.unpack_from(image, at) for at in range(first, names - _SYMBOL.size + 1, _SYMBOL.size)]
        return {
            image[names + name : image.index(b"\0", names + name)].decode(): value - base
            for name, info, _, section, value, _ in table
            if info & 15 == _FUNCTION and section
        }
    except (StopIteration, KeyError, struct.error) as error:
        raise ValueError(f"the vdso has no symbols where they are looked for: {error!r}") from error


def stand_in(image: bytes, place: int) -> bytes:
    """What takes the place of a vdso at the address `place`: itself, as the loader looks at its tables, with other functions.
    Raises `ValueError`."""
    found = symbols(image)
    result = bytearray(image)
    places = sorted({*found.values(), len(image)})
    for name, at in found.items():
        # Several names may be one function.
        number = FUNCTIONS.get(name) or next(
            (FUNCTIONS[one] for one in found if found[one] == at and one in FUNCTIONS), None
        )
        if number is None:
            # Nobody calls it: glibc's functions are those above.
            result[at : at + len(_NONE)] = _NONE
            continue
        room = next(other for other in places if other > at) - at
        if at % _POINTER_AT or room < _SLOT + len(_NONE):
            raise ValueError(f"the vdso's function {name} leaves no room")
        call = b"\xb8" + number.to_bytes(4, "little") + b"\x0f\x05\xc3"  # mov eax, number; syscall; ret
        result[at : at + _SLOT + len(call)] = _JUMP + (place + at + _SLOT).to_bytes(8, "little") + call
    return bytes(result)


class Known:
    """The vdso of now, for `connect` to replace when the process has gone on under another kernel."""

    def __init__(self) -> None:
        self.place, end = find()
        self.functions = symbols(_read(self.place, end)) if self.place else {}

    def connect(self) -> bool:
        """Have the stand-ins jump to the functions of this kernel's vdso; whether there is one. Without it each is a system call."""
        place, end = find()
        if not place or not self.place:
            return False
        new = symbols(_read(place, end))
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            for name in FUNCTIONS:
                if name in self.functions and name in new:
                    memory.seek(self.place + self.functions[name] + _POINTER_AT)
                    memory.write((place + new[name]).to_bytes(8, "little"))
        return True


def _read(begin: int, end: int) -> bytes:
    import ctypes

    return ctypes.string_at(begin, end - begin)
