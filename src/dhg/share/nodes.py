"""What the server knows: shares, the nodes that a guest has looked up, the handles it has open. All of it bounded.

A node stands for a file by its identity (device, inode, type) and remembers a name under which it was seen. Numbers that
the guest sends are keys of these tables and nothing else. To get at a file its name is resolved anew, beneath the share's directory,
and must lead to the same identity: a name that meanwhile is another file's is stale, and the guest looks it up again.
"""

from __future__ import annotations

import errno
import os
from stat import S_IFDIR, S_IFMT

from . import beneath

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ignore import Patterns

    Version = tuple[int, int, int]

#: Some 120 MB of ours at most. The guest's kernel forgets nodes when its own memory runs short.
MAX_NODES = 1 << 18
MAX_HANDLES = 4096
MAX_DIRECTORIES = 512
#: Directories one in the other; a path of more has more than PATH_MAX characters.
MAX_DEPTH = 2048
#: Names that are remembered of a file with several links.
MAX_NAMES = 8

#: The version of a file that has not been looked at.
NEVER: Version = (-1, -1, -1)

ROOT_ID = 1
FIRST_SHARE_ID = 2
FIRST_ID = 1 << 16


def refuse(number: int) -> OSError:
    """The error to raise for an errno."""
    return OSError(number, "")


class Share:
    """One directory of the host's: an open descriptor of it, and what the guest may do there."""

    __slots__ = ("fd", "guard", "number", "patterns", "writable")

    def __init__(self, number: int, fd: int, *, writable: bool, patterns: Patterns | None = None) -> None:
        self.number = number
        self.fd = fd
        self.writable = writable
        #: What .dhgignore hides.
        self.patterns = patterns
        #: The identity of .dhgignore itself, which the guest must not change.
        self.guard = (-1, -1)


class Node:
    """A file that the guest's kernel knows: `lookups` is how often it was told, `children` how many nodes are named in it."""

    __slots__ = (
        "children",
        "id",
        "identity",
        "lookups",
        "name",
        "open",
        "others",
        "parent",
        "share",
        "told",
        "version",
    )

    def __init__(self, number: int, share: Share, identity: tuple[int, int, int, int]) -> None:
        self.id = number
        self.share = share
        self.identity = identity
        self.parent: Node | None = None
        self.name = b"."
        #: Further names of a file with several links.
        self.others: list[tuple[Node, bytes]] = []
        self.lookups = 0
        self.children = 0
        #: Open handles, by which a file is found that has no name any more.
        self.open: list[Handle] = []
        #: Times and size as the guest's kernel was told them last.
        self.told = NEVER
        #: Times and size when the guest last opened it: unchanged, its cache is good.
        self.version = NEVER

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return self.identity[3] == S_IFDIR

    def path(self) -> bytes:
        """Its path beneath the share. Raises `OSError` where names lead in a circle, which a move on the host can make of them."""
        parts: list[bytes] = []
        node = self
        while node.parent is not None:
            parts.append(node.name)
            node = node.parent
            if len(parts) > MAX_DEPTH:
                raise refuse(errno.ESTALE)
        if not parts:
            return b"."
        parts.reverse()
        return b"/".join(parts)

    def below(self, name: bytes) -> bytes:
        """The path of `name` in it."""
        return name if self.parent is None else self.path() + b"/" + name


class Handle:
    """An open file or directory."""

    __slots__ = ("directory", "fd", "node", "writable")

    def __init__(self, fd: int, node: Node, *, writable: bool = False, directory: bool = False) -> None:
        self.fd = fd
        self.node = node
        self.writable = writable
        self.directory = beneath.Directory(fd) if directory else None


class Tables:
    """Nodes and handles by number."""

    def __init__(self, shares: list[Share], *, max_handles: int = MAX_HANDLES) -> None:
        self.shares = shares
        self.max_handles = max_handles
        self.nodes: dict[int, Node] = {}
        self.handles: dict[int, Handle] = {}
        self._known: dict[tuple[int, int, int, int], Node] = {}
        self._next_node = FIRST_ID
        self._next_handle = 1
        self._directories = 0
        for share in shares:
            found = os.fstat(share.fd)
            root = Node(FIRST_SHARE_ID + share.number, share, identity(share, found))
            self.nodes[root.id] = root

    def begin_at(self, number: int) -> None:
        """Give out numbers of nodes and handles from there on. Call it before any is."""
        self._next_node += number
        self._next_handle += number

    def node(self, number: int) -> Node:
        """The node of that number. Raises `OSError` (ESTALE)."""
        found = self.nodes.get(number)
        if found is None:
            raise refuse(errno.ESTALE)
        return found

    def handle(self, number: int, node_id: int) -> Handle:
        """The handle of that number, if it is one of that node. Raises `OSError` (EBADF)."""
        found = self.handles.get(number)
        if found is None or found.node.id != node_id:
            raise refuse(errno.EBADF)
        return found

    def see(self, parent: Node, name: bytes, found: os.stat_result) -> Node:
        """The node of a file that is called `name` in `parent`; the guest is told of it. Raises `OSError` (ENFILE)."""
        key = identity(parent.share, found)
        node = self.find(parent, name, found)
        if node is None:
            if len(self.nodes) >= MAX_NODES:
                raise refuse(errno.ENFILE)
            node = Node(self._next_node, parent.share, key)
            self._next_node += 1
            self.nodes[node.id] = node
            self._known[key] = node
        node.lookups += 1
        self.call(node, parent, name, keep=found.st_nlink > 1 and not node.is_directory)
        return node

    def find(self, parent: Node, name: bytes, found: os.stat_result) -> Node | None:
        """The node of a file that is called `name` in `parent`, if the guest knows it.

        A file with one link that has another name than it had is taken for another file, because it may be: numbers of inodes are
        given out again, at once where files are replaced by renaming. Under its old name the guest looks it up again.
        """
        node = self._known.get(identity(parent.share, found))
        if node is None or node.is_directory or found.st_nlink > 1 or (parent, name) in places(node):
            return node
        return None

    def call(self, node: Node, parent: Node, name: bytes, *, keep: bool = False) -> None:
        """Note a name of a node; with `keep`, beside those it has."""
        if node.parent is parent and node.name == name:
            return
        old = list(places(node))
        new = [(parent, name)]
        if keep:
            new += [place for place in old if place != new[0]][: MAX_NAMES - 1]
        node.parent, node.name = new[0]
        node.others = new[1:]
        for place in new:
            if place not in old:
                place[0].children += 1
        for place in old:
            if place not in new:
                place[0].children -= 1
                self._sweep(place[0])

    def forget(self, number: int, count: int) -> None:
        """The guest's kernel has dropped a node `count` times. Any number will do."""
        node = self.nodes.get(number)
        if node is not None and number >= FIRST_ID:
            node.lookups = max(0, node.lookups - count)
            self._sweep(node)

    def _sweep(self, start: Node) -> None:
        # A node whose children are known stays: their paths lead through it, and it must count.
        todo = [start]
        while todo:
            node = todo.pop()
            if node.lookups or node.children or node.id < FIRST_ID or node.id not in self.nodes:
                continue
            del self.nodes[node.id]
            if self._known.get(node.identity) is node:
                del self._known[node.identity]
            for parent, _ in places(node):
                parent.children -= 1
                todo.append(parent)

    def resolve(self, node: Node) -> tuple[int, os.stat_result]:
        """An O_PATH descriptor of a node, to be closed, and its attributes. Raises `OSError`; ESTALE if no name leads to it."""
        if node.parent is None:
            fd = beneath.find(node.share.fd, b".")
            return fd, os.fstat(fd)
        for parent, name in list(places(node)):
            try:
                fd = beneath.find(node.share.fd, parent.below(name))
            except OSError as error:
                if error.errno in (errno.EACCES, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE):
                    raise
                continue
            found = os.fstat(fd)
            if identity(node.share, found) == node.identity:
                return fd, found
            os.close(fd)
        raise refuse(errno.ESTALE)

    def room(self, *, directory: bool = False) -> None:
        """Raises `OSError` (ENFILE) if no further handle may be opened."""
        if len(self.handles) >= self.max_handles or (directory and self._directories >= MAX_DIRECTORIES):
            raise refuse(errno.ENFILE)

    def open(self, handle: Handle) -> int:
        """A number for a handle."""
        number = self._next_handle
        self._next_handle += 1
        self.handles[number] = handle
        if handle.directory is None:
            handle.node.open.append(handle)
        else:
            self._directories += 1
        return number

    def close(self, number: int, node_id: int) -> None:
        """Close a handle. Raises `OSError` (EBADF)."""
        handle = self.handle(number, node_id)
        del self.handles[number]
        if handle.directory is None:
            handle.node.open.remove(handle)
        else:
            self._directories -= 1
        os.close(handle.fd)

    def close_all(self) -> None:
        """Close every handle."""
        for handle in self.handles.values():
            os.close(handle.fd)
        self.handles.clear()


def identity(share: Share, found: os.stat_result) -> tuple[int, int, int, int]:
    """What a file is told by."""
    return (share.number, found.st_dev, found.st_ino, S_IFMT(found.st_mode))


def places(node: Node) -> Iterator[tuple[Node, bytes]]:
    """Every name that is remembered of a node, with the directory it is in; the latest first."""
    if node.parent is not None:
        yield node.parent, node.name
        yield from node.others


def version_of(found: os.stat_result) -> Version:
    """By what a file that has changed is told from one that has not."""
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size


def hidden(parent: Node, name: bytes, *, directory: bool) -> bool:
    """Whether .dhgignore hides `name` in `parent`."""
    patterns = parent.share.patterns
    return patterns is not None and patterns.hide(parent.below(name), directory=directory)


def reopen(fd: int, flags: int) -> int:
    """Open what an O_PATH descriptor stands for: the very file that was looked at, whatever its name now leads to."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
