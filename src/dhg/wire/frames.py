"""The frame format of the control channel. Host and guest share this file: standard library only.

A frame:

    offset  bytes  field
    0       1      kind (the constants below)
    1       3      zero
    4       4      length of the payload, unsigned little-endian, at most MAX_PAYLOAD
    8       ...    payload

The payload of most frames is a list of fields:

    offset  bytes  field
    0       1      key (the constants below); a key may occur several times, in order
    1       3      zero
    4       4      length of the value, unsigned little-endian
    8       ...    value: bytes; text is UTF-8 (surrogateescape), numbers are signed 64-bit little-endian

The payloads of REQUEST and RESULT begin with a head of their own, and the list follows it:

    REQUEST  8   host's wall clock in ns          RESULT  8  exit code
             8   guest's monotonic clock in ns at         8  ns from that moment to the wake-up of the runner
                 that moment; 0: when this was sent       8  ns from there to the release of the script
             8   flags, see below                         8  ns from there to its end
             8   rows of a table preview
             4   length of the source
             4   length of the file's name; 0: it is <string>
             4   length of the script's path in the guest; 0: it lies in no directory that is shared
             4   length of the directory that a script given by path has first on sys.path; 0: none
             64  entropy
             12  host name, dhg- and 8 hex digits
             32  machine id, hex digits
             16  end mark: closes stdout and stderr; ff and 15 random bytes
             ... source, name of the file, path, directory

Only control travels in frames. The script's stdin, stdout and stderr have a channel of their own each, and
carry nothing but the script's bytes (and, at the end of stdout and stderr, the end mark of the request).

What arrives is not trusted: a decoder raises `FrameError` at the first byte that is out of order, and never
holds more than MAX_PAYLOAD plus one read.
"""

from __future__ import annotations

from _struct import Struct  # not `struct`, which is a file more to be read at each start

#: The version of this format; the guest's HELLO carries it, the host refuses another.
PROTOCOL = 3

MAX_PAYLOAD = 64 * 1024 * 1024

_HEAD = Struct("<B3xI")
_INT = Struct("<q")
HEAD_SIZE = _HEAD.size
REQUEST_HEAD = Struct("<qqqqIIII64s12s32s16s")
RESULT_HEAD = Struct("<qqqq")

#: The file name of a script that is given by -c.
STRING = "<string>"

# Kinds, guest to host.
HELLO = 1  # the runner is up, warm, and waits for a request
RESULT = 2  # the script is done; the last frame
LOG = 3  # one line about the progress of the warm-up
REFUSED = 5  # the clone could not be made true (F_TEXT says why); the script has not run
DIED = 4  # init's last word: the runner's process is gone, F_EXIT is its status as the shell gives it

# Kinds, host to guest.
REQUEST = 16  # run this script
INTERRUPT = 17  # raise KeyboardInterrupt in the script
PAUSE = 18  # before the freeze: the scripts of this rehearsal have been run, go on

# Kinds, both ways, before the request.
CLOCK = 32  # what does your monotonic clock say? The answer has F_BASE_NS

KINDS = frozenset((HELLO, RESULT, LOG, DIED, REFUSED, REQUEST, INTERRUPT, PAUSE, CLOCK))

# Fields of HELLO.
F_PROTOCOL = 1
F_VERSIONS = 2  # "name=version", one a field

# Fields of LOG.
F_TEXT = 8

# Field of CLOCK.
F_BASE_NS = 25

# Fields of REQUEST.
F_ARG = 18  # sys.argv[1:], one a field
F_ENV = 19  # NAME=VALUE, one a field
F_MOUNT = 28  # where share 1, 2, ... is to appear, one a field; share 0 is /workspace
F_OUTPUT = 29  # a table to write when the script has succeeded: NAME, format, path, each ended by a NUL

# Flags of REQUEST.
FLAG_STDIN = 1  # the stdin channel carries data; otherwise stdin is /dev/null
FLAG_TABLES = 2  # show the tables that the script leaves
FLAG_TABLE_META = 4  # with their columns
FLAG_JSON = 8  # as data in RESULT instead of text on stdout
FLAG_NO_WORKSPACE = 16  # take /workspace away
FLAG_WRITABLE = (
    32  # some of the host's files may be written: those that the script leaves open are to be complete at its end
)

# Field of DIED.
F_EXIT = 32

# Fields of RESULT.
F_REPR = 35  # of the value, if the source was one expression and it was not None
F_ERROR_TYPE = 36  # of the exception that ended the script
F_ERROR_MESSAGE = 37
F_ERROR_TRACEBACK = 38
F_TABLE = 39  # JSON, one table a field
F_OUTPUT_ERROR = 40  # why a table of F_OUTPUT could not be written


class FrameError(Exception):
    """The bytes are no valid frame."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """The bytes of one frame. Raises `FrameError` where the payload is larger than MAX_PAYLOAD."""
    if len(payload) > MAX_PAYLOAD:
        raise FrameError(f"payload of {len(payload)} bytes; at most {MAX_PAYLOAD}")
    return _HEAD.pack(kind, len(payload)) + payload


def field(key: int, value: bytes | str | int) -> bytes:
    """The bytes of one field."""
    if isinstance(value, int):
        value = _INT.pack(value)
    elif isinstance(value, str):
        value = octets(value)
    return _HEAD.pack(key, len(value)) + value


def fields(payload: bytes) -> dict[int, list[bytes]]:
    """The fields of a payload, by key, in order. Raises `FrameError` where it is malformed."""
    result: dict[int, list[bytes]] = {}
    at, end = 0, len(payload)
    while at < end:
        if end - at < HEAD_SIZE:
            raise FrameError(f"half a field at byte {at}")
        if payload[at + 1 : at + 4] != b"\0\0\0":
            raise FrameError(f"padding that is not zero at byte {at + 1}")
        key, size = _HEAD.unpack_from(payload, at)
        at += HEAD_SIZE
        if size > end - at:
            raise FrameError(f"field {key} of {size} bytes in {end - at}")
        result.setdefault(key, []).append(payload[at : at + size])
        at += size
    return result


def integer(value: bytes) -> int:
    """The number in a field's value. Raises `FrameError` where it is none."""
    if len(value) != _INT.size:
        raise FrameError(f"number of {len(value)} bytes")
    number: int = _INT.unpack(value)[0]
    return number


def octets(text: str) -> bytes:
    """The value that stands for a text; lone surrogates become the bytes that they stand for."""
    return text.encode("utf-8", "surrogateescape")


def text(value: bytes) -> str:
    """The text in a field's value; bytes that are no UTF-8 become lone surrogates."""
    return value.decode("utf-8", "surrogateescape")


def head(data: bytes | bytearray) -> tuple[int, int]:
    """Kind and payload size of the frame that `data` (at least HEAD_SIZE bytes) begins with."""
    kind, size = _HEAD.unpack_from(data)
    if kind not in KINDS or data[1:4] != b"\0\0\0":
        raise FrameError(f"no frame begins with {bytes(data[:HEAD_SIZE]).hex()}")
    if size > MAX_PAYLOAD:
        raise FrameError(f"payload of {size} bytes; at most {MAX_PAYLOAD}")
    return kind, size


class Decoder:
    """Turns a stream of bytes into frames: `feed` what arrived, get the frames that are whole."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that are complete with `data`, as (kind, payload). Raises `FrameError`."""
        buffer = self._data
        buffer += data
        result = []
        while len(buffer) >= HEAD_SIZE:
            kind, size = head(buffer)
            if len(buffer) < HEAD_SIZE + size:
                break
            result.append((kind, bytes(buffer[HEAD_SIZE : HEAD_SIZE + size])))
            del buffer[: HEAD_SIZE + size]
        return result

    @property
    def pending(self) -> int:
        """How many bytes of an incomplete frame are held."""
        return len(self._data)
