"""The server: answers the guest's file system requests from directories of the host.

It speaks the FUSE kernel protocol, version 7.31 (linux/fuse.h), over a stream socket; the guest's relay has done FUSE_INIT.
All numbers are little-endian; a message is at most MAX_MESSAGE bytes.

    request, guest to host: IN, then what the operation takes (structs below; names end with a NUL)
    offset  bytes  field
    0       4      length of the whole message
    4       4      opcode
    8       8      unique: the reply carries it
    16      8      node id
    24      16     uid, gid, pid, length of extensions: not used

    reply, host to guest: OUT, then what the operation gives
    0       4      length of the whole message
    4       4      0, or minus an errno (then nothing follows)
    8       8      unique

Nothing that arrives is trusted. A length that cannot be ends the connection; anything else that makes no sense is answered with an
error. Node ids and handles are keys of tables (`nodes.py`), names are single components, files are found beneath the shared directory
(`beneath.py`) and opened only if they are regular files or directories.
"""

from __future__ import annotations

import errno
import os
import time
from stat import S_IFDIR, S_IFREG, S_ISDIR, S_ISLNK, S_ISREG
from struct import Struct
from struct import error as StructError

from . import beneath
from .nodes import FIRST_SHARE_ID, ROOT_ID, Handle, Node, Share, Tables, refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    #: An int is the number of bytes that lie in the reply buffer already.
    Reply = bytes | int

IN = Struct("<IIQQ16x")
OUT = Struct("<IiQ")
GETATTR_IN = Struct("<I4xQ")  # flags, fh
SETATTR_IN = Struct("<I4xQQ8xqq8xII4xI4xII4x")  # valid, fh, size, atime, mtime, their ns, mode, uid, gid
MKNOD_IN = Struct("<I12x")  # mode
MKDIR_IN = Struct("<I4x")  # mode
RENAME_IN = Struct("<Q")  # new parent
RENAME2_IN = Struct("<QI4x")  # new parent, flags
LINK_IN = Struct("<Q")  # node
OPEN_IN = Struct("<I4x")  # flags
CREATE_IN = Struct("<II8x")  # flags, mode
READ_IN = Struct("<QQI20x")  # fh, offset, size
WRITE_IN = READ_IN
RELEASE_IN = Struct("<Q16x")  # fh
FSYNC_IN = Struct("<QI4x")  # fh, flags
LSEEK_IN = Struct("<QqI4x")  # fh, offset, whence
ACCESS_IN = Struct("<I4x")  # mask
FORGET_IN = Struct("<Q")  # count
BATCH_IN = Struct("<I4x")  # count, then as many FORGET_ONE
FORGET_ONE = Struct("<QQ")  # node, count

# ino, size, blocks, atime, mtime, ctime, their ns, mode, nlink, uid, gid, rdev, blksize, flags
ATTR = Struct("<6Q10I")
ATTR_OUT = Struct("<QI4x")  # seconds, ns for which ATTR, which follows, may be taken as true
ENTRY_OUT = Struct("<4QII")  # node, generation, seconds for the name, for ATTR, their ns; ATTR follows
OPEN_OUT = Struct("<QI4x")  # fh, flags
STORE_OUT = Struct("<QQI4x")  # node, offset, size; the bytes follow, for the guest's cache
WRITE_OUT = Struct("<I4x")  # size
STATFS_OUT = Struct(
    "<5Q4I24x"
)  # blocks, free, available, files, free files, block size, longest name, fragment size, 0
LSEEK_OUT = Struct("<q")
DIRENT = Struct("<QQII")  # ino, position after it, length of the name, DT_*; the name follows, padded to 8

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = range(8, 19)
FSYNC, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = 20, 26, 27, 28, 29, 30
ACCESS, CREATE, INTERRUPT, DESTROY, BATCH_FORGET, READDIRPLUS, RENAME2, LSEEK = 34, 35, 36, 38, 42, 44, 45, 46

GETATTR_FH = 1
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_FH, SET_ATIME_NOW, SET_MTIME_NOW = (
    1 << bit for bit in range(9)
)
#: What the guest's relay answers itself: there is no reply to these here.
ONE_WAY = (FORGET, BATCH_FORGET, INTERRUPT, RELEASE, RELEASEDIR)
#: A message of our own, before the reply to an OPEN: its code stands where a reply has its error, and unique is 0.
NOTIFY_STORE = 4

FSYNC_DATA = 1
KEEP_CACHE = 1 << 1
#: RENAME_NOREPLACE, RENAME_EXCHANGE
RENAME_FLAGS = 3

MAX_IO = 1 << 20
MAX_MESSAGE = MAX_IO + 8192
MAX_DIRECTORY_REPLY = 1 << 16
#: A file of this size at most is sent when it is opened, which saves the READ.
SMALL = 1 << 15
NAME_MAX = 255
#: How long the guest may take what it was told as true: files may change here while a script runs.
VALID_S = 1
#: Permission bits that a guest can give to a file: not set-user-ID and set-group-ID, which would outlive it on the host.
FILE_MODE, DIRECTORY_MODE = 0o1777, 0o3777


class Gone(Exception):
    """The other side has closed the connection."""


class Broken(Exception):
    """The other side sent what cannot be a message."""


class Server:
    """Answers requests on the socket `fd` from `shares`, until the other side is gone."""

    def __init__(self, fd: int, shares: list[Share], *, max_handles: int = 4096) -> None:
        self.fd = fd
        self.tables = Tables(shares, max_handles=max_handles)
        #: Whether the guest tried to write where it may not.
        self.refused_write = False
        self._out = memoryview(bytearray(OUT.size + MAX_IO))
        self._owner, self._group = os.geteuid(), os.getegid()
        #: Devices in the order in which they were seen: the guest sees one file system, and inodes must differ in it.
        self._devices: dict[int, int] = {}
        self._handlers: dict[int, Callable[[int, memoryview], Reply]] = {
            LOOKUP: self._lookup,
            GETATTR: self._getattr,
            SETATTR: self._setattr,
            READLINK: self._readlink,
            SYMLINK: self._symlink,
            MKNOD: self._mknod,
            MKDIR: self._mkdir,
            UNLINK: self._unlink,
            RMDIR: self._rmdir,
            RENAME: self._rename,
            RENAME2: self._rename2,
            LINK: self._link,
            OPEN: self._open,
            CREATE: self._create,
            READ: self._read,
            WRITE: self._write,
            STATFS: self._statfs,
            FSYNC: self._fsync,
            FSYNCDIR: self._fsync,
            OPENDIR: self._opendir,
            READDIR: self._readdir,
            READDIRPLUS: self._readdirplus,
            ACCESS: self._access,
            LSEEK: self._lseek,
        }

    # The connection.

    def serve(self) -> None:
        """Answer until the other side is gone. Raises `Broken`."""
        buffer = memoryview(bytearray(MAX_MESSAGE))
        have = 0
        try:
            while True:
                try:
                    got = os.readv(self.fd, (buffer[have:],))
                except ConnectionError:
                    return
                if not got:
                    return
                have += got
                start = 0
                while have - start >= IN.size:
                    length = IN.unpack_from(buffer, start)[0]
                    if not IN.size <= length <= MAX_MESSAGE:
                        raise Broken(f"a message of {length} bytes")
                    if have - start < length:
                        break
                    self._message(buffer[start : start + length])
                    start += length
                if start:
                    buffer[: have - start] = bytes(buffer[start:have])
                    have -= start
        except Gone:
            return
        finally:
            self.tables.close_all()

    def _message(self, message: memoryview) -> None:
        _, opcode, unique, node = IN.unpack_from(message)
        body = message[IN.size :]
        if opcode in ONE_WAY:
            self._one_way(opcode, node, body)
            return
        error, reply = 0, b""
        handler = self._handlers.get(opcode)
        try:
            if handler is None:
                raise refuse(errno.ENOSYS)
            found = handler(node, body)
            if isinstance(found, int):
                OUT.pack_into(self._out, 0, OUT.size + found, 0, unique)
                self._send(self._out[: OUT.size + found])
                return
            reply = found
        except OSError as why:
            error = why.errno or errno.EIO
        except (OverflowError, ValueError, StructError):
            error = errno.EINVAL
        except MemoryError:
            error = errno.ENOMEM
        self._send(memoryview(OUT.pack(OUT.size + len(reply), -error, unique) + reply))

    def _send(self, data: memoryview) -> None:
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except ConnectionError:
            raise Gone from None

    def _one_way(self, opcode: int, node: int, body: memoryview) -> None:
        try:
            if opcode == FORGET:
                self.tables.forget(node, FORGET_IN.unpack_from(body)[0])
            elif opcode in (RELEASE, RELEASEDIR) and node != ROOT_ID:
                self.tables.close(RELEASE_IN.unpack_from(body)[0], node)
            elif opcode == BATCH_FORGET:
                count = BATCH_IN.unpack_from(body)[0]
                data = body[BATCH_IN.size : BATCH_IN.size + count * FORGET_ONE.size]
                for one, times in FORGET_ONE.iter_unpack(data):
                    self.tables.forget(one, times)
        except (OSError, StructError):
            pass  # there is no reply in which to say so

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
        node.told_size = found.st_size
        return ENTRY_OUT.pack(node.id, 0, VALID_S, VALID_S, 0, 0) + self._attr(found)

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
        if _hidden(parent, name, directory=S_ISDIR(found.st_mode)):
            raise refuse(errno.ENOENT)
        return self.tables.see(parent, name, found), found

    # Looking.

    def _lookup(self, node_id: int, body: memoryview) -> bytes:
        name = _name(body)
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
            # A name that is not there may be taken as such for as long as one that is: that is node 0.
            return ENTRY_OUT.pack(0, 0, VALID_S, 0, 0, 0) + bytes(ATTR.size)
        return self._entry(node, found)

    def _getattr(self, node_id: int, body: memoryview) -> bytes:
        flags, number = GETATTR_IN.unpack_from(body)
        if node_id == ROOT_ID:
            return ATTR_OUT.pack(VALID_S, 0) + _root_attr()
        if flags & GETATTR_FH:
            found = os.fstat(self.tables.handle(number, node_id).fd)
        else:
            fd, found, ours = self._reach(self.tables.node(node_id))
            if ours:
                os.close(fd)
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
        self.tables.room(directory=True)
        fd, found = self.tables.resolve(node)
        try:
            if not S_ISDIR(found.st_mode):
                raise refuse(errno.ENOTDIR)
            handle = Handle(_reopen(fd, os.O_RDONLY | os.O_DIRECTORY), node, directory=True)
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
                if _hidden(handle.node, name, directory=kind == S_IFDIR >> 12):
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
            self._check_writable(node.share, node)
        self.tables.room()
        fd, found, ours = self._reach(node)
        try:
            if not S_ISREG(found.st_mode):
                raise refuse(errno.EISDIR if S_ISDIR(found.st_mode) else errno.EACCES)
            real = _reopen(fd, access | flags & (os.O_APPEND | os.O_TRUNC))
        finally:
            if ours:
                os.close(fd)
        version = (found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        keep = 0
        if not writes and (version == node.version or self._stored(node, real, found.st_size)):
            keep = KEEP_CACHE
        node.version = version
        return OPEN_OUT.pack(self.tables.open(Handle(real, node, writable=access != os.O_RDONLY)), keep)

    def _stored(self, node: Node, fd: int, size: int) -> bool:
        """Put a small file's content into the guest's cache; False if it is not small, or not what the guest takes it for."""
        if not 0 < size <= SMALL or size != node.told_size:
            return False
        data = os.pread(fd, size, 0)
        if len(data) != size:
            return False
        head = OUT.pack(OUT.size + STORE_OUT.size + size, NOTIFY_STORE, 0) + STORE_OUT.pack(node.id, 0, size)
        self._send(memoryview(head + data))
        return True

    def _read(self, node_id: int, body: memoryview) -> int:
        number, offset, size = READ_IN.unpack_from(body)
        handle = self.tables.handle(number, node_id)
        return os.preadv(handle.fd, (self._out[OUT.size : OUT.size + min(size, MAX_IO)],), offset)

    def _lseek(self, node_id: int, body: memoryview) -> bytes:
        number, offset, whence = LSEEK_IN.unpack_from(body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise refuse(errno.EINVAL)
        return LSEEK_OUT.pack(os.lseek(self.tables.handle(number, node_id).fd, offset, whence))

    # Changing.

    def _check_writable(self, share: Share, node: Node | None = None, *, noise: bool = False) -> None:
        """Raises `OSError` (EROFS, EACCES) where the guest may not write; `noise` is what no user has asked for."""
        if not share.writable:
            self.refused_write = self.refused_write or not noise
            raise refuse(errno.EROFS)
        if node is not None and share.guard == node.identity[1:3]:
            raise refuse(errno.EACCES)

    def _place(self, node_id: int, name: bytes, *, directory: bool = False) -> tuple[Node, int]:
        """The directory in which the guest wants to change `name`, and a descriptor of it, to be closed."""
        if node_id == ROOT_ID:
            raise refuse(errno.EPERM)
        parent = self.tables.node(node_id)
        # Python's own attempts to keep bytecode beside a module that was imported.
        self._check_writable(parent.share, noise=b"__pycache__" in (name, parent.name))
        if _hidden(parent, name, directory=directory) or (parent.parent is None and name == b".dhgignore"):
            raise refuse(errno.EACCES)
        fd, found = self.tables.resolve(parent)
        if not S_ISDIR(found.st_mode):
            os.close(fd)
            raise refuse(errno.ENOTDIR)
        return parent, fd

    def _create(self, node_id: int, body: memoryview) -> bytes:
        flags, mode = CREATE_IN.unpack_from(body)
        name = _name(body[CREATE_IN.size :])
        self.tables.room()
        parent, place = self._place(node_id, name)
        access = flags & os.O_ACCMODE
        try:
            real = os.open(
                name,
                access | flags & os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                mode & FILE_MODE,
                dir_fd=place,
            )
        except FileExistsError:
            # Made by somebody here since the guest looked.
            if flags & os.O_EXCL:
                raise
            node, found = self._see(parent, name)
            return self._entry(node, found) + self._open_node(node, flags)
        finally:
            os.close(place)
        try:
            found = os.fstat(real)
            node = self.tables.see(parent, name, found)
        except OSError:
            os.close(real)
            raise
        handle = self.tables.open(Handle(real, node, writable=access != os.O_RDONLY))
        return self._entry(node, found) + OPEN_OUT.pack(handle, 0)

    def _write(self, node_id: int, body: memoryview) -> bytes:
        number, offset, size = WRITE_IN.unpack_from(body)
        data = body[WRITE_IN.size :]
        handle = self.tables.handle(number, node_id)
        if not handle.writable or size != len(data):
            raise refuse(errno.EINVAL if handle.writable else errno.EBADF)
        return WRITE_OUT.pack(os.pwrite(handle.fd, data, offset))

    def _fsync(self, node_id: int, body: memoryview) -> bytes:
        number, flags = FSYNC_IN.unpack_from(body)
        if node_id != ROOT_ID:
            fd = self.tables.handle(number, node_id).fd
            (os.fdatasync if flags & FSYNC_DATA else os.fsync)(fd)
        return b""

    def _setattr(self, node_id: int, body: memoryview) -> bytes:
        valid, number, size, atime, mtime, atime_ns, mtime_ns, mode, uid, gid = SETATTR_IN.unpack_from(body)
        if node_id == ROOT_ID:
            raise refuse(errno.EPERM)
        node = self.tables.node(node_id)
        self._check_writable(node.share, node)
        handle = self.tables.handle(number, node_id) if valid & SET_FH else None
        fd, found, ours = (handle.fd, os.fstat(handle.fd), False) if handle else self._reach(node)
        try:
            owner, group = uid or self._owner, gid or self._group
            if (valid & SET_UID and owner != found.st_uid) or (valid & SET_GID and group != found.st_gid):
                # Files belong to who runs dhg; a guest has nobody else to give them to.
                raise refuse(errno.EPERM)
            if valid & SET_SIZE:
                _truncate(fd, found, size, handle)
            if valid & SET_MODE:
                if S_ISLNK(found.st_mode):
                    raise refuse(errno.EOPNOTSUPP)
                os.chmod(f"/proc/self/fd/{fd}", mode & (DIRECTORY_MODE if S_ISDIR(found.st_mode) else FILE_MODE))
            if valid & (SET_ATIME | SET_MTIME):
                now = time.time_ns()
                access, change = atime * 1_000_000_000 + atime_ns, mtime * 1_000_000_000 + mtime_ns
                access = (now if valid & SET_ATIME_NOW else access) if valid & SET_ATIME else found.st_atime_ns
                change = (now if valid & SET_MTIME_NOW else change) if valid & SET_MTIME else found.st_mtime_ns
                self._set_times(node, fd, found, (access, change))
            found = os.fstat(fd)
        finally:
            if ours:
                os.close(fd)
        return ATTR_OUT.pack(VALID_S, 0) + self._attr(found)

    def _set_times(self, node: Node, fd: int, found: os.stat_result, times: tuple[int, int]) -> None:
        if not S_ISLNK(found.st_mode):
            os.utime(f"/proc/self/fd/{fd}", ns=times)
            return
        if node.parent is None:
            raise refuse(errno.ESTALE)
        # A symlink can be reached by its name only; that is in a directory beneath the share whatever happens meanwhile.
        place, _ = self.tables.resolve(node.parent)
        try:
            os.utime(node.name, ns=times, dir_fd=place, follow_symlinks=False)
        finally:
            os.close(place)

    def _mknod(self, node_id: int, body: memoryview) -> bytes:
        mode = MKNOD_IN.unpack_from(body)[0]
        name = _name(body[MKNOD_IN.size :])
        if mode & 0o170000 not in (0, S_IFREG):
            raise refuse(errno.EPERM)
        parent, place = self._place(node_id, name)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, mode & FILE_MODE, dir_fd=place))
        finally:
            os.close(place)
        return self._entry(*self._see(parent, name))

    def _mkdir(self, node_id: int, body: memoryview) -> bytes:
        mode = MKDIR_IN.unpack_from(body)[0]
        name = _name(body[MKDIR_IN.size :])
        parent, place = self._place(node_id, name, directory=True)
        try:
            os.mkdir(name, mode & DIRECTORY_MODE, dir_fd=place)
        finally:
            os.close(place)
        return self._entry(*self._see(parent, name))

    def _symlink(self, node_id: int, body: memoryview) -> bytes:
        name, _, target = bytes(body).partition(b"\0")
        name, target = _name(memoryview(name + b"\0")), _text(memoryview(target))
        parent, place = self._place(node_id, name)
        try:
            os.symlink(target, name, dir_fd=place)
        finally:
            os.close(place)
        return self._entry(*self._see(parent, name))

    def _link(self, node_id: int, body: memoryview) -> bytes:
        node = self.tables.node(LINK_IN.unpack_from(body)[0])
        name = _name(body[LINK_IN.size :])
        parent, place = self._place(node_id, name)
        try:
            if parent.share is not node.share:
                raise refuse(errno.EXDEV)
            self._check_writable(node.share, node)
            fd, found = self.tables.resolve(node)
            try:
                if not S_ISREG(found.st_mode) and not S_ISLNK(found.st_mode):
                    raise refuse(errno.EPERM)
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=place, follow_symlinks=True)
            finally:
                os.close(fd)
        finally:
            os.close(place)
        return self._entry(*self._see(parent, name))

    def _unlink(self, node_id: int, body: memoryview) -> bytes:
        return self._remove(node_id, _name(body), directory=False)

    def _rmdir(self, node_id: int, body: memoryview) -> bytes:
        return self._remove(node_id, _name(body), directory=True)

    def _remove(self, node_id: int, name: bytes, *, directory: bool) -> bytes:
        _, place = self._place(node_id, name, directory=directory)
        try:
            (os.rmdir if directory else os.unlink)(name, dir_fd=place)
        finally:
            os.close(place)
        return b""

    def _rename(self, node_id: int, body: memoryview) -> bytes:
        target = RENAME_IN.unpack_from(body)[0]
        return self._move(node_id, target, 0, body[RENAME_IN.size :])

    def _rename2(self, node_id: int, body: memoryview) -> bytes:
        target, flags = RENAME2_IN.unpack_from(body)
        return self._move(node_id, target, flags, body[RENAME2_IN.size :])

    def _move(self, node_id: int, target: int, flags: int, names: memoryview) -> bytes:
        if flags & ~RENAME_FLAGS:
            raise refuse(errno.EINVAL)
        old, _, new = bytes(names).partition(b"\0")
        old, new = _name(memoryview(old + b"\0")), _name(memoryview(new))
        parent, place = self._place(node_id, old)
        try:
            other, other_place = self._place(target, new)
            try:
                if other.share is not parent.share:
                    raise refuse(errno.EXDEV)
                moved = self._known(parent, old)
                exchanged = self._known(other, new)
                beneath.rename(place, old, other_place, new, flags)
            finally:
                os.close(other_place)
        finally:
            os.close(place)
        if moved is not None:
            self.tables.call(moved, other, new)
        if exchanged is not None and flags & 2:
            self.tables.call(exchanged, parent, old)
        return b""

    def _known(self, parent: Node, name: bytes) -> Node | None:
        """The node of what is about to be renamed. Raises `OSError` where .dhgignore forbids that."""
        try:
            fd = beneath.find(parent.share.fd, parent.below(name))
        except OSError:
            return None
        found = os.fstat(fd)
        os.close(fd)
        patterns = parent.share.patterns
        if S_ISDIR(found.st_mode) and patterns is not None:
            if _hidden(parent, name, directory=True):
                raise refuse(errno.ENOENT)
            if patterns.by_path:
                # Under another name, what is hidden by its path would not be. Programs copy when they are told this.
                raise refuse(errno.EXDEV)
        return self.tables.find(parent, found)


def _name(body: memoryview) -> bytes:
    """A name from a message: one component, with its NUL. Raises `OSError`."""
    name = _text(body)
    if len(name) > NAME_MAX:
        raise refuse(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name:
        raise refuse(errno.EINVAL)
    return name


def _text(body: memoryview) -> bytes:
    text = bytes(body)
    if text.find(b"\0") != len(text) - 1:
        raise refuse(errno.EINVAL)
    return text[:-1]


def _times(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns


def _root_attr() -> bytes:
    return ATTR.pack(ROOT_ID, 0, 0, 0, 0, 0, 0, 0, 0, S_IFDIR | 0o555, 2, 0, 0, 0, 4096, 0)


def _hidden(parent: Node, name: bytes, *, directory: bool) -> bool:
    patterns = parent.share.patterns
    return patterns is not None and patterns.hide(parent.below(name), directory=directory)


def _reopen(fd: int, flags: int) -> int:
    """Open what an O_PATH descriptor stands for: the very file that was looked at, whatever its name now leads to."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def _truncate(fd: int, found: os.stat_result, size: int, handle: Handle | None) -> None:
    if handle is not None and handle.writable:
        os.ftruncate(fd, size)
        return
    if not S_ISREG(found.st_mode):
        raise refuse(errno.EISDIR if S_ISDIR(found.st_mode) else errno.EINVAL)
    real = _reopen(fd, os.O_WRONLY)
    try:
        os.ftruncate(real, size)
    finally:
        os.close(real)
