"""The guest's end of the host's files: carries FUSE messages between /dev/fuse and the `files` port.

Guest code: standard library only, and a process of its own: one inside the interpreter that uses the mount would wait for itself.
`init` mounts the file system and starts this with the descriptor of /dev/fuse and the path of the port.

Until the freeze there is no host to ask, so it answers what the mount and the warm-up need by itself: the root, and in it the
node of the workspace, which is empty. The runner ends that with a look-up of POKE; from then on every request goes to the host as
it is, and every reply comes back as it is. One process a direction, each blocked in a read when the VM is frozen: after
a restore they cost nothing until a script touches a file.

A message, either way, begins with its length (four bytes, little-endian); the layouts are in `dhg/share/server.py` on the host.
"""

import os
import sys
from struct import Struct

POKE = b".frozen"
SHARES = "/run/dhg/shares"
#: What the kernel may ask for in one READ or send in one WRITE; the replies to reads are the bulk of what passes here.
MAX_PAGES = 256
MAX_WRITE = MAX_PAGES * 4096
BUFFER = MAX_WRITE + 8192
READ_AHEAD_KIB = 1024

ROOT, WORKSPACE = 1, 2  # node ids; the host's server knows share N as node N + 2
LOOKUP, FORGET, GETATTR, INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, BATCH_FORGET, READDIRPLUS = (
    1, 2, 3, 26, 27, 28, 29, 34, 36, 42, 44
)  # fmt: skip
EIO, ENOENT = 5, 2
FOREVER = 1 << 40

IN = Struct("<IIQQ16x")
OUT = Struct("<IiQ")
INIT_IN = Struct("<4I")
INIT_OUT = Struct("<4I2H2I2HI28x")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
ATTR = Struct("<6Q10I")
ATTR_OUT = Struct("<QI4x")
ENTRY_OUT = Struct("<4QII")

# ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, AUTO_INVAL_DATA, DO_READDIRPLUS, READDIRPLUS_AUTO, PARALLEL_DIROPS, MAX_PAGES
FLAGS = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 18 | 1 << 22


def attributes(node: int) -> bytes:
    """Those of a directory."""
    return ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, 0o040755, 2, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
    """What is said before the freeze: an error number, or 0 and the reply's body."""
    if opcode == INIT:
        major, minor, readahead, flags = INIT_IN.unpack_from(body)
        if major != 7 or minor < 31:
            return EIO, b""
        return 0, INIT_OUT.pack(7, 31, readahead, flags & FLAGS, 16, 12, MAX_WRITE, 1, MAX_PAGES, 0, 0)
    if opcode == LOOKUP and node == ROOT and body == b"0\0":
        return 0, ENTRY_OUT.pack(WORKSPACE, 0, FOREVER, 0, 0, 0) + attributes(WORKSPACE)
    if opcode == LOOKUP:
        return ENOENT, b""
    if opcode == GETATTR:
        return 0, ATTR_OUT.pack(0, 0) + attributes(node)
    if opcode == OPENDIR:
        return 0, bytes(16)
    if opcode in (READDIR, READDIRPLUS, RELEASEDIR, ACCESS):
        return 0, b""
    return EIO, b""


def alone(fuse: int) -> int:
    """Answer until the runner pokes; the number of that request."""
    while True:
        data = os.read(fuse, BUFFER)
        _, opcode, unique, node = IN.unpack_from(data)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            continue
        body = data[IN.size :]
        if opcode == LOOKUP and node == ROOT and body == POKE + b"\0":
            return int(unique)
        error, reply = answer(opcode, node, body)
        os.write(fuse, OUT.pack(OUT.size + len(reply), -error, unique) + reply)


def requests(fuse: int, port: int) -> None:
    """Carry requests to the host."""
    view = memoryview(bytearray(BUFFER))
    buffers = (view,)
    while True:
        try:
            size = os.readv(fuse, buffers)
        except FileNotFoundError:
            continue  # whoever asked has been killed meanwhile
        sent = os.write(port, view[:size])
        while sent < size:
            sent += os.write(port, view[sent:size])


def replies(fuse: int, port: int) -> None:
    """Carry replies from the host; returns when there is none any more."""
    view = memoryview(bytearray(BUFFER))
    while True:
        have = 0
        need = 4
        while have < need:
            # A virtio port gives a page at most at a time. Never past this message: the next one is read on its own.
            got = os.readv(port, (view[have : need if have >= 4 else 16],))
            if got == 0:
                return
            if have < 4 <= have + got:
                need = int.from_bytes(view[:4], "little")
                if not 16 <= need <= BUFFER:
                    return
            have += got
        try:
            os.write(fuse, view[:need])
        except OSError:
            pass  # ENOENT: whoever asked is gone


def main() -> None:
    """Serve the mount until the VM or the channel ends."""
    fuse, port = int(sys.argv[1]), os.open(sys.argv[2], os.O_RDWR)
    with open("/proc/self/mountinfo") as file:
        device = next(line.split()[2] for line in file if line.split()[4] == SHARES)
    with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as file:
        file.write(str(READ_AHEAD_KIB))
    poke = alone(fuse)
    if os.fork() == 0:
        try:
            replies(fuse, port)
        finally:
            # With both of us gone the kernel fails every request instead of keeping the script waiting.
            os.kill(os.getppid(), 9)
            os._exit(0)
    os.write(fuse, OUT.pack(OUT.size, -ENOENT, poke))
    requests(fuse, port)


if __name__ == "__main__":
    main()
