"""Operations that look: names, attributes, directories, the content of files."""

from __future__ import annotations

import errno
import os
from stat import S_IFDIR, S_ISDIR, S_ISLNK, S_ISREG

from . import beneath
from .ahead import Ahead, settled
from .nodes import FIRST_SHARE_ID, NEVER, ROOT_ID, Handle, Node, Share, Tables, hidden, refuse, reopen, version_of
from .protocol import (
    ACCESS,
    ACCESS_IN,
    AHEAD_S,
    ATTR,
    ATTR_OUT,
    DIRENT,
    ENTRY_OUT,
    GETATTR,
    GETATTR_FH,
    GETATTR_IN,
    INVAL_OUT,
    KEEP_CACHE,
    LOOKUP,
    LSEEK,
    LSEEK_IN,
    LSEEK_OUT,
    MAX_DIRECTORY_REPLY,
    MAX_IO,
    NAME_MAX,
    NOTIFY_INVAL_INODE,
    NOTIFY_STORE,
    OPEN,
    OPEN_IN,
    OPEN_OUT,
    OPENDIR,
    OUT,
    READ,
    READ_IN,
    READDIR,
    READDIRPLUS,
    READLINK,
    SMALL,
    STATFS,
    STATFS_OUT,
    STORE_OUT,
    VALID_S,
    name_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    #: An int is the number of bytes that lie in the reply buffer already.
    Reply = bytes | int
    Operation = Callable[[int, memoryview], Reply]


class Reader:
    """Answers what does not change anything. `send` sends a message before the reply."""

    def __init__(self, shares: list[Share], *, max_handles: int, send: Callable[[bytes], None]) -> None:
        self.tables = Tables(shares, max_handles=max_handles)
        #: Whether the guest tried to write where it may not.
        self.refused_write = False
        #: Room for a header and the largest READ.
        self.out = memoryview(bytearray(OUT.size + MAX_IO))
        self.send = send
        self.ahead = Ahead(self.tables, send=send, entry=self._entry_ahead)
        self._owner, self._group = os.geteuid(), os.getegid()
        #: Devices in the order in which they were seen: the guest sees one file system, and inodes must differ in it.
        self._devices: dict[int, int] = {}

    def operations(self) -> dict[int, Operation]:
        """Every operation by its opcode."""
        return {
            LOOKUP: self._lookup,
            GETATTR: self._getattr,
            READLINK: self._readlink,
            OPEN: self._open,
            READ: self._read,
            STATFS: self._statfs,
            OPENDIR: self._opendir,
            READDIR: self._readdir,
            READDIRPLUS: self._readdirplus,
            ACCESS: self._access,
            LSEEK: self._lseek,
        }

    def check_writable(self, share: Share, node: Node | None = None, *, noise: bool = False) -> None:
        """Raises `OSError` (EROFS, EACCES) where the guest may not write; `noise` is what no user has asked for."""
        if not share.writable:
            self.refused_write = self.refused_write or not noise
            raise refuse(errno.EROFS)
        if node is not None and share.guard == node.identity[1:3]:
            raise refuse(errno.EACCES)

    # What a reply says of a file.

    def _attr(self, found: os.stat_result) -> bytes:
        device = self._devices.setdefault(found.st_dev, len(self._devices))
        return ATTR.pack(
            (found.st_ino ^ device << 48) & 0xFFFF_FFFF_FFFF_FFFF,
            found.st_size,
            found.st_blocks,
            *(int(ns // 1_000_000_000) & 0xFFFF_FFFF_FFFF_FFFF for ns in _times(found)),
            *(ns % 1_000_000_000 for ns in _times(found)),
            found.st_mode,
            found.st_nlink & 0xFFFF_FFFF,
            # The guest's root is who runs dhg.
            0 if found.st_uid == self._owner else found.st_uid,
            0 if found.st_gid == self._group else found.st_gid,
            0,
            found.st_blksize & 0xFFFF_FFFF,
            0,
        )

    def _entry(self, node: Node, found: os.stat_result) -> bytes:
        self.ahead.tell(node, found)
        return ENTRY_OUT.pack(node.id, 0, VALID_S, VALID_S, 0, 0) + self._attr(found)

    def _entry_ahead(self, node: Node, found: os.stat_result) -> bytes:
        ns = int(AHEAD_S * 1_000_000_000)
        return ENTRY_OUT.pack(node.id, 0, 0, 0, ns, ns) + self._attr(found)

    def _see(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        try:
            fd = beneath.find(parent.share.fd, parent.below(name))
        except OSError as error:
            # A directory on the way has become a symlink: the guest is to look the whole path up again.
            raise refuse(errno.ESTALE if error.errno == errno.ELOOP else error.errno or errno.EIO) from None
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
        if hidden(parent, name, directory=S_ISDIR(found.st_mode)):
            raise refuse(errno.ENOENT)
        node = self.tables.see(parent, name, found)
        self.ahead.named(parent, name, node)
        return node, found

    # Looking.

    def _lookup(self, node_id: int, body: memoryview) -> bytes:
        name = name_of(body)
        if node_id == ROOT_ID:
            for share in self.tables.shares:
                if name == b"%d" % share.number:
                    root = self.tables.node(FIRST_SHARE_ID + share.number)
                    return self._entry(root, os.fstat(share.fd))
            raise refuse(errno.ENOENT)
        parent = self.tables.node(node_id)
        try:
            node, found = self._see(parent, name)
        except FileNotFoundError:
            self.ahead.named(parent, name, None)
            # A name that is not there may be taken as such for as long as one that is: that is node 0.
            return ENTRY_OUT.pack(0, 0, VALID_S, 0, 0, 0) + bytes(ATTR.size)
        entry = self._entry(node, found)
        if S_ISREG(found.st_mode):
            self.ahead.looked_up(parent, name, node, found)
        return entry

    def _getattr(self, node_id: int, body: memoryview) -> bytes:
        flags, number = GETATTR_IN.unpack_from(body)
        if node_id == ROOT_ID:
            return ATTR_OUT.pack(VALID_S, 0) + _root_attr()
        if flags & GETATTR_FH:
            handle = self.tables.handle(number, node_id)
            node, found = handle.node, os.fstat(handle.fd)
        else:
            node = self.tables.node(node_id)
            fd, found, ours = self._reach(node)
            if ours:
                os.close(fd)
        self.ahead.tell(node, found)
        return ATTR_OUT.pack(VALID_S, 0) + self._attr(found)

    def _reach(self, node: Node) -> tuple[int, os.stat_result, bool]:
        """A descriptor of a node, by its name or, if it has none any more, by a handle; and whether it is to be closed."""
        try:
            return *self.tables.resolve(node), True
        except OSError as error:
            if error.errno != errno.ESTALE or not node.open:
                raise
            fd = node.open[0].fd
            return fd, os.fstat(fd), False

    def _readlink(self, node_id: int, body: memoryview) -> bytes:
        fd, _ = self.tables.resolve(self.tables.node(node_id))
        try:
            return os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)

    def _access(self, node_id: int, body: memoryview) -> bytes:
        mask = ACCESS_IN.unpack_from(body)[0] & 7
        if node_id == ROOT_ID:
            return b""
        node = self.tables.node(node_id)
        if mask & os.W_OK and not node.share.writable:
            raise refuse(errno.EROFS)
        fd, found, ours = self._reach(node)
        try:
            if not S_ISLNK(found.st_mode) and not os.access(f"/proc/self/fd/{fd}", mask):
                raise refuse(errno.EACCES)
        finally:
            if ours:
                os.close(fd)
        return b""

    def _statfs(self, node_id: int, body: memoryview) -> bytes:
        if node_id == ROOT_ID:
            return STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, NAME_MAX, 4096, 0)
        found = os.fstatvfs(self.tables.node(node_id).share.fd)
        counts = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return STATFS_OUT.pack(*counts, found.f_bsize, NAME_MAX, found.f_frsize, 0)

    # Directories.

    def _opendir(self, node_id: int, body: memoryview) -> bytes:
        if node_id == ROOT_ID:
            return OPEN_OUT.pack(0, 0)
        node = self.tables.node(node_id)
        self._room(directory=True)
        fd, found = self.tables.resolve(node)
        try:
            if not S_ISDIR(found.st_mode):
                raise refuse(errno.ENOTDIR)
            handle = Handle(reopen(fd, os.O_RDONLY | os.O_DIRECTORY), node, directory=True)
        finally:
            os.close(fd)
        return OPEN_OUT.pack(self.tables.open(handle), 0)

    def _readdir(self, node_id: int, body: memoryview) -> bytes:
        return self._list(node_id, body, plus=False)

    def _readdirplus(self, node_id: int, body: memoryview) -> bytes:
        return self._list(node_id, body, plus=True)

    def _list(self, node_id: int, body: memoryview, *, plus: bool) -> bytes:
        number, offset, size = READ_IN.unpack_from(body)
        size = min(size, MAX_DIRECTORY_REPLY)
        head = ENTRY_OUT.size + ATTR.size if plus else 0
        if node_id == ROOT_ID:
            return self._list_root(offset, head)
        handle = self.tables.handle(number, node_id)
        if handle.directory is None:
            raise refuse(errno.ENOTDIR)
        out = bytearray()
        while entries := handle.directory.entries(offset):
            given = 0
            for _, after, inode, kind, name in entries:
                padded = DIRENT.size + len(name) + 7 & ~7
                if len(out) + head + padded > size:
                    handle.directory.given(given)
                    return bytes(out)
                given += 1
                offset = after
                if hidden(handle.node, name, directory=kind == S_IFDIR >> 12):
                    continue
                if plus:
                    out += self._seen(handle.node, name)
                out += DIRENT.pack(inode, after & 0xFFFF_FFFF_FFFF_FFFF, len(name), kind) + name
                out += bytes(-len(out) % 8)
            handle.directory.given(given)
            if out:
                break
        return bytes(out)

    def _seen(self, parent: Node, name: bytes) -> bytes:
        # An entry that cannot be looked at now is listed all the same; node 0 says that no more is known.
        if name not in (b".", b".."):
            try:
                return self._entry(*self._see(parent, name))
            except OSError:
                pass
        return bytes(ENTRY_OUT.size + ATTR.size)

    def _list_root(self, offset: int, head: int) -> bytes:
        # Never more than the shares of one command line, which fit into any reply.
        out = bytearray()
        for share in self.tables.shares[offset : offset + 16]:
            offset += 1
            name = b"%d" % share.number
            out += bytes(head) + DIRENT.pack(FIRST_SHARE_ID + share.number, offset, len(name), S_IFDIR >> 12) + name
            out += bytes(-len(out) % 8)
        return bytes(out)

    # Files.

    def _open(self, node_id: int, body: memoryview) -> bytes:
        return self._open_node(self.tables.node(node_id), OPEN_IN.unpack_from(body)[0])

    def _open_node(self, node: Node, flags: int) -> bytes:
        access = flags & os.O_ACCMODE
        writes = access != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if writes:
            self.check_writable(node.share, node)
            self.ahead.written(node.share)
        self.ahead.changed(node)
        self._room()
        fd, found, ours = self._reach(node)
        try:
            if not S_ISREG(found.st_mode):
                raise refuse(errno.EISDIR if S_ISDIR(found.st_mode) else errno.EACCES)
            real = reopen(fd, access | flags & (os.O_APPEND | os.O_TRUNC))
        finally:
            if ours:
                os.close(fd)
        keep = 0 if writes else self._fill(node, real, found)
        # One that has changed just now may change again without that its times say so.
        node.version = version_of(found) if settled(found) else NEVER
        reply = OPEN_OUT.pack(self.tables.open(Handle(real, node, writable=access != os.O_RDONLY)), keep)
        if not writes:
            self.ahead.opened(node)
        return reply

    def _room(self, *, directory: bool = False) -> None:
        """Raises `OSError` (ENFILE) if no further handle may be opened; those opened ahead give way."""
        if len(self.tables.handles) >= self.tables.max_handles:
            self.ahead.drop_all()
        self.tables.room(directory=directory)

    def _fill(self, node: Node, fd: int, found: os.stat_result) -> int:
        """See to the guest's cache of a file that is being opened; the flags for the reply."""
        version = version_of(found)
        if node.told != version:
            # It takes the file for what it was: it is to ask before it reads.
            self.send(OUT.pack(OUT.size + INVAL_OUT.size, NOTIFY_INVAL_INODE, 0) + INVAL_OUT.pack(node.id, -1, 0))
            return 0
        if version == node.version:
            return KEEP_CACHE
        size = found.st_size
        if node.open or not 0 < size <= SMALL:
            return 0
        try:
            data = os.pread(fd, size, 0)
            if len(data) != size or version_of(os.fstat(fd)) != version:
                return 0
        except OSError:
            return 0  # whoever reads it will be told
        body = STORE_OUT.pack(node.id, 0, size) + data
        self.send(OUT.pack(OUT.size + len(body), NOTIFY_STORE, 0) + body)
        return KEEP_CACHE

    def _read(self, node_id: int, body: memoryview) -> int:
        number, offset, size = READ_IN.unpack_from(body)
        handle = self.tables.handle(number, node_id)
        return os.preadv(handle.fd, (self.out[OUT.size : OUT.size + min(size, MAX_IO)],), offset)

    def _lseek(self, node_id: int, body: memoryview) -> bytes:
        number, offset, whence = LSEEK_IN.unpack_from(body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise refuse(errno.EINVAL)
        return LSEEK_OUT.pack(os.lseek(self.tables.handle(number, node_id).fd, offset, whence))


def _times(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns


def _root_attr() -> bytes:
    return ATTR.pack(ROOT_ID, 0, 0, 0, 0, 0, 0, 0, 0, S_IFDIR | 0o555, 2, 0, 0, 0, 4096, 0)
