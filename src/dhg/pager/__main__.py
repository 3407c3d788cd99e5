"""The pager's process: `python -m dhg.pager NAME=VALUE...`. Imports nothing but what serving takes.

    memory=PATH        the snapshot's memory file
    socket=PATH|fd:N   where the VMM connects: a path to listen at, or an inherited listening socket
    mode=MODE          lazy (default), eager (fill everything), set (fill the working set, then lazy), record (note it)
    chunk=BYTES        how much is filled around a fault (default 2 MiB; record takes 4096)
    set=PATH           the working set: read by mode=set, written by mode=record when the VMM has ended
    status=N           inherited descriptor for `ready` (what was to be filled ahead is there) and, at the end, one line of JSON
    timeout=S          how long to wait for the VMM (default 60)

Ends with the VMM, with status 0. Where it cannot serve, it kills the VMM, which would hang for good otherwise, says why on stderr
and ends with status 1.
"""

from __future__ import annotations

import _signal
import _socket
import os
import resource
import sys
import time

from ..errors import DhgError, UsageError
from . import handshake, serve, workingset
from .handshake import Peer
from .source import Source
from .uffd import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODES = ("lazy", "eager", "set", "record")
_DEFAULTS = {"mode": "lazy", "chunk": "", "set": "", "status": "-1", "timeout": "60", "memory": "", "socket": ""}


def options(argv: list[str]) -> dict[str, str]:
    """The options of a command line. Raises `UsageError`."""
    found = dict(_DEFAULTS)
    for item in argv:
        name, equals, value = item.partition("=")
        if name not in found or not equals:
            raise UsageError(f"not an option: {item!r}", hint=__doc__)
        found[name] = value
    if found["mode"] not in MODES:
        raise UsageError(f"not a mode: {found['mode']!r}")
    if not found["memory"] or not found["socket"]:
        raise UsageError("memory= and socket= are needed", hint=__doc__)
    if found["mode"] in ("set", "record") and not found["set"]:
        raise UsageError(f"mode={found['mode']} needs set=PATH")
    return found


def chunk_size(text: str) -> int:
    """A chunk size in bytes. Raises `UsageError` unless it is a power of two from a page to 1 GiB."""
    if not text.isdigit() or not PAGE <= (size := int(text)) <= 1 << 30 or size & (size - 1):
        raise UsageError(f"not a chunk size: {text!r}", hint="a power of two from 4096 on")
    return size


def _listener(where: str) -> _socket.socket:
    if where.startswith("fd:"):
        return _socket.socket(fileno=int(where[3:]))
    try:
        return handshake.listen(where)
    except OSError as error:
        raise UsageError(f"cannot listen at {where}: {error.strerror}") from error


def _ahead(pager: serve.Pager, work: Iterator[None], tell: Callable[[str], None]) -> Iterator[None]:
    yield from work
    tell("ready")


def _serve(peer: Peer, source: Source, found: dict[str, str], tell: Callable[[str], None]) -> dict[str, int]:
    mode = found["mode"]
    memory = os.fstat(source.fd)
    touched: set[int] | None = set() if mode == "record" else None
    chunk = PAGE if mode == "record" else chunk_size(found["chunk"] or str(serve.STEP))
    pager = serve.Pager(peer, source, chunk=chunk, touched=touched)
    work: Iterator[None] = iter(())
    threads = min(8, len(os.sched_getaffinity(0)))
    if mode == "set":
        work = pager.fill_set(workingset.load(found["set"], memory), threads)
    elif mode == "eager":
        work = pager.fill_all(threads)
    pager.run(_ahead(pager, work, tell))
    if touched is not None:
        workingset.save(found["set"], workingset.merge(touched), memory)
    return pager.counts


def run(argv: list[str]) -> int:
    """Serve one VMM; the exit status. Raises `DhgError` before there is one."""
    found = options(argv)
    status = int(found["status"])

    def tell(line: str) -> None:
        try:
            os.write(status, line.encode() + b"\n")
        except OSError:
            pass  # nobody asked, or nobody listens any more

    # A reader that goes away must not end the guest.
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
    source = Source(found["memory"])
    listener = _listener(found["socket"])
    peer = handshake.accept(listener, memory_bytes=source.size, timeout_s=float(found["timeout"]))
    listener.close()
    if peer is None:
        return 0
    began = time.monotonic()
    try:
        counts = _serve(peer, source, found, tell)
    except BaseException:
        # Its threads wait for pages that nobody will bring.
        _signal.pidfd_send_signal(peer.pidfd, _signal.SIGKILL)
        raise
    finally:
        peer.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    times = {"user_s": used.ru_utime, "system_s": used.ru_stime, "served_s": round(time.monotonic() - began, 4)}
    tell("{" + ", ".join(f'"{name}": {value}' for name, value in {**counts, **times}.items()) + "}")
    return 0


def main(argv: list[str] | None = None) -> None:
    """Run, and end the process."""
    try:
        code = run(sys.argv[1:] if argv is None else argv)
    except DhgError as error:
        os.write(2, f"pager: {error}\n".encode())
        code = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        code = 130
    # Threads that fill may still be at it, and the mapping of the memory file need not be undone page by page.
    os._exit(code)


if __name__ == "__main__":
    main()
