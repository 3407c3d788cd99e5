"""The server of the host's files, spoken to as a guest's kernel does, over a real socket and with real files."""

from __future__ import annotations

import errno
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dhg.errors import HostError
from dhg.share import ahead, nodes, protocol
from dhg.share import main as share_main
from dhg.share.ignore import Patterns
from dhg.share.nodes import FIRST_SHARE_ID, Share
from dhg.share.server import Broken, Server
from dhg.share.start import FileServer

#: Share 0 is read-only, share 1 may be written to.
READ_ONLY, WRITABLE = FIRST_SHARE_ID, FIRST_SHARE_ID + 1
ENTRY_SIZE = protocol.ENTRY_OUT.size + protocol.ATTR.size


class Kernel:
    """Speaks over a socket as a guest's kernel does."""

    def __init__(self, ours: socket.socket) -> None:
        ours.settimeout(20)
        self.socket = ours
        self.unique = 0
        #: Messages of the server's own by their codes, without headers.
        self.stored: list[bytes] = []
        self.ahead: list[bytes] = []
        self.dropped: list[bytes] = []
        self.stale: list[bytes] = []

    def send(self, opcode: int, node: int, body: bytes = b"") -> int:
        self.unique += 1
        self.socket.sendall(protocol.IN.pack(protocol.IN.size + len(body), opcode, self.unique, node) + body)
        return self.unique

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def ask(self, opcode: int, node: int, body: bytes = b"") -> tuple[int, bytes]:
        """The error number (0 for none) and the body of the reply."""
        unique = self.send(opcode, node, body)
        while True:
            length, error, number = protocol.OUT.unpack(self._take(protocol.OUT.size))
            reply = self._take(length - protocol.OUT.size)
            if number == unique:
                assert not (error and reply)
                return -error, reply
            assert number == 0
            {
                protocol.NOTIFY_STORE: self.stored,
                protocol.NOTIFY_INVAL_INODE: self.stale,
                protocol.AHEAD: self.ahead,
                protocol.DROP: self.dropped,
            }[error].append(reply)

    def good(self, opcode: int, node: int, body: bytes = b"") -> bytes:
        error, reply = self.ask(opcode, node, body)
        assert error == 0, os.strerror(error)
        return reply

    def bad(self, opcode: int, node: int, body: bytes = b"") -> str:
        error, _ = self.ask(opcode, node, body)
        return errno.errorcode.get(error, str(error))

    def lookup(self, node: int, name: str | bytes) -> int:
        """The node of a name, 0 if there is none."""
        raw = name.encode() if isinstance(name, str) else name
        return int.from_bytes(self.good(protocol.LOOKUP, node, raw + b"\0")[:8], "little")

    def walk(self, node: int, path: str) -> int:
        for name in path.split("/"):
            node = self.lookup(node, name)
            assert node, path
        return node

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        return int.from_bytes(self.good(protocol.OPEN, node, protocol.OPEN_IN.pack(flags))[:8], "little")

    def read(self, node: int, handle: int, size: int = 1 << 20, offset: int = 0) -> bytes:
        return self.good(protocol.READ, node, protocol.READ_IN.pack(handle, offset, size))

    def names(self, node: int, *, plus: bool = False) -> list[str]:
        handle = int.from_bytes(self.good(protocol.OPENDIR, node, protocol.OPEN_IN.pack(0))[:8], "little")
        found, offset = [], 0
        opcode = protocol.READDIRPLUS if plus else protocol.READDIR
        while data := self.good(opcode, node, protocol.READ_IN.pack(handle, offset, 4096)):
            assert len(data) <= 4096
            at = 0
            while at < len(data):
                at += ENTRY_SIZE if plus else 0
                _, offset, length, _ = protocol.DIRENT.unpack_from(data, at)
                at += protocol.DIRENT.size
                found.append(os.fsdecode(data[at : at + length]))
                at += length + -length % 8
        self.send(protocol.RELEASEDIR, node, protocol.RELEASE_IN.pack(handle))
        return [name for name in found if name not in (".", "..")]

    def mode(self, node: int) -> int:
        reply = self.good(protocol.GETATTR, node, protocol.GETATTR_IN.pack(0, 0))
        return int(protocol.ATTR.unpack_from(reply, protocol.ATTR_OUT.size)[9])


class Guest(Kernel):
    """The guest's side of the connection to a server in a thread."""

    def __init__(self, folders: list[tuple[Path, bool]], *, max_handles: int = 64) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self.theirs = theirs
        self.fds = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path, _ in folders]
        shares = []
        for number, (path, writable) in enumerate(folders):
            share = Share(number, self.fds[number], writable=writable)
            ignore = path / ".dhgignore"
            if ignore.is_file():
                share.patterns = Patterns(ignore.read_bytes())
                share.guard = (ignore.stat().st_dev, ignore.stat().st_ino)
            shares.append(share)
        self.server = Server(theirs.fileno(), shares, max_handles=max_handles)
        self.broken: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.server.serve()
        except BaseException as error:
            self.broken = error
        self.theirs.close()

    def close(self) -> None:
        self.socket.close()
        self.thread.join(20)
        assert not self.thread.is_alive()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "ro", tmp_path / "rw"]
    for folder in found:
        folder.mkdir()
    (tmp_path / "secret").write_text("outside")
    return found


Start = Callable[..., Guest]


@pytest.fixture
def start(folders: list[Path]) -> Iterator[Start]:
    guests: list[Guest] = []
    mask = os.umask(0)

    def make(max_handles: int = 64) -> Guest:
        guests.append(Guest([(folders[0], False), (folders[1], True)], max_handles=max_handles))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
        assert guest.broken is None or isinstance(guest.broken, Broken)
    os.umask(mask)


def create(name: bytes, flags: int = os.O_RDWR, mode: int = 0o644) -> bytes:
    return protocol.CREATE_IN.pack(flags, mode) + name + b"\0"


def test_what_one_server_gave_out_means_nothing_to_the_next(tmp_path: Path) -> None:
    """A guest's kernel still has nodes and handles of the rehearsal's server when a clone's takes its place on the channel."""
    (tmp_path / "a").write_text("first")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guest = Kernel(ours)

        def begin() -> tuple[FileServer, int, int]:
            server = FileServer(theirs.fileno(), ((str(tmp_path), "r"),))
            node = guest.lookup(READ_ONLY, "a")
            return server, node, guest.open(node)

        server, old, old_handle = begin()
        server.kill()
        server, node, handle = begin()
        try:
            guest.send(protocol.RELEASE, old, protocol.RELEASE_IN.pack(old_handle))
            guest.send(protocol.FORGET, old, protocol.FORGET_IN.pack(1))
            assert guest.bad(protocol.GETATTR, old, protocol.GETATTR_IN.pack(0, 0)) == "ESTALE"
            assert guest.read(node, handle) == b"first"
        finally:
            server.kill()


def test_what_is_there_can_be_read(start: Start, folders: list[Path]) -> None:
    (folders[0] / "dir").mkdir()
    data = os.urandom(300_000)
    (folders[0] / "dir" / "größe ☃").write_bytes(data)
    os.symlink("dir/größe ☃", folders[0] / "link")
    guest = start()
    node = guest.walk(READ_ONLY, "dir/größe ☃")
    handle = guest.open(node)
    assert guest.read(node, handle) == data
    assert guest.read(node, handle, 10, 299_995) == data[-5:]
    assert guest.read(node, handle, 10, 1 << 40) == b""
    assert guest.good(protocol.READLINK, guest.lookup(READ_ONLY, "link")) == "dir/größe ☃".encode()
    assert sorted(guest.names(READ_ONLY)) == sorted(guest.names(READ_ONLY, plus=True)) == ["dir", "link"]
    assert sorted(guest.names(protocol.IN.size and 1)) == ["0", "1"]
    assert guest.lookup(READ_ONLY, "nothing") == 0
    assert guest.lookup(1, "0") == READ_ONLY


class Sent:
    """A message AHEAD, taken apart."""

    def __init__(self, message: bytes) -> None:
        size = protocol.AHEAD_OUT.unpack_from(message)[0]
        at = protocol.AHEAD_OUT.size
        node, _, *valid = protocol.ENTRY_OUT.unpack_from(message, at)
        assert valid == [0, 0, int(protocol.AHEAD_S * 1e9), int(protocol.AHEAD_S * 1e9)]
        self.node = node
        self.size = protocol.ATTR.unpack_from(message, at + protocol.ENTRY_OUT.size)[1]
        self.handle, self.flags = protocol.OPEN_OUT.unpack_from(message, at + ENTRY_SIZE)
        at += ENTRY_SIZE + protocol.OPEN_OUT.size
        self.parent = int.from_bytes(message[at : at + 8], "little")
        self.name = message[at + 8 : at + size - 1].decode()
        assert message[at + size - 1] == 0
        self.content = b""
        if len(message) > at + size:
            length, code, unique = protocol.OUT.unpack_from(message, at + size)
            assert (length, code, unique) == (len(message) - at - size, protocol.NOTIFY_STORE, 0)
            store = message[at + size + protocol.OUT.size :]
            assert protocol.STORE_OUT.unpack_from(store) == (node, 0, self.size)
            self.content = store[protocol.STORE_OUT.size :]
            assert len(self.content) == self.size


def sent(guest: Guest) -> list[Sent]:
    """What was sent ahead since this was asked last."""
    found = [Sent(message) for message in guest.ahead]
    guest.ahead.clear()
    return found


def taken_back(guest: Guest) -> set[int]:
    """The nodes whose files have been taken back since this was asked last."""
    ids = b"".join(guest.dropped)
    guest.dropped.clear()
    return {number for (number,) in Struct("<Q").iter_unpack(ids)}


def receive(guest: Guest, kept: dict[str, Sent]) -> None:
    """Let `kept` be what a relay has now, by name."""
    gone = taken_back(guest)
    for name in [name for name, file in kept.items() if file.node in gone]:
        del kept[name]
    kept.update({file.name: file for file in sent(guest)})


def use(guest: Guest, file: Sent) -> None:
    """What the relay says when it has answered a LOOKUP and an OPEN."""
    guest.send(protocol.SEEN, file.node)
    guest.send(protocol.USED, file.node, protocol.USED_IN.pack(file.handle))


def write_old(path: Path, text: str) -> None:
    """A file that was not changed just now, so that its times say it when it is."""
    path.write_text(text)
    path.touch()
    aged.append(path)


#: Files to be older than what the kernel's clock can tell apart before a test goes on.
aged: list[Path] = []


def age() -> None:
    while aged:
        found = aged.pop().stat()
        while time.time_ns() - found.st_ctime_ns < 2 * ahead.TICK_NS:
            time.sleep(0.005)


def test_a_small_file_comes_with_its_open_and_the_cache_stays_good_until_it_changes(
    start: Start, folders: list[Path]
) -> None:
    write_old(folders[0] / "a", "small")
    (folders[0] / "big").write_bytes(bytes(protocol.SMALL + 1))
    age()
    guest = start()
    node = guest.lookup(READ_ONLY, "a")

    def flags() -> int:
        handle, found = protocol.OPEN_OUT.unpack(guest.good(protocol.OPEN, node, protocol.OPEN_IN.pack(0)))
        guest.send(protocol.RELEASE, node, protocol.RELEASE_IN.pack(handle))
        return found  # type: ignore[no-any-return]

    assert flags() == protocol.KEEP_CACHE
    assert guest.stored == [protocol.STORE_OUT.pack(node, 0, 5) + b"small"]
    assert flags() == protocol.KEEP_CACHE
    assert len(guest.stored) == 1
    assert guest.stale == []
    for text in ("other", "longer now"):
        write_old(folders[0] / "a", text)
        age()
        # It takes the file for what it was: it has to ask again before it reads.
        assert flags() == 0
        assert guest.stale.pop() == protocol.INVAL_OUT.pack(node, -1, 0)
        guest.good(protocol.GETATTR, node, protocol.GETATTR_IN.pack(0, 0))
        assert flags() == protocol.KEEP_CACHE
    # Pages of a file that is open may be locked: then nothing is stored.
    write_old(folders[0] / "b", "b")
    b = guest.lookup(READ_ONLY, "b")
    first = guest.open(b)
    stored = len(guest.stored)
    write_old(folders[0] / "b", "c")
    guest.good(protocol.GETATTR, b, protocol.GETATTR_IN.pack(0, 0))
    guest.open(b)
    guest.send(protocol.RELEASE, b, protocol.RELEASE_IN.pack(first))
    guest.open(guest.lookup(READ_ONLY, "big"))
    assert len(guest.stored) == stored


def test_a_file_that_is_looked_up_where_files_are_read_is_opened_at_once(start: Start, folders: list[Path]) -> None:
    for i in range(0, 100, 5):
        write_old(folders[0] / f"f{i}{i * i}", f"file {i:02}")
    names = [path.name for path in aged]
    age()
    random.Random(4).shuffle(names)
    guest = start()
    nodes_ = [guest.lookup(READ_ONLY, names[i]) for i in range(2)]
    assert sent(guest) == []
    guest.open(nodes_[0])
    third = guest.lookup(READ_ONLY, names[9])
    (file,) = [file for file in sent(guest) if file.name == names[9]]
    assert (file.node, file.flags, file.parent) == (third, protocol.KEEP_CACHE, READ_ONLY)
    assert file.content == (folders[0] / names[9]).read_bytes()
    # Taken, and closed: the guest has its content now.
    guest.send(protocol.USED, third, protocol.USED_IN.pack(file.handle))
    assert guest.read(third, file.handle) == file.content
    guest.send(protocol.RELEASE, third, protocol.RELEASE_IN.pack(file.handle))
    guest.lookup(READ_ONLY, names[9])
    (file,) = [file for file in sent(guest) if file.name == names[9]]
    assert file.handle and not file.content
    guest.send(protocol.USED, third, protocol.USED_IN.pack(file.handle))


def numbered(folder: Path, count: int, text: str = "file {}", name: str = "f{}.txt") -> list[str]:
    names = [name.format(i) for i in range(count)]
    for i, each in enumerate(names):
        write_old(folder / each, text.format(i))
    age()
    return names


def read_all(guest: Guest, folder: int, names: list[str], *, look: bool = True) -> tuple[list[int], dict[str, bytes]]:
    """Read files as a guest with a relay would; the requests that reached the server at each, and the contents."""
    kept: dict[str, Sent] = {}
    requests, contents = [], {}
    for name in names:
        count = 0
        receive(guest, kept)
        file = kept.get(name)
        if look and file is None:
            node = guest.lookup(folder, name)
            count += 1
        elif file is not None:
            node = file.node
            guest.send(protocol.SEEN, node)
        else:
            node = guest.lookup(folder, name)
        receive(guest, kept)
        file = kept.pop(name, None)
        if file is not None and file.handle:
            guest.send(protocol.USED, node, protocol.USED_IN.pack(file.handle))
            handle = file.handle
        else:
            handle = guest.open(node)
            count += 1
            receive(guest, kept)
        contents[name] = guest.read(node, handle)
        guest.send(protocol.RELEASE, node, protocol.RELEASE_IN.pack(handle))
        requests.append(count)
    return requests, contents


@pytest.mark.parametrize("order", ["by number", "sorted", "listed", "every other"])
def test_the_next_files_are_sent_along(start: Start, folders: list[Path], order: str) -> None:
    names = numbered(folders[0], 600)
    guest = start(max_handles=512)
    if order == "sorted":
        names.sort()
    elif order == "listed":
        names = guest.names(READ_ONLY)
    elif order == "every other":
        names = names[::2]
    requests, contents = read_all(guest, READ_ONLY, names)
    assert contents == {name: (folders[0] / name).read_bytes() for name in names}
    assert sum(requests) < len(names) / 8
    # Nothing of it stays open, and nothing stays known that the guest does not know.
    guest.good(protocol.GETATTR, READ_ONLY, protocol.GETATTR_IN.pack(0, 0))
    assert len(guest.server.tables.handles) <= protocol.AHEAD_WINDOW


def test_files_that_are_read_in_no_order_are_not_sent_along(start: Start, folders: list[Path]) -> None:
    names = numbered(folders[0], 400)
    random.Random(1).shuffle(names)
    guest = start()
    requests, contents = read_all(guest, READ_ONLY, names)
    assert len(contents) == 400
    assert sum(requests) <= 401
    bytes_sent = guest.server.files.ahead._size
    assert bytes_sent < 20_000


def test_names_that_are_looked_up_in_order_are_sent_along_without_being_opened(
    start: Start, folders: list[Path]
) -> None:
    names = numbered(folders[0], 300)
    guest = start()
    known: dict[str, Sent] = {}
    asked = 0
    for name in names:
        file = known.pop(name, None)
        if file is None:
            asked += 1
            guest.lookup(READ_ONLY, name)
            receive(guest, known)
        else:
            assert (file.handle, file.content, file.size) == (0, b"", (folders[0] / name).stat().st_size)
            guest.send(protocol.SEEN, file.node)
    assert asked < 30
    assert guest.server.tables.handles == {}
    # Each was told once, sent ahead or not.
    for number in list(guest.server.tables.nodes):
        guest.send(protocol.FORGET, number, protocol.FORGET_IN.pack(1))
    guest.good(protocol.GETATTR, READ_ONLY, protocol.GETATTR_IN.pack(0, 0))
    assert len(guest.server.tables.nodes) == 2


def test_what_is_not_sent_along(start: Start, folders: list[Path], tmp_path: Path) -> None:
    folder = folders[0]
    (folder / ".dhgignore").write_text("secret*\n/f05\n")
    numbered(folder, 3, name="f0{}")
    (folder / "f03").mkdir()
    os.symlink(tmp_path / "secret", folder / "f04")
    (folder / "f05").write_text("hidden")
    os.mkfifo(folder / "f06")
    (folder / "f07").write_text("linked")
    os.link(folder / "f07", tmp_path / "link")
    (folder / "secret1").write_text("hidden")
    write_old(folder / "f08", "x" * (protocol.SMALL + 1))
    write_old(folder / "f09", "last")
    age()
    # One that is being written is not what it will be when it is read.
    guest = start()
    (folder / "f08b").write_text("just now")
    guest.open(guest.lookup(READ_ONLY, "f00"))
    guest.lookup(READ_ONLY, "f01")
    assert "f02" in [file.name for file in sent(guest)]
    guest.open(guest.lookup(READ_ONLY, "f02"))
    found = {file.name: file for file in sent(guest)}
    guest.open(guest.lookup(READ_ONLY, "f08"))
    found |= {file.name: file for file in sent(guest)}
    assert not {"f03", "f04", "f05", "f06", "f07", "f08b", "secret1"} & set(found)
    assert found["f09"].content == b"last"
    # A large file's name only.
    assert "f08" not in found or (found["f08"].handle, found["f08"].content) == (0, b"")


def test_what_is_sent_along_is_bounded(start: Start, folders: list[Path]) -> None:
    names = numbered(folders[0], 300, "x" * 30_000 + "{}")
    guest = start(max_handles=512)
    known: set[str] = set()
    requests = 0
    for name in names:
        if name in known:
            continue
        requests += 1
        guest.open(guest.lookup(READ_ONLY, name))
        new = sent(guest)
        assert 0 < sum(len(file.content) for file in new) <= protocol.AHEAD_BYTES or requests < 3
        assert guest.server.files.ahead._size <= protocol.AHEAD_BYTES
        for file in new:
            use(guest, file)
            if file.handle:
                guest.send(protocol.RELEASE, file.node, protocol.RELEASE_IN.pack(file.handle))
                known.add(file.name)
    assert requests < 100
    numbered(folders[1], 1000)
    read_all(guest, WRITABLE, [f"f{i}.txt" for i in range(600)])
    for _ in range(3):
        guest.lookup(WRITABLE, "f600.txt")
        guest.lookup(WRITABLE, "f601.txt")
        assert len(sent(guest)) <= protocol.AHEAD_WINDOW + 1
        assert len(guest.server.files.ahead._records) <= ahead.MAX_RECORDS


def follow(guest: Guest, folder: int) -> dict[str, Sent]:
    """Begin to read f0.txt and so on; what is sent ahead."""
    guest.open(guest.lookup(folder, "f0.txt"))
    guest.open(guest.lookup(folder, "f1.txt"))
    guest.lookup(folder, "f2.txt")
    return {file.name: file for file in sent(guest)}


def gone(guest: Guest, file: Sent) -> bool:
    """Whether what was sent ahead of a file has been taken back before the last reply."""
    return file.node in taken_back(guest)


CHANGES: dict[str, tuple[int, int, Callable[[Sent], bytes]]] = {
    "create": (protocol.CREATE, WRITABLE, lambda _: create(b"f4.txt", os.O_RDWR)),
    "unlink": (protocol.UNLINK, WRITABLE, lambda _: b"f4.txt\0"),
    "rename": (protocol.RENAME, WRITABLE, lambda _: protocol.RENAME_IN.pack(WRITABLE) + b"f4.txt\0x\0"),
    "rename over": (protocol.RENAME, WRITABLE, lambda _: protocol.RENAME_IN.pack(WRITABLE) + b"f0.txt\0f4.txt\0"),
    "open": (protocol.OPEN, 0, lambda _: protocol.OPEN_IN.pack(os.O_RDWR)),
    "open to read": (protocol.OPEN, 0, lambda _: protocol.OPEN_IN.pack(0)),
    "truncate": (
        protocol.SETATTR,
        0,
        lambda _: protocol.SETATTR_IN.pack(protocol.SET_SIZE, 0, 1, 0, 0, 0, 0, 0, 0, 0),
    ),
    "link": (protocol.LINK, WRITABLE, lambda file: protocol.LINK_IN.pack(file.node) + b"link\0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_guest_changes_is_taken_back_first(start: Start, folders: list[Path], change: str) -> None:
    numbered(folders[1], 20)
    guest = start()
    file = follow(guest, WRITABLE)["f4.txt"]
    opcode, node, body = CHANGES[change]
    guest.ask(opcode, node or file.node, body(file))
    assert gone(guest, file)
    assert file.handle not in guest.server.tables.handles
    # Of what it has read it is told nothing old either.
    guest.send(protocol.USED, file.node, protocol.USED_IN.pack(file.handle))
    assert guest.bad(protocol.READ, file.node, protocol.READ_IN.pack(file.handle, 0, 10)) in ("EBADF", "ESTALE")


def test_a_file_that_the_guest_has_open_is_not_sent_along(start: Start, folders: list[Path]) -> None:
    numbered(folders[1], 20)
    guest = start()
    node = guest.lookup(WRITABLE, "f4.txt")
    guest.open(node, os.O_RDWR)
    assert "f4.txt" not in follow(guest, WRITABLE)


def test_what_is_written_through_one_share_is_taken_back_from_another(tmp_path: Path) -> None:
    numbered(tmp_path, 20)
    guest = Guest([(tmp_path, False), (tmp_path, True)])
    try:
        file = follow(guest, READ_ONLY)["f4.txt"]
        node = guest.lookup(WRITABLE, "f4.txt")
        handle = guest.open(node, os.O_WRONLY)
        assert gone(guest, file)
        guest.open(guest.lookup(READ_ONLY, "f5.txt"))
        guest.lookup(READ_ONLY, "f6.txt")
        guest.good(protocol.WRITE, node, protocol.WRITE_IN.pack(handle, 0, 1) + b"x")
        assert guest.server.files.ahead._records == {}
    finally:
        guest.close()


@pytest.mark.parametrize("how", ["lookup", "getattr", "listing"])
def test_what_changes_here_is_taken_back_before_it_is_told(start: Start, folders: list[Path], how: str) -> None:
    """Content of one version must never meet attributes of another."""
    numbered(folders[0], 20)
    guest = start()
    file = follow(guest, READ_ONLY)["f4.txt"]
    (folders[0] / "f4.txt").write_text("changed meanwhile")
    if how == "lookup":
        guest.lookup(READ_ONLY, "f4.txt")
    elif how == "getattr":
        guest.good(protocol.GETATTR, file.node, protocol.GETATTR_IN.pack(0, 0))
    else:
        guest.names(READ_ONLY, plus=True)
    assert gone(guest, file)
    # Nor is it sent again while it may still be changing under the same times, or the guest takes it for something else.
    assert "f4.txt" not in [each.name for each in sent(guest)]


def test_a_file_the_guest_takes_for_what_it_was_is_not_sent_along(start: Start, folders: list[Path]) -> None:
    numbered(folders[0], 20)
    guest = start()
    guest.lookup(READ_ONLY, "f4.txt")
    write_old(folders[0] / "f4.txt", "changed meanwhile")
    age()
    found = follow(guest, READ_ONLY)
    assert "f3.txt" in found and "f4.txt" not in found


def test_what_was_sent_along_and_is_too_old_is_taken_back(
    start: Start, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(folders[0], 20)
    guest = start()
    file = follow(guest, READ_ONLY)["f4.txt"]
    assert file.handle in guest.server.tables.handles
    monkeypatch.setattr(ahead, "AHEAD_S", -1.0)
    guest.lookup(READ_ONLY, "f4.txt")
    assert gone(guest, file)
    assert file.handle not in guest.server.tables.handles


def test_the_window_grows_by_what_was_wanted_and_not_by_what_was_not_sent(
    start: Start, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = numbered(folders[0], 100)
    guest = start()
    # As if all of them had just been written: none can be sent yet.
    monkeypatch.setattr(ahead, "TICK_NS", 1 << 62)
    for name in names[:20]:
        guest.lookup(READ_ONLY, name)
    assert not sent(guest)
    monkeypatch.undo()
    guest.lookup(READ_ONLY, names[20])
    assert [file.name for file in sent(guest)] == names[21 : 21 + ahead.FIRST_WINDOW]


def test_what_is_looked_up_and_never_opened_does_not_pile_up(start: Start, folders: list[Path]) -> None:
    # Names of which none follows another: each is sent with its look-up, for the directory's files are being read.
    names = numbered(folders[0], 900)
    random.Random(3).shuffle(names)
    guest = start(max_handles=4096)
    for looked, opened in zip(names[0:600:2], names[1:600:2], strict=True):
        guest.lookup(READ_ONLY, looked)
        guest.open(guest.lookup(READ_ONLY, opened))
        assert len(guest.server.files.ahead._records) <= ahead.MAX_RECORDS
    time.sleep(protocol.AHEAD_S + 0.05)
    guest.lookup(READ_ONLY, names[700])
    assert len(guest.server.files.ahead._records) <= 1


@pytest.mark.parametrize("by", ["look-up", "listing"])
def test_a_name_that_means_another_file_by_now_is_taken_back_first(start: Start, folders: list[Path], by: str) -> None:
    numbered(folders[0], 20)
    guest = start()
    file = follow(guest, READ_ONLY)["f4.txt"]
    (folders[0] / "other").write_text("other")
    os.replace(folders[0] / "other", folders[0] / "f4.txt")
    if by == "look-up":
        assert guest.lookup(READ_ONLY, "f4.txt") != file.node
    else:
        guest.names(READ_ONLY, plus=True)
    assert gone(guest, file)
    assert file.handle not in guest.server.tables.handles


def test_a_read_that_fails_at_an_open_leaves_no_descriptor(
    start: Start, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(folders[0], 3)
    guest = start()
    node = guest.lookup(READ_ONLY, "f1.txt")

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "broken disk")

    def beside_handles() -> int:
        return len(os.listdir("/proc/self/fd")) - len(guest.server.tables.handles)

    before = beside_handles()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fails)
        handle = guest.open(node)
    guest.send(protocol.RELEASE, node, protocol.RELEASE_IN.pack(handle))
    assert guest.lookup(READ_ONLY, "f1.txt") == node
    assert beside_handles() == before


def test_handles_that_were_opened_ahead_give_way(start: Start, folders: list[Path]) -> None:
    numbered(folders[0], 100)
    guest = start()
    node = guest.lookup(READ_ONLY, "f99.txt")
    follow(guest, READ_ONLY)
    held = len(guest.server.files.ahead._records)
    assert held
    used = len(guest.server.tables.handles)
    assert [guest.ask(protocol.OPEN, node, protocol.OPEN_IN.pack(0))[0] for _ in range(64 - used + held)] == [0] * (
        64 - used + held
    )
    assert guest.bad(protocol.OPEN, node, protocol.OPEN_IN.pack(0)) == "ENFILE"


def test_a_relay_that_lies_hurts_only_its_guest(start: Start, folders: list[Path]) -> None:
    numbered(folders[0], 30)
    guest = start()
    found = follow(guest, READ_ONLY)
    file, other = found["f3.txt"], found["f4.txt"]
    guest.send(protocol.RELEASE, file.node, protocol.RELEASE_IN.pack(file.handle))
    guest.send(protocol.USED, file.node, protocol.USED_IN.pack(other.handle))
    for _ in range(3):
        guest.send(protocol.SEEN, file.node)
        guest.send(protocol.USED, file.node, protocol.USED_IN.pack(file.handle))
        guest.send(protocol.FORGET, other.node, protocol.FORGET_IN.pack(2**64 - 1))
        guest.send(protocol.SEEN, 2**64 - 1)
    guest.open(guest.lookup(READ_ONLY, "f5.txt"))
    assert guest.read(guest.lookup(READ_ONLY, "f9.txt"), guest.open(guest.lookup(READ_ONLY, "f9.txt"))) == b"file 9"
    guest.server.files.ahead.drop_all()
    sent(guest)
    assert read_all(guest, READ_ONLY, [f"f{i}.txt" for i in range(30)])[1]["f4.txt"] == b"file 4"


def test_a_directory_of_many_entries_is_listed_whole_and_once(start: Start, folders: list[Path]) -> None:
    wanted = {f"file number {i} with a longer name" for i in range(1000)}
    for name in wanted:
        (folders[0] / name).touch()
    guest = start()
    for plus in (False, True):
        found = guest.names(READ_ONLY, plus=plus)
        assert len(found) == 1000
        assert set(found) == wanted


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"../secret", b"/etc/passwd", b"a\0b", b"x" * 256])
def test_names_are_single_components(start: Start, folders: list[Path], name: bytes) -> None:
    guest = start()
    for opcode in (protocol.LOOKUP, protocol.UNLINK, protocol.RMDIR):
        assert guest.bad(opcode, WRITABLE, name + b"\0") in ("EINVAL", "ENAMETOOLONG")
    assert guest.bad(protocol.CREATE, WRITABLE, create(name)) in ("EINVAL", "ENAMETOOLONG")
    assert guest.bad(protocol.MKDIR, WRITABLE, protocol.MKDIR_IN.pack(0o755) + name + b"\0") in (
        "EINVAL",
        "ENAMETOOLONG",
    )
    assert guest.bad(protocol.LOOKUP, WRITABLE, b"no end") == "EINVAL"
    assert os.listdir(folders[1]) == []


def test_symlinks_are_never_followed_here(start: Start, folders: list[Path], tmp_path: Path) -> None:
    os.symlink(tmp_path, folders[0] / "out")
    os.symlink(tmp_path / "secret", folders[0] / "file")
    guest = start()
    out, file = guest.lookup(READ_ONLY, "out"), guest.lookup(READ_ONLY, "file")
    assert stat.S_ISLNK(guest.mode(out))
    assert guest.bad(protocol.LOOKUP, out, b"secret\0") == "ESTALE"
    assert guest.bad(protocol.OPENDIR, out, protocol.OPEN_IN.pack(0)) == "ENOTDIR"
    assert guest.bad(protocol.OPEN, file, protocol.OPEN_IN.pack(0)) == "EACCES"


def test_a_directory_swapped_for_a_symlink_leads_nowhere(start: Start, folders: list[Path], tmp_path: Path) -> None:
    (folders[1] / "dir").mkdir()
    (folders[1] / "dir" / "secret").write_text("inside")
    guest = start()
    folder = guest.lookup(WRITABLE, "dir")
    file = guest.lookup(folder, "secret")
    os.rename(folders[1] / "dir", folders[1] / "dir.away")
    os.symlink(tmp_path, folders[1] / "dir")
    assert guest.bad(protocol.LOOKUP, folder, b"secret\0") == "ESTALE"
    assert guest.bad(protocol.OPEN, file, protocol.OPEN_IN.pack(os.O_RDWR)) == "ESTALE"
    assert guest.bad(protocol.CREATE, folder, create(b"new")) == "ESTALE"
    assert guest.bad(protocol.UNLINK, folder, b"secret\0") == "ESTALE"
    assert (tmp_path / "secret").read_text() == "outside"


def test_a_race_for_a_symlink_is_never_won(start: Start, folders: list[Path], tmp_path: Path) -> None:
    (folders[1] / "dir").mkdir()
    (folders[1] / "dir" / "secret").write_text("inside")
    os.symlink(tmp_path, folders[1] / "evil")
    stop = threading.Event()

    def swap() -> None:
        import dhg.share.beneath as beneath

        fd = os.open(folders[1], os.O_PATH)
        while not stop.is_set():
            beneath.rename(fd, b"dir", fd, b"evil", 2)
        os.close(fd)

    thread = threading.Thread(target=swap)
    thread.start()
    guest = start()
    read = 0
    try:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            error, reply = guest.ask(protocol.LOOKUP, WRITABLE, b"dir\0")
            folder = int.from_bytes(reply[:8], "little")
            if error or not folder:
                continue
            error, reply = guest.ask(protocol.LOOKUP, folder, b"secret\0")
            node = int.from_bytes(reply[:8], "little")
            if error or not node:
                continue
            error, reply = guest.ask(protocol.OPEN, node, protocol.OPEN_IN.pack(0))
            if error:
                continue
            handle = int.from_bytes(reply[:8], "little")
            assert guest.read(node, handle) == b"inside"
            read += 1
            guest.send(protocol.RELEASE, node, protocol.RELEASE_IN.pack(handle))
    finally:
        stop.set()
        thread.join()
    assert read
    assert all(reply[protocol.STORE_OUT.size :] == b"inside" for reply in guest.stored)


def test_only_regular_files_are_opened(start: Start, folders: list[Path]) -> None:
    os.mkfifo(folders[1] / "fifo")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(folders[1] / "socket"))
    names = ["fifo", "socket"]
    if os.geteuid() == 0:
        os.mknod(folders[1] / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        names.append("null")
    guest = start()
    for name in names:
        node = guest.lookup(WRITABLE, name)
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
            assert guest.bad(protocol.OPEN, node, protocol.OPEN_IN.pack(flags)) == "EACCES"
        set_size = protocol.SETATTR_IN.pack(protocol.SET_SIZE, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        assert guest.bad(protocol.SETATTR, node, set_size) == "EINVAL"
    sock.close()
    for kind in (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK):
        assert guest.bad(protocol.MKNOD, WRITABLE, protocol.MKNOD_IN.pack(kind | 0o666) + b"new\0") == "EPERM"


def test_read_only_is_read_only(start: Start, folders: list[Path]) -> None:
    (folders[0] / "a").write_text("a")
    guest = start()
    node = guest.lookup(READ_ONLY, "a")
    assert not guest.server.files.refused_write
    # Not what a user asked for, and no reason for a hint.
    assert guest.bad(protocol.MKDIR, READ_ONLY, protocol.MKDIR_IN.pack(0o755) + b"__pycache__\0") == "EROFS"
    assert guest.bad(protocol.ACCESS, node, protocol.ACCESS_IN.pack(os.W_OK)) == "EROFS"
    assert not guest.server.files.refused_write
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC):
        assert guest.bad(protocol.OPEN, node, protocol.OPEN_IN.pack(flags)) == "EROFS"
    assert guest.server.files.refused_write
    for opcode, on, body in (
        (protocol.CREATE, READ_ONLY, create(b"b")),
        (protocol.MKNOD, READ_ONLY, protocol.MKNOD_IN.pack(stat.S_IFREG) + b"b\0"),
        (protocol.MKDIR, READ_ONLY, protocol.MKDIR_IN.pack(0o755) + b"b\0"),
        (protocol.UNLINK, READ_ONLY, b"a\0"),
        (protocol.RMDIR, READ_ONLY, b"a\0"),
        (protocol.SYMLINK, READ_ONLY, b"b\0a\0"),
        (protocol.LINK, READ_ONLY, protocol.LINK_IN.pack(node) + b"b\0"),
        (protocol.RENAME, READ_ONLY, protocol.RENAME_IN.pack(READ_ONLY) + b"a\0b\0"),
        (protocol.RENAME2, WRITABLE, protocol.RENAME2_IN.pack(READ_ONLY, 0) + b"a\0b\0"),
        (protocol.SETATTR, node, protocol.SETATTR_IN.pack(protocol.SET_MODE, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
    ):
        assert guest.bad(opcode, on, body) == "EROFS", opcode
    # A handle that can be read cannot be written.
    handle = guest.open(node)
    assert guest.bad(protocol.WRITE, node, protocol.WRITE_IN.pack(handle, 0, 1) + b"x") == "EBADF"
    # Nor can a read-only file be reached by a link in a share that may be written to.
    assert guest.bad(protocol.LINK, WRITABLE, protocol.LINK_IN.pack(node) + b"b\0") == "EXDEV"
    assert (folders[0] / "a").read_text() == "a"
    assert os.listdir(folders[0]) == ["a"]


def test_numbers_that_were_never_given_out(start: Start, folders: list[Path]) -> None:
    (folders[1] / "a").write_text("a")
    (folders[1] / "b").write_text("b")
    guest = start()
    a, b = guest.lookup(WRITABLE, "a"), guest.lookup(WRITABLE, "b")
    handle = guest.open(a, os.O_RDWR)
    for number in (0, 3, 4, 5, 6, 200, handle + 1, 2**31, 2**63, 2**64 - 1):
        assert guest.bad(protocol.READ, a, protocol.READ_IN.pack(number, 0, 10)) == "EBADF"
        assert guest.bad(protocol.WRITE, a, protocol.WRITE_IN.pack(number, 0, 1) + b"x") == "EBADF"
        assert guest.bad(protocol.READDIR, WRITABLE, protocol.READ_IN.pack(number, 0, 4096)) == "EBADF"
        guest.send(protocol.RELEASE, a, protocol.RELEASE_IN.pack(number))
    for number in (0, 4, 99, nodes.FIRST_ID - 1, b + 1, 2**63, 2**64 - 1):
        assert guest.bad(protocol.GETATTR, number, protocol.GETATTR_IN.pack(0, 0)) == "ESTALE"
        assert guest.bad(protocol.OPEN, number, protocol.OPEN_IN.pack(0)) == "ESTALE"
        guest.send(protocol.FORGET, number, protocol.FORGET_IN.pack(2**64 - 1))
    # A handle belongs to the file it was opened for.
    assert guest.bad(protocol.READ, b, protocol.READ_IN.pack(handle, 0, 10)) == "EBADF"
    guest.send(protocol.FORGET, 1, protocol.FORGET_IN.pack(2**64 - 1))
    guest.send(protocol.FORGET, WRITABLE, protocol.FORGET_IN.pack(2**64 - 1))
    assert guest.lookup(WRITABLE, "a") == a
    assert guest.bad(9999, WRITABLE) == "ENOSYS"
    assert guest.bad(protocol.INIT, WRITABLE, bytes(64)) == "ENOSYS"


def test_offsets_and_sizes_beyond_reason(start: Start, folders: list[Path]) -> None:
    (folders[1] / "a").write_text("abc")
    guest = start()
    node = guest.lookup(WRITABLE, "a")
    handle = guest.open(node, os.O_RDWR)
    for offset in (2**63 - 1, 2**63, 2**64 - 1):
        assert guest.bad(protocol.WRITE, node, protocol.WRITE_IN.pack(handle, offset, 1) + b"x") in ("EINVAL", "EFBIG")
        error, reply = guest.ask(protocol.READ, node, protocol.READ_IN.pack(handle, offset, 10))
        assert error in (0, errno.EINVAL)
        assert reply == b""
        set_size = protocol.SETATTR_IN.pack(protocol.SET_SIZE, 0, offset, 0, 0, 0, 0, 0, 0, 0)
        assert guest.bad(protocol.SETATTR, node, set_size) in ("EINVAL", "EFBIG", "0")
        os.truncate(folders[1] / "a", 3)
    assert guest.bad(protocol.WRITE, node, protocol.WRITE_IN.pack(handle, 0, 10) + b"x") == "EINVAL"
    assert len(guest.read(node, handle, 2**32 - 1)) == 3
    times = protocol.SETATTR_IN.pack(protocol.SET_MTIME, 0, 0, 0, 2**63 - 1, 0, 2**32 - 1, 0, 0, 0)
    assert guest.bad(protocol.SETATTR, node, times) == "EINVAL"


def test_a_file_of_many_gigabytes_is_read_in_part(start: Start, folders: list[Path]) -> None:
    with (folders[0] / "big").open("wb") as file:
        file.truncate(50 << 30)
        file.seek(40 << 30)
        file.write(b"here")
    guest = start()
    node = guest.lookup(READ_ONLY, "big")
    handle = guest.open(node)
    assert guest.read(node, handle, 8, 40 << 30) == b"here\0\0\0\0"
    lseek = protocol.LSEEK_IN.pack(handle, 0, os.SEEK_DATA)
    assert int.from_bytes(guest.good(protocol.LSEEK, node, lseek), "little") == 40 << 30
    assert guest.bad(protocol.LSEEK, node, protocol.LSEEK_IN.pack(handle, 0, 77)) == "EINVAL"


def test_writing_as_on_a_local_file_system(start: Start, folders: list[Path]) -> None:
    guest = start()
    folder = folders[1]
    reply = guest.good(protocol.CREATE, WRITABLE, create(b"a", os.O_RDWR | os.O_EXCL, 0o6640))
    node = int.from_bytes(reply[:8], "little")
    handle = int.from_bytes(reply[ENTRY_SIZE : ENTRY_SIZE + 8], "little")
    # No set-user-ID program comes from a guest.
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o640
    assert guest.bad(protocol.CREATE, WRITABLE, create(b"a", os.O_RDWR | os.O_EXCL)) == "EEXIST"
    guest.good(protocol.WRITE, node, protocol.WRITE_IN.pack(handle, 2, 3) + b"xyz")
    assert (folder / "a").read_bytes() == b"\0\0xyz"
    append = guest.open(node, os.O_WRONLY | os.O_APPEND)
    guest.good(protocol.WRITE, node, protocol.WRITE_IN.pack(append, 0, 1) + b"!")
    assert (folder / "a").read_bytes() == b"\0\0xyz!"
    guest.good(protocol.FSYNC, node, protocol.FSYNC_IN.pack(handle, 0))
    guest.good(protocol.FSYNC, node, protocol.FSYNC_IN.pack(handle, protocol.FSYNC_DATA))
    set_size = protocol.SETATTR_IN.pack(protocol.SET_SIZE | protocol.SET_FH, handle, 4, 0, 0, 0, 0, 0, 0, 0)
    guest.good(protocol.SETATTR, node, set_size)
    assert (folder / "a").read_bytes() == b"\0\0xy"
    set_mode = protocol.SETATTR_IN.pack(protocol.SET_MODE, 0, 0, 0, 0, 0, 0, 0o4755, 0, 0)
    guest.good(protocol.SETATTR, node, set_mode)
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o755
    set_times = protocol.SETATTR_IN.pack(protocol.SET_ATIME | protocol.SET_MTIME, 0, 0, -5, 7, 500, 8, 0, 0, 0)
    guest.good(protocol.SETATTR, node, set_times)
    found = (folder / "a").stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (-5 * 10**9 + 500, 7 * 10**9 + 8)
    mine = protocol.SETATTR_IN.pack(protocol.SET_UID | protocol.SET_GID, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    guest.good(protocol.SETATTR, node, mine)
    others = protocol.SETATTR_IN.pack(protocol.SET_UID, 0, 0, 0, 0, 0, 0, 0, 12345, 0)
    assert guest.bad(protocol.SETATTR, node, others) == "EPERM"
    # Open and without a name: still there.
    guest.good(protocol.UNLINK, WRITABLE, b"a\0")
    assert guest.read(node, handle) == b"\0\0xy"
    guest.good(protocol.GETATTR, node, protocol.GETATTR_IN.pack(0, 0))
    guest.good(protocol.SETATTR, node, set_mode)
    guest.send(protocol.RELEASE, node, protocol.RELEASE_IN.pack(handle))
    guest.send(protocol.RELEASE, node, protocol.RELEASE_IN.pack(append))
    assert guest.bad(protocol.GETATTR, node, protocol.GETATTR_IN.pack(0, 0)) == "ESTALE"


def test_names_come_and_go_as_on_a_local_file_system(start: Start, folders: list[Path]) -> None:
    guest = start()
    folder = folders[1]
    made = guest.good(protocol.MKDIR, WRITABLE, protocol.MKDIR_IN.pack(0o1750) + b"d\0")
    d = int.from_bytes(made[:8], "little")
    assert stat.S_IMODE((folder / "d").stat().st_mode) == 0o1750
    assert guest.bad(protocol.MKDIR, WRITABLE, protocol.MKDIR_IN.pack(0o755) + b"d\0") == "EEXIST"
    guest.good(protocol.CREATE, d, create(b"f"))
    f = guest.lookup(d, "f")
    assert guest.bad(protocol.RMDIR, WRITABLE, b"d\0") == "ENOTEMPTY"
    assert guest.bad(protocol.UNLINK, WRITABLE, b"d\0") in ("EISDIR", "EPERM")
    guest.good(protocol.SYMLINK, d, b"s\0../../..//etc\0")
    assert os.readlink(folder / "d" / "s") == "../../..//etc"
    linked = guest.good(protocol.LINK, WRITABLE, protocol.LINK_IN.pack(f) + b"hard\0")
    assert int.from_bytes(linked[:8], "little") == f
    assert (folder / "hard").stat().st_nlink == 2
    # Whatever its directory is called meanwhile, a node stays the same file.
    guest.good(protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b"d\0e\0")
    (folder / "e" / "f").write_text("moved")
    assert guest.read(f, guest.open(f)) == b"moved"
    no_replace = protocol.RENAME2_IN.pack(WRITABLE, 1)
    assert guest.bad(protocol.RENAME2, WRITABLE, no_replace + b"hard\0e\0") == "EEXIST"
    guest.good(protocol.RENAME2, WRITABLE, protocol.RENAME2_IN.pack(WRITABLE, 2) + b"hard\0e\0")
    assert (folder / "hard").is_dir() and (folder / "e").is_file()
    assert guest.bad(protocol.RENAME2, WRITABLE, protocol.RENAME2_IN.pack(WRITABLE, 4) + b"hard\0x\0") == "EINVAL"
    assert guest.bad(protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b"none\0x\0") == "ENOENT"
    assert guest.bad(protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(1) + b"hard\0x\0") == "EPERM"
    guest.good(protocol.UNLINK, WRITABLE, b"e\0")
    guest.good(protocol.GETATTR, f, protocol.GETATTR_IN.pack(0, 0))
    folder_node = guest.lookup(WRITABLE, "hard")
    assert folder_node == d
    for name in (b"f\0", b"s\0"):
        guest.good(protocol.UNLINK, d, name)
    guest.good(protocol.RMDIR, WRITABLE, b"hard\0")
    assert os.listdir(folder) == []


def test_dhgignore(start: Start, folders: list[Path]) -> None:
    folder = folders[1]
    (folder / ".dhgignore").write_text("# secrets\n.env\n*.key\n/build/\nconf/*.pem\n!conf/public.pem\n")
    for name in ("conf", "build", "sub", "sub/build", ".git"):
        (folder / name).mkdir()
    for name in (".env", "a.key", "b", "conf/x.pem", "conf/public.pem", "sub/.env", "sub/c.key", "build/o"):
        (folder / name).write_text(name)
    guest = start()
    assert sorted(guest.names(WRITABLE)) == [".dhgignore", ".git", "b", "conf", "sub"]
    assert sorted(guest.names(WRITABLE, plus=True)) == [".dhgignore", ".git", "b", "conf", "sub"]
    conf, sub = guest.lookup(WRITABLE, "conf"), guest.lookup(WRITABLE, "sub")
    assert guest.names(conf) == ["public.pem"]
    assert guest.names(sub) == ["build"]
    assert [guest.lookup(WRITABLE, name) for name in (".env", "a.key", "build")] == [0, 0, 0]
    b = guest.lookup(WRITABLE, "b")
    for opcode, node, body, wanted in (
        (protocol.CREATE, WRITABLE, create(b".env"), "EACCES"),
        (protocol.UNLINK, WRITABLE, b".env\0", "EACCES"),
        (protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b".env\0open\0", "EACCES"),
        (protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b"b\0.env\0", "EACCES"),
        (protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b"build\0open\0", "ENOENT"),
        # What is hidden by its path would come to light by another.
        (protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b"conf\0open\0", "EXDEV"),
        (protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b".dhgignore\0x\0", "EACCES"),
        (protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b"b\0.dhgignore\0", "EACCES"),
        (protocol.UNLINK, WRITABLE, b".dhgignore\0", "EACCES"),
        (protocol.LINK, WRITABLE, protocol.LINK_IN.pack(guest.lookup(WRITABLE, ".dhgignore")) + b"x\0", "EACCES"),
        (protocol.OPEN, guest.lookup(WRITABLE, ".dhgignore"), protocol.OPEN_IN.pack(os.O_RDWR), "EACCES"),
        (protocol.LINK, WRITABLE, protocol.LINK_IN.pack(b) + b"b.key\0", "EACCES"),
    ):
        assert guest.bad(opcode, node, body) == wanted, (opcode, body)
    guest.good(protocol.RENAME, WRITABLE, protocol.RENAME_IN.pack(WRITABLE) + b"b\0bb\0")
    assert (folder / "bb").read_text() == "b"


@pytest.mark.parametrize(
    ("pattern", "hidden", "shown"),
    [
        ("*.log", ["a.log", "x/y/a.log", ".log"], ["a.log2", "alog"]),
        ("/*.log", ["a.log"], ["x/a.log"]),
        ("a/b", ["a/b"], ["x/a/b", "ab", "b"]),
        ("**/b", ["b", "a/b", "a/c/b"], ["ab"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/xb"]),
        ("f?o", ["foo", "d/fxo"], ["fo", "f/o"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "[a-c]x"]),
        ("[!a-c]x", ["dx"], ["ax"]),
        ("[]x]y", ["]y", "xy"], ["zy"]),
        (r"\#x", ["#x"], ["\\#x"]),
        ("#x", [], ["#x"]),
        ("x  ", ["x"], ["x  "]),
        ("x\\ ", ["x "], ["x"]),
        ("*\n!keep", ["a"], ["keep"]),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", ["caf\N{LATIN SMALL LETTER E WITH ACUTE}"], ["cafe"]),
        ("[", ["["], ["x"]),
        ("", [], ["x"]),
        ("/", [], ["x"]),
    ],
)
def test_patterns(pattern: str, hidden: list[str], shown: list[str]) -> None:
    patterns = Patterns(pattern.encode())
    assert [path for path in hidden if not patterns.hide(path.encode(), directory=False)] == []
    assert [path for path in shown if patterns.hide(path.encode(), directory=False)] == []


def test_patterns_of_windows_editors() -> None:
    patterns = Patterns(".env\r\n/private/\r\n".encode("utf-8-sig"))
    assert patterns.hide(b".env", directory=False)
    assert patterns.hide(b"private", directory=True)
    # What follows a mark is the first pattern.
    assert not Patterns("#x".encode("utf-8-sig")).hide(b"#x", directory=False)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_patterns_in_another_encoding_are_refused(encoding: str, bom: str) -> None:
    with pytest.raises(ValueError, match="it is no text in UTF-8"):
        Patterns(f"{bom}.env\r\n".encode(encoding))


def test_a_file_of_patterns_in_utf16_shares_nothing(tmp_path: Path) -> None:
    (tmp_path / ".dhgignore").write_text(".env\n", encoding="utf-16")
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        with pytest.raises(HostError, match=r"cannot use \.dhgignore: it is no text in UTF-8; nothing is shared"):
            share_main.share(0, fd, writable=False)
    finally:
        os.close(fd)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_any_pattern_compiles_or_is_refused(pattern: bytes, path: bytes) -> None:
    try:
        Patterns(pattern).hide(path, directory=True)
    except ValueError:
        pass


def test_tables_are_bounded(start: Start, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MAX_NODES", 50)
    monkeypatch.setattr(nodes, "MAX_DIRECTORIES", 5)
    for i in range(100):
        (folders[0] / f"f{i}").touch()
    guest = start()
    known = [guest.ask(protocol.LOOKUP, READ_ONLY, b"f%d\0" % i) for i in range(100)]
    assert [error for error, _ in known].count(errno.ENFILE) == 100 - 48
    # What is looked at while listing is listed even if it cannot be remembered.
    assert len(guest.names(READ_ONLY, plus=True)) == 100
    node = int.from_bytes(known[0][1][:8], "little")
    errors = [guest.ask(protocol.OPEN, node, protocol.OPEN_IN.pack(0))[0] for _ in range(100)]
    assert errors.count(0) == 64 and set(errors[64:]) == {errno.ENFILE}
    for handle in range(1, 200):
        guest.send(protocol.RELEASE, node, protocol.RELEASE_IN.pack(handle))
    errors = [guest.ask(protocol.OPENDIR, READ_ONLY, protocol.OPEN_IN.pack(0))[0] for _ in range(10)]
    assert errors.count(0) == 5
    for _, reply in known[:48]:
        guest.send(protocol.FORGET, int.from_bytes(reply[:8], "little"), protocol.FORGET_IN.pack(9))
    guest.ahead.clear()
    f99 = guest.lookup(READ_ONLY, "f99")
    assert f99
    # If "f0", which was opened, happens to be listed just before "f99", those listed after it are sent ahead.
    assert set(guest.server.tables.nodes) == {READ_ONLY, WRITABLE, f99} | {file.node for file in sent(guest)}


def test_a_number_that_is_given_out_again_is_another_file(start: Start, folders: list[Path]) -> None:
    (folders[0] / "a").write_text("a")
    guest = start()
    a = guest.lookup(READ_ONLY, "a")
    # To the server as if "a" had been removed, and "b" had got its inode.
    os.rename(folders[0] / "a", folders[0] / "b")
    b = guest.lookup(READ_ONLY, "b")
    assert b != a
    (folders[0] / "a").write_text("another")
    assert guest.bad(protocol.OPEN, a, protocol.OPEN_IN.pack(0)) == "ESTALE"
    assert guest.read(b, guest.open(b)) == b"a"
    for node in (a, b):
        guest.send(protocol.FORGET, node, protocol.FORGET_IN.pack(1))
    assert guest.lookup(READ_ONLY, "b") not in (a, b)
    # With several links it is known by all of its names.
    os.link(folders[0] / "b", folders[0] / "c")
    assert guest.lookup(READ_ONLY, "b") == guest.lookup(READ_ONLY, "c")


def test_nodes_in_a_circle_end(start: Start, folders: list[Path]) -> None:
    (folders[1] / "a" / "b").mkdir(parents=True)
    guest = start()
    a = guest.lookup(WRITABLE, "a")
    b = guest.lookup(a, "b")
    # Moved on the host: b to the top, a into b; the guest learns of the second only.
    os.rename(folders[1] / "a" / "b", folders[1] / "b")
    os.rename(folders[1] / "a", folders[1] / "b" / "a")
    top = guest.lookup(WRITABLE, "b")
    assert top == b
    assert guest.lookup(b, "a") == a
    (folders[1] / "b" / "a" / "f").touch()
    assert guest.lookup(a, "f")
    os.rename(folders[1] / "b" / "a", folders[1] / "a")
    os.rename(folders[1] / "b", folders[1] / "a" / "b")
    assert guest.bad(protocol.LOOKUP, a, b"b\0") in ("ESTALE", "0", "ENOENT")
    assert guest.lookup(WRITABLE, "a") == a


OPCODES = st.one_of(st.sampled_from([*range(1, 52), protocol.SEEN, protocol.USED]), st.integers(0, 2**32 - 1))
NODES = st.one_of(st.integers(0, 4), st.integers(nodes.FIRST_ID, nodes.FIRST_ID + 6), st.integers(0, 2**64 - 1))
NAMES = st.sampled_from([b"a", b"b", b"d", b"f", b"..", b"", b"d/f", b"l", b"new", b"x" * 300])
WORDS = st.one_of(st.integers(0, 8), st.integers(0, 2**64 - 1), st.sampled_from([2**63, 2**32 - 1, os.O_RDWR]))
BODIES = st.one_of(
    st.binary(max_size=120),
    st.tuples(st.lists(WORDS, max_size=11), st.lists(NAMES, max_size=2), st.binary(max_size=8)).map(
        lambda parts: (
            b"".join(word.to_bytes(8, "little") for word in parts[0])
            + b"".join(name + b"\0" for name in parts[1])
            + parts[2]
        )
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(OPCODES, NODES, BODIES), max_size=40))
def test_any_request_gets_one_reply_and_nothing_outside_changes(
    tmp_path: Path, requests: list[tuple[int, int, bytes]]
) -> None:
    """Well-formed messages with hostile contents: every one is answered, with an error where it makes no sense."""
    for name in ("ro", "rw"):
        os.makedirs(tmp_path / name / "d", exist_ok=True)
        (tmp_path / name / "a").write_text("a")
        (tmp_path / name / "d" / "f").write_text("f")
        if not os.path.lexists(tmp_path / name / "l"):
            os.symlink(tmp_path, tmp_path / name / "l")
    (tmp_path / "outside").write_text("outside")
    before = len(os.listdir("/proc/self/fd"))
    guest = Guest([(tmp_path / "ro", False), (tmp_path / "rw", True)])
    try:
        for share in (READ_ONLY, WRITABLE):
            for known in (b"a", b"d", b"l"):
                guest.ask(protocol.LOOKUP, share, known + b"\0")
        for opcode, node, body in requests:
            if opcode in protocol.ONE_WAY:
                guest.send(opcode, node, body)
            else:
                guest.ask(opcode, node, body)
        guest.good(protocol.GETATTR, 1, protocol.GETATTR_IN.pack(0, 0))
    finally:
        guest.close()
    assert guest.broken is None
    assert len(os.listdir("/proc/self/fd")) == before
    assert sorted(os.listdir(tmp_path)) == ["outside", "ro", "rw"]
    assert (tmp_path / "outside").read_text() == "outside"
    assert (tmp_path / "ro" / "a").read_text() == "a"
    assert sorted(os.listdir(tmp_path / "ro")) == ["a", "d", "l"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_any_bytes_end_in_replies_or_a_closed_channel(tmp_path: Path, data: bytes) -> None:
    guest = Guest([(tmp_path, False)])
    guest.socket.sendall(data)
    guest.socket.shutdown(socket.SHUT_WR)
    while guest.socket.recv(65536):
        pass
    guest.close()
    assert guest.broken is None or isinstance(guest.broken, Broken)


@pytest.mark.parametrize("length", [0, 1, 39, protocol.MAX_MESSAGE + 1, 2**32 - 1])
def test_a_length_that_cannot_be_ends_the_connection(start: Start, length: int) -> None:
    guest = start()
    guest.socket.sendall(Struct("<I36x").pack(length))
    assert guest.socket.recv(1) == b""
    assert isinstance(guest.broken, Broken)
