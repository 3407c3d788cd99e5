"""The protocol between the guest's kernel and the server: FUSE, version 7.31, as in linux/fuse.h of the kernel's headers.

All numbers are little-endian; a message is at most MAX_MESSAGE bytes. The guest's relay has done FUSE_INIT.

    request, guest to host: IN, then what the operation takes (structs below; names end with a NUL)
    offset  bytes  field
    0       4      length of the whole message
    4       4      opcode
    8       8      unique: the reply carries it
    16      8      node id
    24      16     uid, gid, pid, length of extensions: not used

    reply, host to guest: OUT, then what the operation gives
    0       4      length of the whole message
    4       4      0, or minus an errno (then nothing follows); in a message of the host's own, its code
    8       8      unique; 0 in a message of the host's own

Different from what the kernel speaks: the requests of ONE_WAY have no reply here, the guest's relay has answered those that need one;
and there are messages between the host and the relay of which the kernel knows nothing: AHEAD, DROP, SEEN and USED.
"""

from __future__ import annotations

import errno
from struct import Struct

from .nodes import refuse

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
AHEAD_OUT = Struct("<I4x")  # length of the key, see AHEAD
INVAL_OUT = Struct("<Qqq")  # node, offset (-1: attributes only), length
USED_IN = Struct("<Q")  # fh
STORE_OUT = Struct("<QQI4x")  # node, offset, size; the bytes follow, for the guest's cache
WRITE_OUT = Struct("<I4x")  # size
# blocks, free, available, files, free files, block size, longest name, fragment size, 0
STATFS_OUT = Struct("<5Q4I24x")
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
#: Requests of the relay's own: it has answered a LOOKUP, an OPEN from what was sent AHEAD.
SEEN, USED = 4098, 4097
#: What the guest's relay answers itself: there is no reply to these here.
ONE_WAY = (FORGET, BATCH_FORGET, INTERRUPT, RELEASE, RELEASEDIR, SEEN, USED)
#: Messages of the host's own, before a reply: their code stands where a reply has its error, and unique is 0.
#: A file that will be asked for: AHEAD_OUT; the replies to a LOOKUP (ENTRY_OUT, ATTR) and to an OPEN (OPEN_OUT; handle 0: not
#: opened); the key, which is the directory's node id (8 bytes) and the name with its NUL; a whole message NOTIFY_STORE, unless the
#: guest has the content in its cache or there is none.
AHEAD = 100
#: Node ids, 8 bytes each: what was sent ahead of them is not true any more.
DROP = 101
#: For the guest's kernel: content for its cache (STORE_OUT, and the bytes); attributes that it is to ask for again (INVAL_OUT).
#: Whoever passes NOTIFY_STORE to the kernel waits for pages that are being read: not for a file that is open.
NOTIFY_INVAL_INODE, NOTIFY_STORE = 2, 4

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
#: How many files in a row are opened when they are looked up, without that one was wanted.
AHEAD_COUNT = 8
#: How many files, and of how many bytes in all, are sent with one reply at most.
AHEAD_WINDOW, AHEAD_BYTES = 64, 1 << 18
#: How long the relay takes what was sent ahead for what is there; the guest's kernel for as long again.
AHEAD_S = 0.5
#: How long the guest may take what it was told as true: files may change here while a script runs.
VALID_S = 1
#: Permission bits that a guest can give to a file: not set-user-ID and set-group-ID, which would outlive it on the host.
FILE_MODE, DIRECTORY_MODE = 0o1777, 0o3777


def name_of(body: memoryview) -> bytes:
    """A name from a message: one component, with its NUL. Raises `OSError`."""
    name = text_of(body)
    if len(name) > NAME_MAX:
        raise refuse(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name:
        raise refuse(errno.EINVAL)
    return name


def text_of(body: memoryview) -> bytes:
    text = bytes(body)
    if text.find(b"\0") != len(text) - 1:
        raise refuse(errno.EINVAL)
    return text[:-1]
