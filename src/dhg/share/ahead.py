"""Reading ahead: files that will be asked for next go to the guest before they are, with the answer to another request.

Where the files of a directory are being looked up or opened one after the other, the next ones are sent along: name, attributes, an
open handle, the content. The guest's relay keeps them for AHEAD_S at most and answers from them; it says so by SEEN and USED, with
the next request, so that whenever a request is being answered it is known here what the relay has: a record is whole here exactly as
long as it is there. Hence a record can be taken back (DROP) before anything that contradicts it is said: other attributes, a file
that the guest has changed or opened, a name that is no more.

What one request can cause is bounded: AHEAD_WINDOW files, AHEAD_BYTES of content, a listing of MAX_LISTED names.
"""

from __future__ import annotations

import os
import time
from stat import S_IFREG, S_ISREG

from . import beneath, nodes
from .nodes import NEVER, Handle, Node, Share, Tables, hidden, reopen, version_of
from .protocol import (
    AHEAD,
    AHEAD_BYTES,
    AHEAD_COUNT,
    AHEAD_OUT,
    AHEAD_S,
    AHEAD_WINDOW,
    DROP,
    KEEP_CACHE,
    NOTIFY_STORE,
    OPEN_OUT,
    OUT,
    SMALL,
    STORE_OUT,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .nodes import Version

#: Of a directory with more entries, only the first ones are sent ahead.
MAX_LISTED = 1 << 13
#: A listing is made anew for a name that is not in it, but not more often than this.
LISTING_S = 1.0
#: Directories (and kinds of files in them) about which it is remembered how they are read.
MAX_STREAMS = 16
#: Records that the relay may hold.
MAX_RECORDS = 2 * AHEAD_WINDOW
#: So many names may be left out and it is still one after the other.
GAP = 3
FIRST_WINDOW = 4
#: A file may change twice within one tick of the clock by which the kernel notes it: one that has just changed is not sent ahead.
TICK_NS = 20_000_000
#: The same where times are whole seconds: those file systems have steps of up to two (FAT).
COARSE_TICK_NS = 2_000_000_000


class Record:
    """A file that the relay has: its name if it has not been `seen`, open if it has a `handle`."""

    __slots__ = ("handle", "node", "place", "seen", "since", "size", "stream", "touched", "version")

    def __init__(self, node: Node, place: tuple[int, bytes], stream: Stream, version: Version) -> None:
        self.node = node
        self.place = place
        self.stream = stream
        self.version = version
        self.since = time.monotonic()
        self.handle = self.size = 0
        self.seen = self.touched = False


class Stream:
    """How the files of one directory that end alike are being asked for."""

    __slots__ = (
        "gap",
        "last",
        "listed",
        "opened",
        "order",
        "orders",
        "runs",
        "sent",
        "since",
        "step",
        "touched",
        "wasted",
        "window",
    )

    def __init__(self) -> None:
        #: The name that was asked for last.
        self.last = b""
        #: Whether files are opened, and not only looked up.
        self.opened = False
        #: Orders in which names may come, each with the position of each name; for how long they have come in it; the likeliest.
        self.orders: list[tuple[list[bytes], dict[bytes, int]]] = []
        self.runs = [0, 0, 0]
        self.order = 0
        #: The distance of the last two names in it; that of the next ones.
        self.gap = self.step = 1
        self.listed = 0.0
        #: How many to send next; of those that were sent last, how many were wanted.
        self.window, self.sent, self.touched = 0, 0, 0
        self.since = 0.0
        #: Files in a row that were opened when they were looked up, without that it was wanted.
        self.wasted = 0

    def set_names(self, names: list[bytes]) -> None:
        """The names there are, as the directory lists them."""
        self.listed = time.monotonic()
        # As it is listed, sorted, and sorted with the shorter first: 9 before 10.
        orders = (names, sorted(names), sorted(names, key=lambda name: (len(name), name)))
        self.orders = [(order, {name: at for at, name in enumerate(order)}) for order in orders]

    def follows(self, last: bytes, name: bytes) -> bool:
        """Whether names come one after the other, `name` having come after `last`."""
        gaps = []
        for number, (_, at) in enumerate(self.orders):
            here, there = at.get(last), at.get(name)
            gap = there - here if here is not None and there is not None else 0
            self.runs[number] = self.runs[number] + 1 if 0 < gap <= GAP else 0
            gaps.append(gap)
        self.order = max(range(len(gaps)), key=lambda number: (self.runs[number], -gaps[number]))
        # What is only looked up may be looked up for anything; and names are near each other by chance, too.
        run, gap = self.runs[self.order], gaps[self.order]
        self.step = gap if gap == self.gap else 1
        self.gap = max(gap, 1)
        return run > 1 + (not self.opened) or (run == 1 and gap == 1 and self.opened)

    def after(self, name: bytes) -> list[bytes]:
        """The names that come next, as many as are to be sent: twice as many as last time if those were wanted.

        Not more than are likely to be asked for while they may be used, which on a busy machine is not many.
        """
        now, touched = time.monotonic(), self.touched
        if not self.window:
            self.window = FIRST_WINDOW
        elif self.sent and self.touched * 4 >= self.sent * 3:
            self.window = min(self.window * 2, AHEAD_WINDOW)
        elif self.touched * 2 < self.sent:
            self.window = max(self.window // 2, 1)
        if touched and now > self.since:
            self.window = min(self.window, max(1, int(touched / (now - self.since) * AHEAD_S / 2)))
        self.sent, self.touched, self.since = 0, 0, now
        order, positions = self.orders[self.order]
        at = positions[name] + self.step
        return order[at : at + self.window * self.step : self.step]


class Ahead:
    """What the relay has. `send` sends a message before the reply that is being made; `entry` packs one of a LOOKUP."""

    def __init__(
        self, tables: Tables, *, send: Callable[[bytes], None], entry: Callable[[Node, os.stat_result], bytes]
    ) -> None:
        self._tables = tables
        self._send = send
        self._entry = entry
        #: By the number of their nodes, and by directory and name; the oldest first.
        self._records: dict[int, Record] = {}
        self._places: dict[tuple[int, bytes], Record] = {}
        self._size = 0
        #: By directory and ending, the one that was used last at the end.
        self._streams: dict[tuple[int, bytes], Stream] = {}

    # What the guest asks for.

    def looked_up(self, parent: Node, name: bytes, node: Node, found: os.stat_result) -> None:
        """A file was looked up, and the reply will say `found` of it."""
        stream = self._stream(parent.id, name)
        self._drop_old()
        if (
            stream.opened
            and stream.wasted < AHEAD_COUNT
            and node.id not in self._records
            and len(self._records) < MAX_RECORDS
        ):
            stream.wasted += 1
            self._send_one(stream, parent, name, looked=(node, version_of(found)))
        self._go_on(stream, parent, name)

    def opened(self, node: Node) -> None:
        """A file was opened to be read, and the relay did not have it."""
        if node.parent is None:
            return
        stream = self._stream(node.parent.id, node.name)
        stream.opened = True
        stream.wasted = 0
        self._go_on(stream, node.parent, node.name)

    def seen(self, node_id: int) -> None:
        """The relay has answered the LOOKUP of one it had."""
        record = self._records.get(node_id)
        if record is None:
            return
        if record.seen:
            # Once more: the guest's kernel has dropped the name and asked again.
            record.node.lookups += 1
            return
        record.seen = True
        record.node.told = record.version
        self._touch(record)
        if not record.handle:
            self._remove(record)

    def used(self, number: int, node_id: int) -> None:
        """The relay has answered the OPEN of one it had, which stays open."""
        record = self._records.get(node_id)
        if record is None or not number or record.handle != number:
            return
        record.node.version = record.version
        record.stream.opened = True
        record.stream.wasted = 0
        self._touch(record)
        self._remove(record)
        if not record.seen:
            self._tables.forget(node_id, 1)

    # What makes a record untrue.

    def tell(self, node: Node, found: os.stat_result) -> None:
        """The guest is about to be told attributes of a node."""
        node.told = version_of(found)
        record = self._records.get(node.id)
        if record is not None and record.version != node.told:
            self.drop(record)

    def changed(self, node: Node) -> None:
        """The guest changes a file, or opens it otherwise."""
        self.drop(self._records.get(node.id))

    def renamed(self, parent: Node, name: bytes) -> None:
        """The guest makes, removes or moves a name."""
        self.drop(self._places.get((parent.id, name)))

    def named(self, parent: Node, name: bytes, node: Node | None) -> None:
        """The guest is about to be told which file a name means, or that it means none."""
        record = self._places.get((parent.id, name))
        if record is not None and record.node is not node:
            self.drop(record)

    def written(self, share: Share) -> None:
        """The guest writes to a share: others may show the same files."""
        if self._records:
            self.drop(*[record for record in self._records.values() if record.node.share is not share])

    def drop(self, *records: Record | None) -> None:
        """Take records back from the relay."""
        ids = b""
        for record in records:
            if record is None:
                continue
            ids += record.node.id.to_bytes(8, "little")
            self._remove(record)
            if record.handle in self._tables.handles:
                self._tables.close(record.handle, record.node.id)
            if not record.seen:
                self._tables.forget(record.node.id, 1)
        if ids:
            self._send(OUT.pack(OUT.size + len(ids), DROP, 0) + ids)

    def drop_all(self) -> None:
        """Take all of them back."""
        self.drop(*list(self._records.values()))

    def _drop_old(self) -> None:
        """Take back what is too old to be used."""
        now = time.monotonic()
        old = []
        for record in self._records.values():
            if now - record.since <= AHEAD_S:
                break
            old.append(record)
        self.drop(*old)

    def _remove(self, record: Record) -> None:
        del self._records[record.node.id]
        del self._places[record.place]
        self._size -= record.size

    # Sending.

    def _touch(self, record: Record) -> None:
        if not record.touched:
            record.touched = True
            record.stream.touched += 1
            record.stream.last = record.place[1]

    def _stream(self, directory: int, name: bytes) -> Stream:
        key = directory, ending(name)
        stream = self._streams.pop(key, None) or Stream()
        self._streams[key] = stream
        if len(self._streams) > MAX_STREAMS:
            del self._streams[next(iter(self._streams))]
        return stream

    def _go_on(self, stream: Stream, parent: Node, name: bytes) -> None:
        last, now = stream.last, time.monotonic()
        if name == last:
            return
        stream.last = name
        if not last:
            return
        if not stream.orders or (name not in stream.orders[0][1] and now - stream.listed > LISTING_S):
            stream.set_names(self._list(parent, name))
        if not stream.follows(last, name):
            return
        self._drop_old()
        for following in stream.after(name):
            if (parent.id, following) not in self._places and len(self._records) < MAX_RECORDS:
                stream.sent += self._send_one(stream, parent, following)

    def _list(self, parent: Node, like: bytes) -> list[bytes]:
        """The files in a directory that end as `like` does."""
        end = ending(like)
        names: list[bytes] = []
        try:
            fd, _ = self._tables.resolve(parent)
            try:
                real = reopen(fd, os.O_RDONLY | os.O_DIRECTORY)
            finally:
                os.close(fd)
            try:
                directory, at, count = beneath.Directory(real), 0, 0
                while count < MAX_LISTED and (entries := directory.entries(at)):
                    count += len(entries)
                    at = entries[-1][1]
                    # 0: a file system that does not say what they are.
                    names += [e[4] for e in entries if e[3] in (0, S_IFREG >> 12) and ending(e[4]) == end]
                    directory.given(len(entries))
            finally:
                os.close(real)
        except OSError:
            pass
        return names

    def _send_one(
        self, stream: Stream, parent: Node, name: bytes, *, looked: tuple[Node, Version] | None = None
    ) -> bool:
        """Send a file, if it is one that can be; `looked` is what the guest is being told of it anyway."""
        tables = self._tables
        told = looked[1] if looked else None
        if hidden(parent, name, directory=False) or len(tables.nodes) >= nodes.MAX_NODES // 2:
            return False
        try:
            fd = beneath.find(parent.share.fd, parent.below(name))
        except OSError:
            return False  # whoever asks for it will be told
        try:
            found = os.fstat(fd)
            version = version_of(found)
            # With several links it could be changed by another name.
            if not S_ISREG(found.st_mode) or found.st_nlink != 1 or not settled(found):
                return False
            node = tables.find(parent, name, found)
            if looked and node is not looked[0]:
                return False  # the name means another file by now
            if node is not None and (
                # One that is open may have pages that are being read, for which NOTIFY_STORE would wait.
                node.open
                or node.id in self._records
                # Content would not fit what the guest's kernel takes for its size.
                or (told or version) != version
                or (told is None and node.told not in (NEVER, version))
            ):
                return False
            real, store = self._content(fd, found, node) if stream.opened else (-1, b"")
        except OSError:
            return False
        finally:
            os.close(fd)
        if real < 0 and told is not None:
            return False
        # Another file had the name.
        self.drop(self._places.get((parent.id, name)))
        if told is None:
            node = tables.see(parent, name, found)
        assert node is not None
        record = Record(node, (parent.id, name), stream, version)
        record.seen = told is not None
        key = parent.id.to_bytes(8, "little") + name + b"\0"
        reply = bytes(OPEN_OUT.size)
        if real >= 0:
            record.handle = tables.open(Handle(real, node))
            reply = OPEN_OUT.pack(record.handle, KEEP_CACHE)
            if store:
                record.size = len(store)
                store = (
                    OUT.pack(OUT.size + STORE_OUT.size + len(store), NOTIFY_STORE, 0)
                    + STORE_OUT.pack(node.id, 0, len(store))
                    + store
                )
        self._records[node.id] = self._places[record.place] = record
        self._size += record.size
        body = AHEAD_OUT.pack(len(key)) + self._entry(node, found) + reply + key + store
        self._send(OUT.pack(OUT.size + len(body), AHEAD, 0) + body)
        return True

    def _content(self, fd: int, found: os.stat_result, node: Node | None) -> tuple[int, bytes]:
        """A descriptor to read a file and, unless the guest has it, its content; -1 if it is not to be opened ahead."""
        size = found.st_size
        tables = self._tables
        if size > SMALL or self._size + size > AHEAD_BYTES or len(tables.handles) * 2 >= tables.max_handles:
            return -1, b""
        real = reopen(fd, os.O_RDONLY)
        if node is not None and node.version == version_of(found):
            return real, b""
        try:
            data = os.pread(real, size, 0)
            same = len(data) == size and version_of(os.fstat(real)) == version_of(found)
        except OSError:
            same = False
        if not same:
            os.close(real)
            raise OSError
        return real, data


def ending(name: bytes) -> bytes:
    """By what files of one kind are told from others beside them."""
    dot = name.rfind(b".")
    return name[dot:] if dot > 0 and name[dot + 1 : dot + 2].isalpha() else b""


def settled(found: os.stat_result) -> bool:
    """Whether a file's times say so if it is changed from now on."""
    latest = max(found.st_ctime_ns, found.st_mtime_ns)
    return time.time_ns() - latest > (TICK_NS if latest % 1_000_000_000 else COARSE_TICK_NS)
