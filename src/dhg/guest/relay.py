"""The guest's end of the host's files: carries FUSE messages between /dev/fuse and the `files` port.

Guest code: standard library only, and a process of its own: one inside the interpreter that uses the mount would wait for itself.
`init` mounts the file system and starts this with the descriptor of /dev/fuse and the path of the port.

Until the freeze there is no host to ask, so it answers what the mount and the warm-up need by itself: the root, and in it the
node of the workspace, which is empty. The runner ends that with a look-up of POKE; from then on every request goes to the host as
it is, and every reply comes back as it is. When the VM is frozen the process is blocked in a read: after a restore it costs nothing
until a script touches a file.

A message, either way, begins with its length (four bytes, little-endian); the layouts are in `dhg/share/server.py` on the host.
"""

import os
import select
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
LOOKUP, FORGET, GETATTR, RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, BATCH_FORGET, READDIRPLUS = (
    1, 2, 3, 18, 26, 27, 28, 29, 34, 36, 42, 44
)  # fmt: skip
#: Requests to which the host does not reply.
ONE_WAY = (FORGET, BATCH_FORGET, INTERRUPT, RELEASE, RELEASEDIR)
#: How many bytes of them wait at most.
HELD = 32768
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


def carry(fuse: int, port: int) -> None:
    """Carry requests to the host and what it replies back, one at a time; returns when the host is gone.

    One at a time, because every change from one process to another costs more under emulation than what is gained by having several
    on the way. What needs no reply waits for the next that does, and goes with it: the kernel does not wait for it either.
    """
    request = memoryview(bytearray(BUFFER + HELD))
    reply = memoryview(bytearray(BUFFER + 4096))
    held = have = 0
    hung_up = select.poll()
    hung_up.register(port, 0)
    while True:
        try:
            size = os.readv(fuse, (request[held:],))
        except FileNotFoundError:
            continue  # whoever asked has been killed meanwhile
        opcode = request[held + 4]
        if opcode in ONE_WAY:
            if opcode in (RELEASE, RELEASEDIR):
                os.write(fuse, OUT.pack(OUT.size, 0, IN.unpack_from(request, held)[2]))
            held += size
            if held < HELD:
                continue
        else:
            held += size
        if hung_up.poll(0):
            return  # a write would wait for the host to come back
        unique = request[held - size + 8 : held - size + 16]
        sent = os.write(port, request[:held])
        while sent < held:
            sent += os.write(port, request[sent:held])
        held = 0
        answered = opcode in ONE_WAY
        while not answered:
            # A virtio port gives a page at most at a time.
            got = os.readv(port, (reply[have:],))
            if got == 0:
                return
            have += got
            start = 0
            while have - start >= OUT.size:
                length = int.from_bytes(reply[start : start + 4], "little")
                if not OUT.size <= length <= BUFFER:
                    return
                if have - start < length:
                    break
                # The reply, or before it a message of the host's own, which has the number 0.
                answered = answered or reply[start + 8 : start + 16] == unique
                try:
                    os.write(fuse, reply[start : start + length])
                except OSError:
                    pass  # ENOENT: whoever asked is gone
                start += length
            if start:
                reply[: have - start] = reply[start:have]
                have -= start


def main() -> None:
    """Serve the mount until the VM or the channel ends."""
    fuse, port = int(sys.argv[1]), os.open(sys.argv[2], os.O_RDWR)
    with open("/proc/self/mountinfo") as file:
        device = next(line.split()[2] for line in file if line.split()[4] == SHARES)
    with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as file:
        file.write(str(READ_AHEAD_KIB))
    poke = alone(fuse)
    # Woken up, it does not take the CPU from a script that has more to do before it has to wait.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.write(fuse, OUT.pack(OUT.size, -ENOENT, poke))
    # When this returns and the process ends, the kernel fails every request instead of keeping the script waiting.
    carry(fuse, port)


if __name__ == "__main__":
    main()
