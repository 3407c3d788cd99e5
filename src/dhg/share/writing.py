"""Operations that change files. Each asks first whether the guest may write there."""

from __future__ import annotations

import errno
import os
import time
from stat import S_IFREG, S_ISDIR, S_ISLNK, S_ISREG

from . import beneath
from .nodes import ROOT_ID, Handle, Node, hidden, refuse, reopen
from .protocol import (
    ATTR_OUT,
    CREATE,
    CREATE_IN,
    DIRECTORY_MODE,
    FILE_MODE,
    FSYNC,
    FSYNC_DATA,
    FSYNC_IN,
    FSYNCDIR,
    LINK,
    LINK_IN,
    MKDIR,
    MKDIR_IN,
    MKNOD,
    MKNOD_IN,
    OPEN_OUT,
    RENAME,
    RENAME2,
    RENAME2_IN,
    RENAME_FLAGS,
    RENAME_IN,
    RMDIR,
    SET_ATIME,
    SET_ATIME_NOW,
    SET_FH,
    SET_GID,
    SET_MODE,
    SET_MTIME,
    SET_MTIME_NOW,
    SET_SIZE,
    SET_UID,
    SETATTR,
    SETATTR_IN,
    SYMLINK,
    UNLINK,
    VALID_S,
    WRITE,
    WRITE_IN,
    WRITE_OUT,
    name_of,
    text_of,
)
from .reading import Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .reading import Operation


class Writer(Reader):
    """Answers everything."""

    def operations(self) -> dict[int, Operation]:
        """Every operation by its opcode."""
        return {
            **super().operations(),
            SETATTR: self._setattr,
            SYMLINK: self._symlink,
            MKNOD: self._mknod,
            MKDIR: self._mkdir,
            UNLINK: self._unlink,
            RMDIR: self._rmdir,
            RENAME: self._rename,
            RENAME2: self._rename2,
            LINK: self._link,
            CREATE: self._create,
            WRITE: self._write,
            FSYNC: self._fsync,
            FSYNCDIR: self._fsync,
        }

    def _place(self, node_id: int, name: bytes, *, directory: bool = False) -> tuple[Node, int]:
        """The directory in which the guest wants to change `name`, and a descriptor of it, to be closed."""
        if node_id == ROOT_ID:
            raise refuse(errno.EPERM)
        parent = self.tables.node(node_id)
        # Python's own attempts to keep bytecode beside a module that was imported.
        self.check_writable(parent.share, noise=b"__pycache__" in (name, parent.name))
        if hidden(parent, name, directory=directory) or (parent.parent is None and name == b".dhgignore"):
            raise refuse(errno.EACCES)
        self.ahead.renamed(parent, name)
        self.ahead.written(parent.share)
        fd, found = self.tables.resolve(parent)
        if not S_ISDIR(found.st_mode):
            os.close(fd)
            raise refuse(errno.ENOTDIR)
        return parent, fd

    def _create(self, node_id: int, body: memoryview) -> bytes:
        flags, mode = CREATE_IN.unpack_from(body)
        name = name_of(body[CREATE_IN.size :])
        self._room()
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
        self.ahead.changed(handle.node)
        self.ahead.written(handle.node.share)
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
        self.check_writable(node.share, node)
        self.ahead.changed(node)
        self.ahead.written(node.share)
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
        self.ahead.tell(node, found)
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
        name = name_of(body[MKNOD_IN.size :])
        parent, place = self._place(node_id, name)
        try:
            if mode & 0o170000 not in (0, S_IFREG):
                raise refuse(errno.EPERM)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, mode & FILE_MODE, dir_fd=place))
        finally:
            os.close(place)
        return self._entry(*self._see(parent, name))

    def _mkdir(self, node_id: int, body: memoryview) -> bytes:
        mode = MKDIR_IN.unpack_from(body)[0]
        name = name_of(body[MKDIR_IN.size :])
        parent, place = self._place(node_id, name, directory=True)
        try:
            os.mkdir(name, mode & DIRECTORY_MODE, dir_fd=place)
        finally:
            os.close(place)
        return self._entry(*self._see(parent, name))

    def _symlink(self, node_id: int, body: memoryview) -> bytes:
        name, _, target = bytes(body).partition(b"\0")
        name, target = name_of(memoryview(name + b"\0")), text_of(memoryview(target))
        parent, place = self._place(node_id, name)
        try:
            os.symlink(target, name, dir_fd=place)
        finally:
            os.close(place)
        return self._entry(*self._see(parent, name))

    def _link(self, node_id: int, body: memoryview) -> bytes:
        node = self.tables.node(LINK_IN.unpack_from(body)[0])
        name = name_of(body[LINK_IN.size :])
        parent, place = self._place(node_id, name)
        try:
            if parent.share is not node.share:
                raise refuse(errno.EXDEV)
            self.check_writable(node.share, node)
            self.ahead.changed(node)
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
        return self._remove(node_id, name_of(body), directory=False)

    def _rmdir(self, node_id: int, body: memoryview) -> bytes:
        return self._remove(node_id, name_of(body), directory=True)

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
        old, new = name_of(memoryview(old + b"\0")), name_of(memoryview(new))
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
            if hidden(parent, name, directory=True):
                raise refuse(errno.ENOENT)
            if patterns.by_path:
                # Under another name, what is hidden by its path would not be. Programs copy when they are told this.
                raise refuse(errno.EXDEV)
        return self.tables.find(parent, name, found)


def _truncate(fd: int, found: os.stat_result, size: int, handle: Handle | None) -> None:
    if handle is not None and handle.writable:
        os.ftruncate(fd, size)
        return
    if not S_ISREG(found.st_mode):
        raise refuse(errno.EISDIR if S_ISDIR(found.st_mode) else errno.EINVAL)
    real = reopen(fd, os.O_WRONLY)
    try:
        os.ftruncate(real, size)
    finally:
        os.close(real)
