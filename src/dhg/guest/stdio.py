"""The script's stdin, stdout and stderr: byte exact, prompt, and quick all the same.

Guest code: standard library only. A line is passed on when it is complete, as on a terminal. Each takes a system call and an exit
to the VMM, so a script that prints many lines in a row is changed over to a buffer that a thread flushes a hundred times a second,
until it pauses.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time

#: Writes in a row after which output is buffered, the time between flushes, and the pause after which lines go out at once again.
BURST = 64
FLUSH_S = 0.01
PAUSE_S = 0.5


class Stdout(io.TextIOWrapper):
    """A text stream that counts its writes, and rings `bell` at every BURST of them.

    The count is kept here and not in a raw stream of ours: an exception that a signal raises between the system call and the
    return to the buffer would have the buffer write the same bytes again.
    """

    writes = 0
    bell: threading.Lock | None = None

    def write(self, text: str, /) -> int:
        """As the base class."""
        self.writes += 1
        if self.writes % BURST == 0 and self.bell is not None and self.bell.locked():
            self.bell.release()
        return _write(self, text)


# Not by super(), which is one more object to make for each write.
_write = io.TextIOWrapper.write


class Flusher:
    """The thread behind stdout. Sleeps on a lock until a burst begins: before that it costs nothing."""

    def __init__(self, stream: Stdout) -> None:
        self._stream = stream
        self._bell = stream.bell = threading.Lock()
        self._bell.acquire()
        threading.Thread(target=self._run, name="dhg-flusher", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._bell.acquire()
            try:
                self._serve()
            except (OSError, ValueError):
                pass  # the script has closed its stdout; the thread stays, see script.py, which counts them

    def _serve(self) -> None:
        self._stream.reconfigure(line_buffering=False)
        seen, since = self._stream.writes, time.monotonic()
        while time.monotonic() - since < PAUSE_S:
            time.sleep(FLUSH_S)
            self._stream.flush()
            if self._stream.writes != seen:
                seen, since = self._stream.writes, time.monotonic()
        self._stream.reconfigure(line_buffering=True)
        # A burst that is still on rings again.
        self._bell.acquire(blocking=False)


def attach(stdin: int, stdout: int, stderr: int) -> tuple[int, tuple[int, int]]:
    """Put the channels on descriptors 1 and 2 (of Python, the JVM and every child) and make the three streams anew.

    Descriptor 0 is /dev/null until there is input: what is returned first is to be put there by dup2 then. The others are stdout and
    stderr once more, for what is ours to say there: the script may redirect or close its own.
    """
    null = os.open("/dev/null", os.O_RDONLY)
    ends = os.dup(stdout), os.dup(stderr)
    for ours, fd in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(ours, fd, inheritable=True)
        os.close(ours)
    out = Stdout(_buffer(1), encoding="utf-8", errors="strict", line_buffering=True)
    err = io.TextIOWrapper(_buffer(2), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    vars(sys).update(stdin=_reader(), stdout=out, stderr=err)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=out, __stderr__=err)
    Flusher(out)
    return stdin, ends


def _buffer(fd: int) -> io.BufferedWriter:
    return io.BufferedWriter(io.FileIO(fd, "wb", closefd=False), 65536)


def _reader() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "rb", closefd=False)), encoding="utf-8", errors="strict")


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` to `fd`; blocks while the other side does not read."""
    done = os.write(fd, data)
    while done < len(data):
        data = data[done:]
        done = os.write(fd, data)
