"""HotSpot's flags in the JVM of this process, written while it runs.

HotSpot describes its own structures to debuggers by exported tables (src/hotspot/share/runtime/vmStructs.hpp, the same from OpenJDK 8
to 25): where the array of its flags is, and each flag's name and address. The JVM's public interface writes "manageable" flags only,
and when code is compiled is none of those.

Guest code: standard library only.
"""

from __future__ import annotations

import ctypes
import functools

_LIMITS = ("InvocationThreshold", "MinInvocationThreshold", "CompileThreshold", "BackEdgeThreshold")


def _when(tier: int, *limits: int) -> dict[str, int]:
    """When a method is compiled, once it has run so often (CompilationPolicy, as of OpenJDK 17): calls; calls together with enough
    turns of loops; those; and turns of loops. Tier 3 is what the interpreter runs, tier 4 what C1's code runs that counts.
    HotSpot's own are 200, 100, 2000, 60,000 and 5000, 600, 15,000, 40,000."""
    return {f"Tier{tier}{name}": limit for name, limit in zip(_LIMITS, limits, strict=True)}


#: Compile what runs often, with C1. Of what a start runs hardly anything runs again, and the compiler had a quarter of its time.
COMPILE_SELDOM = {**_when(3, 2000, 1000, 20_000, 60_000), **_when(4, *[1 << 30] * 4), "TieredStopAtLevel": 1}
#: Compile soon, with C1, what does not count any more; and what C1 has compiled so that it counts, once more.
COMPILE_SOON = {
    **_when(3, 50, 25, 500, 2000),
    **_when(4, 50, 25, 500, 2000),
    "TieredStopAtLevel": 1,
    "Tier0InvokeNotifyFreqLog": 7,
}
#: Compile, with C1, what runs a few times. HotSpot looks at the numbers every so many calls, as a power of two; how often is written
#: into a method at its first call. HotSpot's own is 7.
COMPILE_NOW = {
    **_when(3, 8, 4, 50, 500),
    **_when(4, 8, 4, 50, 500),
    "TieredStopAtLevel": 1,
    "Tier0InvokeNotifyFreqLog": 2,
}
#: Compile with C2 what runs very often, and nothing else.
COMPILE_LOOPS = {
    **_when(3, 10_000, 5000, 50_000, 60_000),
    **_when(4, 5000, 600, 15_000, 40_000),
    "TieredStopAtLevel": 4,
}
#: Compile what runs very often, with C1. Whenever HotSpot looks at the numbers it compiles what is trivial (it returns a field)
#: whatever they are, so it looks seldom.
COMPILE_LATE = {
    **_when(3, 10_000, 5000, 40_000, 80_000),
    **_when(4, *[1 << 30] * 4),
    "TieredStopAtLevel": 1,
    "Tier0InvokeNotifyFreqLog": 10,
}


def _number(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _text(address: int) -> str:
    return (ctypes.string_at(address) if address else b"").decode("ascii", "replace")


class _Table:
    """One of the exported tables: entries of equal size, the last with no name."""

    def __init__(self, library: ctypes.CDLL, table: str, entry: str) -> None:
        self._library, self._entry = library, entry
        self.address = self._value(table)
        self.stride = self._value(f"{entry}ArrayStride")

    def _value(self, name: str) -> int:
        return ctypes.c_uint64.in_dll(self._library, name).value

    def field(self, at: int, name: str) -> int:
        return _number(at + self._value(f"{self._entry}{name}Offset"))

    def entries(self, type_name: str) -> list[int]:
        """The addresses of the entries about a type of HotSpot's."""
        found = []
        at = self.address
        while name := self.field(at, "TypeName"):
            if _text(name) == type_name:
                found.append(at)
            at += self.stride
        return found


@functools.cache
def _flags() -> dict[str, int]:
    """The address of each flag's value. Raises `LookupError` if this is no HotSpot, or one that describes itself otherwise."""
    with open("/proc/self/maps") as file:
        paths = {line.split()[-1] for line in file if line.rstrip().endswith("/libjvm.so")}
    if len(paths) != 1:
        raise LookupError(f"libjvm.so is loaded {len(paths)} times")
    library = ctypes.CDLL(paths.pop())
    try:
        structs = _Table(library, "gHotSpotVMStructs", "gHotSpotVMStructEntry")
        types = _Table(library, "gHotSpotVMTypes", "gHotSpotVMTypeEntry")
        fields = {_text(structs.field(at, "FieldName")): at for at in structs.entries("JVMFlag")}
        size = types.field(types.entries("JVMFlag")[0], "Size")
        array, count = (_number(structs.field(fields[name], "Address")) for name in ("flags", "numFlags"))
        name, value = (structs.field(fields[name], "Offset") for name in ("_name", "_addr"))
    except (ValueError, KeyError, IndexError) as error:
        raise LookupError(f"HotSpot does not say where its flags are: {error!r}") from None
    places = range(array, array + count * size, size)
    return {_text(_number(at + name)): _number(at + value) for at in places}


def set_flags(values: dict[str, int]) -> None:
    """Set flags that hold a number (intx). Raises `LookupError`, with nothing set, if there is one that this JVM does not have."""
    flags = _flags()
    missing = [name for name in values if not flags.get(name)]
    if missing:
        raise LookupError(f"this JVM has no flag {', '.join(missing)}")
    for name, value in values.items():
        ctypes.c_int64.from_address(flags[name]).value = value
