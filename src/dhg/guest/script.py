"""Runs a script as `python script.py` would: what it prints, how it fails, when it ends.

Guest code: standard library only. The traceback a user sees begins in the user's code: no frame of ours is in it.
"""

from __future__ import annotations

import _thread
import atexit
import gc
import io
import linecache
import logging
import mmap
import os
import signal
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Sequence
from typing import Any

from ..wire import frames

#: repr of a result and message of an exception, in what is reported; the text that is printed is never cut.
MAX_REPORTED = 1 << 20


class Outcome:
    """How a script ended."""

    __slots__ = ("error", "exit_code", "output_error", "raised", "result_repr")

    def __init__(self) -> None:
        self.exit_code = 0
        self.result_repr: str | None = None
        #: Type, message and traceback of the exception that ended the script; None if none did.
        self.error: tuple[str, str, str] | None = None
        #: Whether an exception other than SystemExit ended it.
        self.raised = False
        #: Why its tables could not be written to where they were wanted.
        self.output_error: str | None = None


class Script:
    """One script to be run once. `filename` as given by the user; `<string>` for `-c`, `<stdin>` for `-`.

    `file` is where it is found here, if that is another path or an absolute one: its `__file__`.
    """

    def __init__(
        self,
        source: bytes,
        filename: str,
        args: Sequence[str],
        names: dict[str, Any],
        *,
        file: str | None = None,
    ) -> None:
        self.source = source
        self.filename = filename
        self.args = args
        self.names = names
        self.file = file
        #: Whether nothing runs after it in this interpreter, which may then be wound up as if it ended.
        self.last = False
        self.outcome = Outcome()

    def run(self, *, end: bool = True) -> Outcome:
        """Run it to its end; with `end`, that of its threads and exit handlers included."""
        if self.filename[:1] != "<":
            sys.argv = [self.filename]
            self.names["__file__"] = self.file or self.filename
        else:
            sys.argv = ["-c" if self.filename == frames.STRING else "-"]
        if self.args:
            sys.argv += self.args
        self._guard(self._execute)
        if end:
            self._guard(self._wind_up)
        _flush_both()
        if _forked:
            # A copy that the script has made of this process, and that has come to its end: the report is the original's.
            os._exit(self.outcome.exit_code)
        return self.outcome

    def finish(self, *, files: bool) -> None:
        """What the interpreter does when its objects go: finalizers, and with `files` whatever has not been written of open files.

        The objects stay: threads of the script's and the JVM's may be at work with them.
        """
        for value in list(self.names.values()):
            if isinstance(getattr(type(value), "__del__", None), types.FunctionType):
                quietly(value.__del__)
        if files:
            # What was there before the script is frozen or, in a process of the host's, of no consequence.
            texts, buffers, compressed = list[Any](), list[Any](), list[Any]()
            for generation in range(3):
                for each in reversed(gc.get_objects(generation)):
                    kind = type(each)
                    if issubclass(kind, io.TextIOWrapper):
                        texts.append(each)
                    elif issubclass(kind, _WRITERS):
                        buffers.append(each)
                    elif issubclass(kind, io.BufferedIOBase) and kind.__module__ != "_io":
                        # A compressed file, say, which is complete with its last bytes only.
                        compressed.append(each)
            # First what is furthest from the disk. Which is the younger one does not tell: collections of garbage mix them.
            for step in [*(each.flush for each in texts + buffers), *(each.close for each in compressed)]:
                quietly(step)
            for each in buffers:
                quietly(each.flush)
        _flush_both()

    def _execute(self) -> None:
        if not self.source.strip():
            return
        # One expression and nothing else: its value is shown. That of statements is None.
        value = eval(_compiled(self.source, self.filename), self.names)
        if value is not None:
            text = repr(value)
            self.outcome.result_repr = text[:MAX_REPORTED]
            try:
                print(text)
            except UnicodeEncodeError:
                print(text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))

    def _wind_up(self) -> None:
        # As the interpreter does at its end: first the threads, then the exit handlers.
        if _thread._count() != _threads_before:
            if self.last:
                # Executors end their threads by this, and take no more work for good.
                for call in reversed(threading._threading_atexits):  # type: ignore[attr-defined]
                    call()
            # A thread may have started others meanwhile.
            while threads := _threads():
                for thread in threads:
                    thread.join()
        atexit._run_exitfuncs()
        if self.last and len(logging._handlerList) > _handlers_before:  # type: ignore[attr-defined]
            # Its exit handler was among those of the server.
            logging.shutdown()

    def _guard(self, step: Any) -> None:
        # Two frames of ours lie above the user's: this one and that of the step.
        try:
            step()
        except SystemExit as stop:
            self._stopped(stop)
        except BaseException as error:
            self._failed(error)

    def _stopped(self, stop: SystemExit) -> None:
        code = stop.code
        if code is None:
            self.outcome.exit_code = 0
        elif isinstance(code, int):
            self.outcome.exit_code = code & 0xFF
        else:
            self.outcome.exit_code = 1
            _flush_stdout()
            try:
                print(code, file=sys.stderr)
            except Exception:
                # Closed, say.
                _say(f"{code}\n")

    def failed(self, error: BaseException) -> Outcome:
        """How it ended, where something went wrong after it."""
        self._failed(error)
        return self.outcome

    def _failed(self, error: BaseException) -> None:
        self.outcome.exit_code = 130 if isinstance(error, KeyboardInterrupt) else 1
        self.outcome.raised = True
        source = self.source.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
        linecache.cache[self.filename] = (len(source), None, source.splitlines(keepends=True), self.filename)
        trace = _without_ours(error.__traceback__)
        error.__traceback__ = trace
        _flush_stdout()
        kind = type(error)
        name = (
            kind.__qualname__
            if kind.__module__ in ("builtins", "__main__")
            else f"{kind.__module__}.{kind.__qualname__}"
        )
        try:
            message = str(error)
            text = "".join(traceback.format_exception(kind, error, trace))
        except BaseException as again:
            message, text = f"<{type(again).__name__} in str()>", f"{name}\n"
        self.outcome.error = (name, message[:MAX_REPORTED], text[:MAX_REPORTED])
        try:
            if sys.excepthook is not sys.__excepthook__:
                sys.excepthook(kind, error, trace)
            else:
                sys.stderr.write(text)
        except BaseException:
            _say(text)


#: What no expression begins with. A look at it spares most scripts of several lines being compiled twice.
_STATEMENTS = frozenset(b"import from def class for while with try async if".split())


def _compiled(source: bytes, filename: str) -> types.CodeType:
    """The code of a script: where it is one expression and nothing else, that of the expression, whose value is then shown.

    Nothing of it is run. Raises what `compile` does: `SyntaxError`, `ValueError` (NUL bytes), `RecursionError`, `MemoryError`.
    """
    if source.split(None, 1)[0] not in _STATEMENTS:
        # On its own, so that another error is not raised while this SyntaxError is handled and becomes its context.
        code = _expression(source, filename)
        if code is not None:
            return code
    return compile(source, filename, "exec", dont_inherit=True, optimize=0)


def _expression(source: bytes, filename: str) -> types.CodeType | None:
    try:
        return compile(source, filename, "eval", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        return None


#: Threads that were there before the script.
_OURS: set[threading.Thread] = set()
_threads_before = -1
_handlers_before = 0
#: The streams that the script finds. It may put its own in their place, above these or not.
_STREAMS: tuple[Any, Any] = (None, None)
#: Whether this process is a copy that a script has made by `os.fork`.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


def settle() -> None:
    """Call when everything that is not the script's is up: what is there now is not waited for and not run again."""
    global _threads_before, _handlers_before, _STREAMS
    if _threads_before < 0:
        os.register_at_fork(after_in_child=_note_fork)
    _OURS.update(threading.enumerate())
    _threads_before = _thread._count()
    _handlers_before = len(logging._handlerList)  # type: ignore[attr-defined]
    _STREAMS = sys.stdout, sys.stderr
    atexit._clear()
    # The first finalizer of the script's registers with `atexit` again, for all there are.
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    # A shell starts its background jobs with SIGINT ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _threads() -> list[threading.Thread]:
    """The threads to be waited for."""
    current = threading.current_thread()
    return [each for each in threading.enumerate() if each is not current and not each.daemon and each not in _OURS]


def _flush(name: str, ours: Any) -> None:
    """Flush stdout or stderr: what the script has there, and the stream that it found."""
    try:
        stream = getattr(sys, name)
        stream.flush()
    except Exception:
        stream = None
    if stream is not ours and ours is not None:
        quietly(ours.flush)


def _flush_stdout() -> None:
    _flush("stdout", _STREAMS[0])


def _flush_both() -> None:
    _flush("stdout", _STREAMS[0])
    _flush("stderr", _STREAMS[1])


def _say(text: str) -> None:
    """Write to the script's stderr where `sys.stderr` does not take it."""
    try:
        os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def quietly(step: Any) -> None:
    """Take a step that may fail."""
    try:
        step()
    except Exception:
        pass


def _without_ours(trace: types.TracebackType | None) -> types.TracebackType | None:
    """`trace` from the first frame of the user's to the last: an interrupt is raised by a handler of ours."""
    while trace is not None and _ours(trace):
        trace = trace.tb_next
    last, entry = trace, trace
    while entry is not None:
        if not _ours(entry):
            last = entry
        entry = entry.tb_next
    if last is not None:
        last.tb_next = None
    return trace


def _ours(entry: types.TracebackType) -> bool:
    return entry.tb_frame.f_code.co_filename.startswith(_FOLDER)


#: What has bytes that are not yet where they are to be, beside text files.
_WRITERS = (io.BufferedWriter, io.BufferedRandom, mmap.mmap)

_FOLDER = os.path.dirname(__file__) + "/"
