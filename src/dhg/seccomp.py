"""Filters of system calls (seccomp(2), x86-64)."""

from __future__ import annotations

from _struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# linux/seccomp.h, linux/audit.h.
RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
AUDIT_ARCH_X86_64 = 0xC000003E
# linux/bpf_common.h: load a word at an offset; jump if equal, if a bit is set; return.
LOAD, JUMP_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x45, 0x06
EPERM, ENOSYS = 1, 38
NR_CLONE, NR_CLONE3, CLONE_THREAD = 56, 435, 0x10000
#: Where struct seccomp_data has the number of a call, the architecture, the lower half of the first argument.
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16


def program(allowed: Sequence[int], *, threads: bool = False) -> bytes:
    """The filter that refuses (EPERM) all but the calls `allowed`, and but new threads if asked for: BPF instructions (struct
    sock_filter: code, jump if true, jump if false, operand).

    Refused and not killed, so that a call which the program can do without is not its end.
    """
    one = Struct("=HBBI").pack
    parts = [
        one(LOAD, 0, 0, ARCHITECTURE),
        one(JUMP_EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        one(RETURN, 0, 0, RET_KILL_PROCESS),
    ]
    parts.append(one(LOAD, 0, 0, NUMBER))
    if threads:
        # glibc asks for clone where there is no clone3, whose flags no filter can see.
        parts += [one(JUMP_EQUAL, 0, 1, NR_CLONE3), one(RETURN, 0, 0, RET_ERRNO | ENOSYS)]
        parts += [one(JUMP_EQUAL, 0, 4, NR_CLONE), one(LOAD, 0, 0, ARGUMENT), one(JUMP_SET, 0, 1, CLONE_THREAD)]
        parts += [one(RETURN, 0, 0, RET_ALLOW), one(RETURN, 0, 0, RET_ERRNO | EPERM)]
    # From the number that is equal to the last instruction; otherwise on to the next one.
    parts += [one(JUMP_EQUAL, len(allowed) - at, 0, number) for at, number in enumerate(allowed)]
    parts += [one(RETURN, 0, 0, RET_ERRNO | EPERM), one(RETURN, 0, 0, RET_ALLOW)]
    return b"".join(parts)
