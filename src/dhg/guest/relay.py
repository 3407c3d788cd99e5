"""The guest's end of the host's files: carries FUSE messages between /dev/fuse and the `files` channel.

Guest code: standard library only, and a process of its own: one inside the interpreter that uses the mount would wait for itself.
`init` mounts the file system and starts this with the descriptor of /dev/fuse and the path of the virtio port; where the channels
are vsock's, it starts `vsock.serve_files`.

Until the freeze there is no host to ask, so it answers what the mount and the warm-up need by itself: the root, and in it the
node of the workspace, which is empty. The runner ends that with a look-up of POKE; from then on every request goes to the host as
it is, and every reply comes back as it is. When the VM is frozen the process is blocked in a read: after a restore it costs nothing
until a script touches a file.

A message, either way, begins with its length (four bytes, little-endian); the layouts are in `dhg/share/server.py` on the host.
"""

import os
import select
import sys
import time
from struct import Struct

POKE = b".frozen"
SHARES = "/run/dhg/shares"
#: What the kernel may ask for in one READ or send in one WRITE; the replies to reads are the bulk of what passes here.
MAX_PAGES = 256
MAX_WRITE = MAX_PAGES * 4096
BUFFER = MAX_WRITE + 8192
READ_AHEAD_KIB = 1024

ROOT, WORKSPACE = 1, 2  # node ids; the host's server knows share N as node N + 2
LOOKUP, FORGET, GETATTR, OPEN, RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, IOCTL = (
    1, 2, 3, 14, 18, 26, 27, 28, 29, 34, 36, 39
)  # fmt: skip
BATCH_FORGET, READDIRPLUS = 42, 44
#: Messages between us and the host of which the kernel knows nothing: a file that has been opened before it is asked for, and
#: that this one was wanted.
AHEAD, USED = 100, 4097
NOTIFY_STORE = 4
#: How long what was opened ahead may be taken for what is there, in seconds.
AHEAD_S = 0.5
#: Requests to which the host does not reply.
ONE_WAY = (FORGET, BATCH_FORGET, INTERRUPT, RELEASE, RELEASEDIR)
#: How many bytes of them wait at most.
HELD = 32768
EIO, ENOENT, ENOTTY = 5, 2, 25
FOREVER = 1 << 40

IN = Struct("<IIQQ16x")
OUT = Struct("<IiQ")
INIT_IN = Struct("<4I")
INIT_OUT = Struct("<4I2H2I2HI28x")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
ATTR = Struct("<6Q10I")
ATTR_OUT = Struct("<QI4x")
ENTRY_OUT = Struct("<4QII")
RELEASE_IN = Struct("<IIQQ16xQ16x")
USED_IN = Struct("<IIQQ16xQ")

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


class Relay:
    """Carries requests to the host and what it replies back, one at a time.

    One at a time, because every change from one process to another costs more under emulation than what is gained by having several
    on the way. What needs no reply waits for the next that does, and goes with it: the kernel does not wait for it either.
    """

    def __init__(self, fuse: int, port: int) -> None:
        self.fuse = fuse
        self.port = port
        self.request = memoryview(bytearray(BUFFER + HELD + 4096))
        self.reply = memoryview(bytearray(BUFFER + 4096))
        #: Bytes of `request` that wait, and of `reply` that are not used up.
        self.held = self.have = 0
        #: A file that the host has opened ahead: node, handle, when it came, the reply to its OPEN, its content for the cache.
        self.ahead: tuple[int, int, float, bytes, bytes] | None = None

    def carry(self) -> None:
        """Carry until the host is gone."""
        hung_up = select.poll()
        hung_up.register(self.port, 0)
        request = self.request
        while True:
            held = self.held
            try:
                size = os.readv(self.fuse, (request[held:],))
            except FileNotFoundError:
                continue  # whoever asked has been killed meanwhile
            opcode = request[held + 4]
            if opcode in ONE_WAY:
                if opcode in (RELEASE, RELEASEDIR):
                    self.say(0, request[held + 8 : held + 16])
                self.held += size
                if self.held < HELD:
                    continue
            elif opcode == IOCTL:
                # Python asks of every file it opens whether it is a terminal.
                self.say(-ENOTTY, request[held + 8 : held + 16])
                continue
            elif opcode == OPEN and self.ahead is not None and self.opened():
                continue
            else:
                self.held += size
            if hung_up.poll(0):
                return  # a write would wait for the host to come back
            unique = bytes(request[held + 8 : held + 16])
            sent = os.write(self.port, request[: self.held])
            while sent < self.held:
                sent += os.write(self.port, request[sent : self.held])
            self.held = 0
            answered = opcode in ONE_WAY
            while not answered:
                # A virtio port gives a page at most at a time.
                got = os.readv(self.port, (self.reply[self.have :],))
                if got == 0:
                    return
                self.have += got
                answered = self.take(unique)

    def say(self, error: int, unique: memoryview, body: bytes = b"") -> None:
        """Reply to the kernel."""
        self.tell(OUT.pack(OUT.size + len(body), error, int.from_bytes(unique, "little")) + body)

    def tell(self, message: bytes | memoryview) -> None:
        """Pass a message to the kernel."""
        try:
            os.write(self.fuse, message)
        except OSError:
            pass  # ENOENT: whoever asked is gone

    def take(self, unique: bytes) -> bool:
        """Pass on what has arrived whole; whether the reply to the request `unique` was among it. Raises `ValueError`."""
        reply, have, start, answered = self.reply, self.have, 0, False
        while have - start >= OUT.size:
            length, code, _ = OUT.unpack_from(reply, start)
            if not OUT.size <= length <= BUFFER:
                raise ValueError(f"a message of {length} bytes")
            if have - start < length:
                break
            message = reply[start : start + length]
            start += length
            if code == AHEAD:
                self.keep(bytes(message[OUT.size :]))
                continue
            # The reply, or before it a message of the host's own.
            answered = answered or message[8:16] == unique
            self.tell(message)
        if start:
            reply[: have - start] = reply[start:have]
            self.have = have - start
        return answered

    def keep(self, body: bytes) -> None:
        """Keep a file that was opened ahead; one that nobody wanted is given back."""
        if self.ahead is not None:
            node, handle, *_ = self.ahead
            RELEASE_IN.pack_into(self.request, self.held, RELEASE_IN.size, RELEASE, 0, node, handle)
            self.held += RELEASE_IN.size
        node, handle = int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little")
        self.ahead = (node, handle, time.monotonic(), body[8:24], body[24:])

    def opened(self) -> bool:
        """Answer the OPEN that has been read, if it is for the file that was opened ahead, and for reading."""
        assert self.ahead is not None
        held, (node, handle, since, reply, content) = self.held, self.ahead
        flags = int.from_bytes(self.request[held + IN.size : held + IN.size + 4], "little")
        if (
            IN.unpack_from(self.request, held)[3] != node
            or flags & (os.O_ACCMODE | os.O_TRUNC)
            or time.monotonic() - since > AHEAD_S
        ):
            return False
        unique = bytes(self.request[held + 8 : held + 16])
        self.ahead = None
        # In place of the request, to go with the next.
        USED_IN.pack_into(self.request, held, USED_IN.size, USED, 0, node, handle)
        self.held += USED_IN.size
        if content:
            self.tell(OUT.pack(OUT.size + len(content), NOTIFY_STORE, 0) + content)
        self.say(0, memoryview(unique), reply)
        return True


def begin(fuse: int) -> None:
    """Set the mount up, and answer by ourselves until the runner pokes."""
    with open("/proc/self/mountinfo") as file:
        device = next(line.split()[2] for line in file if line.split()[4] == SHARES)
    with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as file:
        file.write(str(READ_AHEAD_KIB))
    poke = alone(fuse)
    # Woken up, it does not take the CPU from a script that has more to do before it has to wait.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.write(fuse, OUT.pack(OUT.size, -ENOENT, poke))


def main() -> None:
    """Serve the mount until the VM or the channel ends."""
    relay = Relay(int(sys.argv[1]), os.open(sys.argv[2], os.O_RDWR))
    begin(relay.fuse)
    # When this returns and the process ends, the kernel fails every request instead of keeping the script waiting.
    relay.carry()


if __name__ == "__main__":
    main()
