"""Programs that consist of system calls, as x86-64 machine code, and the ELF file around one."""

from __future__ import annotations

import struct

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R9, R10, R11, R12, R13, R14, R15 = range(8, 16)
#: Where a system call takes its arguments from.
ARGUMENTS = (RDI, RSI, RDX, R10, R8, R9)
NUMBERS = {
    "rax": RAX,
    "rcx": RCX,
    "rdx": RDX,
    "rbx": RBX,
    "rbp": RBP,
    "rsi": RSI,
    "rdi": RDI,
    "rsp": RSP,
    **{f"r{number}": number for number in range(8, 16)},
}
PAGE = 4096
#: Where such a program is mapped: below what the kernel gives to others, above what it gives to nobody.
BASE = 0x40_0000
AT_SYSINFO_EHDR = 33
EXIT_GROUP = 231
#: The status of a program one of whose system calls has failed.
FAILED = 121


class In(int):
    """An argument that is in a register, plus `offset`."""

    offset: int

    def __new__(cls, register: int, offset: int = 0) -> In:
        self = super().__new__(cls, register)
        self.offset = offset
        return self


class Program:
    """Machine code that is added to, and the data that it names by their future addresses."""

    def __init__(self, base: int) -> None:
        self._code = bytearray()
        self._data = bytearray()
        self._base = base
        #: Places of the code that name data, and those that jump to the end on failure.
        self._named: list[tuple[int, int]] = []
        self._failing: list[int] = []
        self._steps = 0

    def add(self, code: bytes) -> None:
        """Code as it is."""
        self._code += code

    def set(self, register: int, value: int | bytes) -> None:
        """Load a register: a number, another register (`In`), or the address of data."""
        rex = 0x49 if register >= 8 else 0x48
        if isinstance(value, In):
            # lea register, [other + offset]; rsp and r12 as a base take another byte.
            modrm = 0x80 | (register & 7) << 3 | (value & 7)
            sib = b"\x24" if (value & 7) == RSP else b""
            rex = 0x48 | (4 if register >= 8 else 0) | (1 if value >= 8 else 0)
            self._code += bytes((rex, 0x8D, modrm)) + sib + struct.pack("<i", value.offset)
        elif isinstance(value, bytes):
            self._code += bytes((rex, 0xB8 | (register & 7)))
            self._named.append((len(self._code), self.data(value)))
            self._code += bytes(8)
        elif 0 <= value < 1 << 32:
            self._code += (
                (b"\x41" if register >= 8 else b"") + bytes((0xB8 | (register & 7),)) + struct.pack("<I", value)
            )
        else:
            self._code += bytes((rex, 0xB8 | (register & 7))) + struct.pack("<Q", value & (1 << 64) - 1)

    def data(self, content: bytes) -> int:
        """Keep read-only data; its offset."""
        self._data += bytes(-len(self._data) % 16)
        at = len(self._data)
        self._data += content
        return at

    def call(self, number: int, *arguments: int | bytes, check: bool = True) -> None:
        """A system call. With `check` the program ends if it fails."""
        # Registers first: the loading of others could overwrite them.
        order = sorted(zip(ARGUMENTS, arguments, strict=False), key=lambda pair: not isinstance(pair[1], In))
        for register, value in order:
            self.set(register, value)
        self.set(RAX, number)
        if check:
            self._steps += 1
            self.set(RBX, self._steps)
        self._code += b"\x0f\x05"
        if check:
            self._code += b"\x48\x3d" + struct.pack("<i", -4095)  # cmp rax, -4095
            self.fail_if(b"\x83")  # jae

    def fail_if(self, condition: bytes) -> None:
        """Jump to the end on a condition (the second byte of a near jump)."""
        self._code += b"\x0f" + condition
        self._failing.append(len(self._code))
        self._code += bytes(4)

    def find_vdso(self) -> None:
        """r12: where the kernel has put the vdso, from what it has left on the stack (getauxval(3))."""
        self.add(b"\x48\x89\xe6\x48\x83\xc6\x08")  # rsi = rsp + 8
        self.add(b"\x48\xad\x48\x85\xc0\x75\xf9" * 2)  # over the arguments, over the environment
        self.add(
            b"\x48\xad\x48\x89\xc2\x48\xad\x83\xfa" + bytes((AT_SYSINFO_EHDR,)) + b"\x75\xf4"
        )  # until it is that one
        self.add(b"\x49\x89\xc4")  # r12 = rax

    def where(self, test: bytes, otherwise: bytes, child: Program) -> None:
        """The code of `child`, jumped over where `test` leaves the condition `otherwise` (the second byte of a near jump)."""
        offset = len(self._data)
        self._data += bytes(-offset % 16)
        start = len(self._data)
        self._data += child._data
        self._code += test + b"\x0f" + otherwise + struct.pack("<i", len(child._code))
        at = len(self._code)
        self._named += [(at + place, start + data) for place, data in child._named]
        self._failing += [at + place for place in child._failing]
        self._code += child._code

    def go_on(self, registers: dict[str, int]) -> None:
        """Load all registers and jump to rip."""
        for name, number in NUMBERS.items():
            self.set(number, registers[name])
        # jmp [rip + 0], and the address.
        self._code += b"\xff\x25\0\0\0\0" + struct.pack("<Q", registers["rip"])

    def finish(self) -> bytes:
        """The code with its data, to be mapped at the base."""
        end = len(self._code)
        self._code += b"\xbf" + struct.pack("<I", FAILED) + b"\xb8" + struct.pack("<I", EXIT_GROUP) + b"\x0f\x05"
        for place in self._failing:
            struct.pack_into("<i", self._code, place, end - place - 4)
        data_at = len(self._code) + (-len(self._code) % 16)
        for place, data in self._named:
            struct.pack_into("<Q", self._code, place, self._base + data_at + data)
        return bytes(self._code.ljust(data_at, b"\xcc") + self._data)


def elf(code: bytes, base: int) -> bytes:
    """A static ELF program: one segment, to read and execute, that begins with this header. `code` was made for `base` + HEAD."""
    size = HEAD + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + HEAD, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, PAGE)
    # The stack is not to be executable (PT_GNU_STACK is left out on purpose: x86-64 kernels since 5.8 take that as "no").
    return (head + segment).ljust(HEAD, b"\0") + code


#: The size of an ELF header and one program header, and up to the next multiple of 16, so that data are where `data` has them.
HEAD = 64 + 56 + 8
