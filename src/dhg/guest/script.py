"""Runs a script as `python script.py` would: what it prints, how it fails, when it ends.

Guest code: standard library only. The traceback a user sees begins in the user's code: no frame of ours is in it.
"""

from __future__ import annotations

import _thread
import atexit
import linecache
import marshal
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from typing import Any

from ..wire import frames
from ..wire.compiling import compiled

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

    `file` is where it is found here, if that is another path or an absolute one: its `__file__`. `code` is what the source becomes
    when it is compiled, as `marshal` writes it; without, it is compiled here.
    """

    def __init__(
        self,
        source: bytes,
        filename: str,
        args: Sequence[str],
        names: dict[str, Any],
        *,
        file: str | None = None,
        code: bytes = b"",
    ) -> None:
        self.source = source
        self.code = code
        self.filename = filename
        self.args = args
        self.names = names
        self.file = file
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
        _flush_stdout()
        try:
            sys.stderr.flush()
        except (AttributeError, OSError, ValueError):
            pass
        return self.outcome

    def _execute(self) -> None:
        if self.code:
            code = marshal.loads(self.code)
        elif self.source.strip():
            code = compiled(self.source, self.filename)
        else:
            return
        # One expression and nothing else: its value is shown. That of statements is None.
        value = eval(code, self.names)
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
            current = threading.current_thread()
            for thread in threading.enumerate():
                if thread is not current and not thread.daemon and thread not in _OURS:
                    thread.join()
        atexit._run_exitfuncs()

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
            _flush_stdout()
            print(code, file=sys.stderr)
            self.outcome.exit_code = 1

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
            os.write(2, text.encode("utf-8", "backslashreplace"))


#: Threads that were there before the script.
_OURS: set[threading.Thread] = set()
_threads_before = -1


def settle() -> None:
    """Call once, when everything that is not the script's is up: what is there now is not waited for and not run again."""
    global _threads_before
    _OURS.update(threading.enumerate())
    _threads_before = _thread._count()
    atexit._clear()
    # A shell starts its background jobs with SIGINT ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
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


_FOLDER = os.path.dirname(os.path.dirname(__file__)) + "/"
