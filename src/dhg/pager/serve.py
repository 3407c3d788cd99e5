"""Serving: answers page faults, fills memory ahead of them, and honours what the VMM gives back.

Each page of guest memory is in one of three states, kept in a table of one byte a page:

    MISSING  not there yet: its content is that of the memory file
    FILLED   put there by us, once
    REMOVED  given back by the VMM at some time (a balloon: madvise(MADV_DONTNEED)): from then on zeros, whatever the file has

A page becomes FILLED only after the kernel has said that it is there, and never goes back to MISSING: so no page is copied
twice, and none gets old content after it was removed. A fault on a page that is not MISSING is answered with a zero page, which
the kernel refuses (EEXIST) if the page is there after all; then whoever waits is woken. That is needed: between our reading a
REMOVE and the kernel's dropping the page it is still there, and both may happen.

The kernel refuses to fill (EAGAIN) while a removal is announced and not read. Reading it lets the remover go on; so the table is
changed before anything else is filled, and no other thread of ours may be about to fill while events are read (`_Gate`).
"""

from __future__ import annotations

import errno
import os
import select
import time
from _collections import deque
from _thread import LockType, allocate_lock, start_new_thread

from ..errors import MachineError, SnapshotError
from . import uffd
from .handshake import Peer
from .source import Source
from .workingset import Range

# Not `threading`, `collections`, `typing`: the VMM waits while this is imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MISSING, FILLED, REMOVED = 0, 1, 2
_FILLED, _REMOVED = bytes([FILLED]), bytes([REMOVED])

#: What of a chunk is filled before whoever faulted goes on. The rest follows while it runs, unless another fault comes first.
FIRST = 64 << 10
#: How much of the rest is filled between two looks for faults.
REST = 256 << 10
#: The most that one ioctl fills: larger ones keep others of the VMM from changing its mappings for longer, and gain nothing.
STEP = 2 << 20
#: How long to wait for the event that an EAGAIN is about. It may have been read already, and the remover not have run since.
RETRY_MS = 1


class _VmmGone(Exception):
    """The VMM has ended: nothing is left to serve."""


class Memory:
    """The table of a region's pages, and where they are."""

    __slots__ = ("address", "end", "offset", "page_size", "pages", "state")

    def __init__(self, address: int, size: int, offset: int, page_size: int) -> None:
        self.address = address
        self.end = address + size
        self.offset = offset
        self.page_size = page_size
        self.pages = size // page_size
        self.state = bytearray(self.pages)

    def missing(self, first: int, last: int) -> tuple[int, int]:
        """The first run of MISSING pages in [first, last); (last, last) if there is none."""
        start = self.state.find(MISSING, first, last)
        if start < 0:
            return last, last
        ends = [at for at in (self.state.find(_FILLED, start, last), self.state.find(_REMOVED, start, last)) if at >= 0]
        return start, min(ends, default=last)


#: Pages of a region: the first one, and the one after the last.
Place = tuple[Memory, int, int]


def _portions(places: Iterator[Place]) -> Iterator[list[Place]]:
    """What a thread takes at a time: places of about STEP bytes, none of them longer than that."""
    portion: list[Place] = []
    size = 0
    for memory, first, last in places:
        step = max(1, STEP // memory.page_size)
        for at in range(first, last, step):
            end = min(at + step, last)
            portion.append((memory, at, end))
            size += (end - at) * memory.page_size
            if size >= STEP:
                yield portion
                portion, size = [], 0
    if portion:
        yield portion


class _Gate:
    """Lets threads fill side by side, and one thread read events while none does."""

    def __init__(self) -> None:
        #: Held by whoever comes in, and by the reader from `close` to `open`.
        self._door = allocate_lock()
        self._count = allocate_lock()
        self._filling = 0
        #: Held from the first who comes in until the last one leaves, and by the reader.
        self._room = allocate_lock()

    def enter(self) -> None:
        with self._door, self._count:
            self._filling += 1
            if self._filling == 1:
                self._room.acquire()

    def leave(self) -> None:
        with self._count:
            self._filling -= 1
            if self._filling == 0:
                self._room.release()

    def close(self) -> None:
        self._door.acquire()
        self._room.acquire()

    def open(self) -> None:
        self._room.release()
        self._door.release()


class Pager:
    """Serves the memory of one VMM.

    `chunk` is how many bytes around a fault are filled (a power of two, at least a page); chunks are aligned within the region
    and end with it. `touched`, where it is a set, gets the number of each faulting page in the file. `counts` says what was done.
    """

    def __init__(self, peer: Peer, source: Source, *, chunk: int = STEP, touched: set[int] | None = None) -> None:
        self._uffd = peer.uffd
        self._pidfd = peer.pidfd
        self._source = source
        self._touched = touched
        self._chunk = chunk
        self.memories = [Memory(item.address, item.size, item.offset, item.page_size) for item in peer.regions]
        self.counts = {"faults": 0, "fills": 0, "copied": 0, "zeroed": 0, "removed": 0, "retries": 0}
        self._faults: deque[int] = deque()
        #: Rests of chunks, as (region, first page, last page), oldest first.
        self._rests: deque[tuple[Memory, int, int]] = deque()
        self._poller = select.poll()
        self._poller.register(self._uffd, select.POLLIN)
        self._poller.register(self._pidfd, select.POLLIN)
        self._gate: _Gate | None = None
        self._blank = source.blank(max(memory.page_size for memory in self.memories))

    def run(self, ahead: Iterator[object] | None = None) -> None:
        """Serve until the VMM ends. `ahead` is work to be done between faults, a bit with each step (`fill_set`, `fill_all`).

        Raises `SnapshotError` if the memory file cannot be read any more, `MachineError` for what should not happen.
        """
        try:
            while True:
                self._read(0 if self._faults or self._rests or ahead else None)
                if self._faults:
                    self._fault(self._faults.popleft())
                elif ahead:
                    # Before the rests of chunks: the guest waits for it to be done.
                    if next(ahead, self) is self:
                        ahead = None
                elif self._rests:
                    self._rest()
        except _VmmGone:
            return

    def fill_set(self, ranges: list[Range], threads: int) -> Iterator[None]:
        """Work for `run`: fill ranges of the file's pages, in `threads` threads, while this one goes on to serve."""
        # All of it is asked for before any is needed: the disk sees a deep queue, in order.
        for first, count in ranges:
            self._source.will_need(first * uffd.PAGE, count * uffd.PAGE)
        return self._fill_ahead(_portions(self._places(ranges)), threads)

    def fill_all(self, threads: int) -> Iterator[None]:
        """Work for `run`: fill everything."""
        whole = ((memory, 0, memory.pages) for memory in self.memories)
        return self._fill_ahead(_portions(whole), threads)

    def _places(self, ranges: list[Range]) -> Iterator[Place]:
        """Where ranges of the file's pages are in the regions."""
        for first, count in ranges:
            for memory in self.memories:
                start = max(first * uffd.PAGE, memory.offset) - memory.offset
                end = min((first + count) * uffd.PAGE, memory.offset + memory.end - memory.address) - memory.offset
                if start < end:
                    yield memory, start // memory.page_size, -(-end // memory.page_size)

    def _fill_ahead(self, portions: Iterator[list[Place]], threads: int) -> Iterator[None]:
        lock = allocate_lock()
        failed: list[BaseException] = []
        gate = self._gate = _Gate()

        def work(done: LockType) -> None:
            try:
                while not failed:
                    with lock:
                        portion = next(portions, None)
                    if portion is None:
                        return
                    for place in portion:
                        self._fill(*place, gate=gate)
            except BaseException as error:
                failed.append(error)
            finally:
                done.release()

        workers = [allocate_lock() for _ in range(threads)]
        for done in workers:
            done.acquire()
            start_new_thread(work, (done,))
        for done in workers:
            while not done.acquire(timeout=RETRY_MS / 1000):
                yield
        self._gate = None
        if failed:
            raise failed[0]

    def _read(self, timeout_ms: int | None) -> None:
        """Take what has come: removals into the table at once, faults to be answered later. Raises `_VmmGone`."""
        for fd, _ in self._poller.poll(timeout_ms):
            if fd == self._pidfd:
                raise _VmmGone
            gate = self._gate
            if gate:
                gate.close()
            try:
                messages = uffd.read(self._uffd)
                for event, first, second in messages:
                    if event in (uffd.EVENT_REMOVE, uffd.EVENT_UNMAP):
                        self._removed(first, second)
            finally:
                if gate:
                    gate.open()
            for event, _, address in messages:
                if event == uffd.EVENT_PAGEFAULT:
                    self._faults.append(address)
                elif event not in (uffd.EVENT_REMOVE, uffd.EVENT_UNMAP):
                    raise MachineError(f"the VMM does with its memory what cannot be followed (event {event:#x})")

    def _removed(self, start: int, end: int) -> None:
        for memory in self.memories:
            low, high = max(start, memory.address), min(end, memory.end)
            if low < high:
                # Whole pages: the kernel drops no part of one.
                first, last = (
                    (low - memory.address) // memory.page_size,
                    -(-(high - memory.address) // memory.page_size),
                )
                memory.state[first:last] = _REMOVED * (last - first)
                self.counts["removed"] += high - low

    def _fault(self, address: int) -> None:
        memory = next((item for item in self.memories if item.address <= address < item.end), None)
        if memory is None:
            raise MachineError(f"a fault at {address:#x}, which is in no region")
        self.counts["faults"] += 1
        page = (address - memory.address) // memory.page_size
        if self._touched is not None:
            self._touched.add((memory.offset + page * memory.page_size) // uffd.PAGE)
        if memory.state[page] == MISSING:
            first, last = self._around(memory, page, self._chunk)
            near = self._around(memory, page, min(FIRST, self._chunk))
            if self._chunk > FIRST:
                self._source.will_need(memory.offset + first * memory.page_size, self._chunk)
                self._rests.append((memory, first, last))
            self._fill(memory, *near)
            if memory.state[page] == FILLED:
                return
        self._zero_again(memory, page)

    @staticmethod
    def _around(memory: Memory, page: int, size: int) -> tuple[int, int]:
        """The pages of the aligned piece of `size` bytes that a page is in."""
        count = max(1, size // memory.page_size)
        first = page // count * count
        return first, min(first + count, memory.pages)

    def _rest(self) -> None:
        memory, first, last = self._rests.popleft()
        count = max(1, REST // memory.page_size)
        at, _ = memory.missing(first, last)
        if at < last:
            self._rests.appendleft((memory, at, last))
            self._fill(memory, at, min(at + count, last))

    def _zero_again(self, memory: Memory, page: int) -> None:
        """Answer a fault on a page that is there, or was removed."""
        at, size = memory.address + page * memory.page_size, memory.page_size
        while (done := self._zero(memory, at, size)) != size:
            if done == -errno.EEXIST:
                uffd.wake(self._uffd, at, size)
                return
            self._again(done)
        self.counts["zeroed"] += size

    def _fill(self, memory: Memory, first: int, last: int, *, gate: _Gate | None = None) -> None:
        """Fill every MISSING page in [first, last). `gate` is given in threads other than the one that reads events."""
        at = first
        while True:
            if gate:
                gate.enter()
            try:
                # Looked up anew after each call: what was MISSING may have been removed or filled by another thread.
                at, end = memory.missing(at, last)
                if at == last:
                    return
                at, done = self._fill_run(memory, at, end)
            finally:
                if gate:
                    gate.leave()
            if done < 0:
                self._again(done, gate=gate)

    def _fill_run(self, memory: Memory, at: int, end: int) -> tuple[int, int]:
        """One call for a run of MISSING pages. Returns where to go on, and what the kernel said if it was no success."""
        size = memory.page_size
        start = memory.offset + at * size
        limit = memory.offset + end * size
        first, last = self._source.data(start, limit)
        hole = first > start and size == uffd.PAGE
        length = min((first if hole else last if size == uffd.PAGE else limit) - start, STEP if size <= STEP else size)
        to = memory.address + at * size
        source = self._source.address + start
        done = uffd.zero(self._uffd, to, length) if hole else uffd.copy(self._uffd, to, source, length)
        if done > 0:
            pages = done // size
            memory.state[at : at + pages] = _FILLED * pages
            self.counts["fills"] += 1
            self.counts["zeroed" if hole else "copied"] += done
            return at + pages, 0
        if done == -errno.EEXIST:
            # Another thread of ours was quicker, and has not noted it yet. Whoever waits for it may wait for us to say so.
            memory.state[at] = FILLED
            uffd.wake(self._uffd, to, size)
            return at + 1, 0
        return at, done

    def _zero(self, memory: Memory, to: int, size: int) -> int:
        if memory.page_size == uffd.PAGE:
            return uffd.zero(self._uffd, to, size)
        return uffd.copy(self._uffd, to, self._blank, size)

    def _again(self, done: int, *, gate: _Gate | None = None) -> None:
        """After a call that failed with `-done`: returns when it is to be tried again, raises if there is no use in it."""
        if done == -errno.EAGAIN:
            self.counts["retries"] += 1
            if gate:
                # Another thread reads the event.
                time.sleep(RETRY_MS / 1000)
            else:
                self._read(RETRY_MS)
            return
        if done == -errno.ESRCH:
            raise _VmmGone
        if done == -errno.EFAULT:
            raise SnapshotError(
                "the memory file cannot be read where it could before: it has been truncated, or the disk fails"
            )
        if done == -errno.ENOENT and self._ends():
            raise _VmmGone
        raise MachineError(f"userfaultfd: {os.strerror(-done)}")

    def _ends(self) -> bool:
        """Whether the VMM is on its way out: its mappings go before it does."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(1000))
