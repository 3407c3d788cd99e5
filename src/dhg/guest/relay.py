"""The guest's end of the host's files: carries FUSE messages between /dev/fuse and the `files` channel.

Guest code: standard library only, and a process of its own: one inside the interpreter that uses the mount would wait for itself.
`init` mounts the file system and starts this with the descriptor of /dev/fuse and the path of the virtio port; where the channels
are vsock's, it starts `vsock.serve_files`.

Until the freeze there is no host to ask, so it answers what the mount and the warm-up need by itself: the root, and in it the
node of the workspace, which is empty. The runner ends that with a look-up of POKE; from then on every request goes to the host as
it is, and every reply comes back as it is. When the VM is frozen the process is blocked in a read: after a restore it costs nothing
until a script touches a file.

A message, either way, begins with its length (four bytes, little-endian); the layouts are in `dhg/share/protocol.py` on the host.
"""

import gc
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
#: Messages between us and the host of which the kernel knows nothing, see `dhg/share/protocol.py`: a file that will be asked for,
#: that it is not to be used; that we have answered a LOOKUP, an OPEN with it.
AHEAD, DROP, SEEN, USED = 100, 101, 4098, 4097
#: How long what was sent ahead may be taken for what is there, in seconds.
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
#: Messages without what differs from one to the next: the number of the request at their end, or a node's.
NO_TERMINAL, DONE, FOUND, OPENED = (
    OUT.pack(OUT.size + size, error, 0)[:8]
    for size, error in ((0, -ENOTTY), (0, 0), (ENTRY_OUT.size + ATTR.size, 0), (16, 0))
)
SEEN_HEAD, USED_HEAD = IN.pack(IN.size, SEEN, 0, 0)[:16], IN.pack(IN.size + 8, USED, 0, 0)[:16]
PADDING = bytes(16)

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
        self.request = memoryview(bytearray(BUFFER))
        self.reply = memoryview(bytearray(BUFFER + 4096))
        #: Messages that wait for the next request, and their size.
        self.held: list[bytes] = []
        self.holding = 0
        #: Bytes of `reply` that are not used up.
        self.have = 0
        #: What the host has sent ahead, by directory and name and by node: when it came, the replies to a LOOKUP and an OPEN, its key
        #: among names, a message with its content for the cache.
        self.names: dict[bytes, tuple[float, bytes, bytes, bytes, bytes]] = {}
        self.files: dict[bytes, tuple[float, bytes, bytes, bytes, bytes]] = {}

    def carry(self) -> None:
        """Carry until the host is gone."""
        hung_up = select.poll()
        hung_up.register(self.port, 0)
        fuse, request, buffers = self.fuse, self.request, (self.request,)
        while True:
            try:
                size = os.readv(fuse, buffers)
            except FileNotFoundError:
                continue  # whoever asked has been killed meanwhile
            opcode = request[4]
            if opcode == IOCTL:
                # Python asks of every file it opens whether it is a terminal.
                self.tell(b"".join((NO_TERMINAL, request[8:16])))
                continue
            if self.files and (
                (opcode == OPEN and self.opened())
                or (opcode == LOOKUP and self.looked_up(bytes(request[IN.size : size])))
            ):
                continue
            answered = opcode in ONE_WAY
            if answered:
                if opcode in (RELEASE, RELEASEDIR):
                    self.tell(b"".join((DONE, request[8:16])))
                self.hold(bytes(request[:size]))
                if self.holding < HELD:
                    continue
                size = 0
            if hung_up.poll(0):
                return  # a write would wait for the host to come back
            self.send(request[:size])
            unique = bytes(request[8:16])
            while not answered:
                # A virtio port gives a page at most at a time.
                got = os.readv(self.port, (self.reply[self.have :],))
                if got == 0:
                    return
                self.have += got
                answered = self.take(unique)

    def hold(self, message: bytes) -> None:
        """Keep a message until there is one that has to be sent."""
        self.held.append(message)
        self.holding += len(message)

    def send(self, message: memoryview) -> None:
        """Send what is held to the host, then `message`."""
        parts = [message]
        if self.held:
            # Together where that costs no large copy: a port takes one buffer at a time.
            if len(message) < 4096:
                parts = [memoryview(b"".join((*self.held, message)))]
            else:
                parts = [memoryview(b"".join(self.held)), message]
            self.held.clear()
            self.holding = 0
        for part in parts:
            while part:
                part = part[os.write(self.port, part) :]

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
                self.keep(bytes(message))
                continue
            if code == DROP:
                self.drop(bytes(message[OUT.size :]))
                continue
            # The reply, or before it a message of the host's own for the kernel.
            answered = answered or message[8:16] == unique
            self.tell(message)
        if start:
            reply[: have - start] = reply[start:have]
            self.have = have - start
        return answered

    def keep(self, message: bytes) -> None:
        """Keep what was sent ahead."""
        end = 168 + message[16] + (message[17] << 8)
        key = message[168:end]
        file = time.monotonic(), message[24:152], message[152:168], key, message[end:]
        self.names[key] = self.files[message[24:32]] = file

    def drop(self, nodes: bytes) -> None:
        """What was sent ahead of these nodes is not to be used."""
        for at in range(0, len(nodes), 8):
            file = self.files.pop(nodes[at : at + 8], None)
            if file is not None:
                self.names.pop(file[3], None)

    def looked_up(self, name: bytes) -> bool:
        """Answer the LOOKUP that has been read, if it is of a file that was sent ahead."""
        request = self.request
        file = self.names.pop(b"".join((request[16:24], name)), None)
        if file is None or time.monotonic() - file[0] > AHEAD_S:
            return False
        _, entry, reply, _, _ = file
        node = entry[:8]
        if reply == PADDING:
            del self.files[node]
        self.hold(b"".join((SEEN_HEAD, node, PADDING)))
        self.tell(b"".join((FOUND, request[8:16], entry)))
        return True

    def opened(self) -> bool:
        """Answer the OPEN that has been read, if it is of a file that was sent ahead, and for reading."""
        request = self.request
        node = bytes(request[16:24])
        file = self.files.get(node)
        if file is None:
            return False
        since, _, reply, key, content = file
        flags = int.from_bytes(request[IN.size : IN.size + 4], "little")
        if flags & (os.O_ACCMODE | os.O_TRUNC) or reply == PADDING or time.monotonic() - since > AHEAD_S:
            return False
        del self.files[node]
        self.names.pop(key, None)
        self.hold(b"".join((USED_HEAD, node, PADDING, reply[:8])))
        if content:
            self.tell(content)
        self.tell(b"".join((OPENED, request[8:16], reply)))
        return True


def begin(fuse: int) -> None:
    """Set the mount up, and answer by ourselves until the runner pokes."""
    with open("/proc/self/mountinfo") as file:
        device = next(line.split()[2] for line in file if line.split()[4] == SHARES)
    with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as file:
        file.write(str(READ_AHEAD_KIB))
    # Nothing here refers to itself.
    gc.disable()
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
