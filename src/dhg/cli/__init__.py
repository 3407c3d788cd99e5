"""The command line. The only package that reads argv, prints, or exits.

`main` is on the hot path of `dhg exec --vm`: each verb's module is imported when that verb is asked for.
"""

from __future__ import annotations

import _signal  # not `signal`, which builds enums at import
import os
import sys

from ..errors import DhgError, HostError
from ..proc import SIG_DFL, SIGCHLD, SIGPIPE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

HELP = """\
dhg: run a Deephaven script in a microVM of its own, restored from a warm snapshot

usage: dhg exec --vm -c CODE          run a line of Python
       dhg exec --vm SCRIPT [ARG...]  run a file (- for stdin)
       dhg vm prepare                 make the snapshot that `exec --vm` restores
       dhg vm status                  what this host can do, and the snapshots it has
       dhg vm verify                  restore clones and compare them
       dhg vm clean                   remove snapshots
       dhg doctor                     what this host lacks, and what to do about it
       dhg completion SHELL           completion for bash, zsh, fish

`dhg VERB --help` says more about a verb. Data live in DHG_HOME (default ~/.dhg).

examples:
  dhg vm prepare
  dhg exec --vm -c "print('hello')"
  cat script.py | dhg exec --vm -
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process); the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else "--help"
    debug = "--debug" in argv
    try:
        if verb == "exec":
            from . import exec_

            return exec_.main(argv[1:])
        if verb == "vm":
            from . import vm

            return vm.main(argv[1:])
        if verb == "doctor":
            from . import doctor

            return doctor.main(argv[1:])
        if verb == "completion":
            from . import completion

            return completion.main(argv[1:])
        if verb in ("--help", "-h", "help"):
            sys.stdout.write(HELP)
            return 0
        if verb in ("--version", "-V"):
            from .. import __version__

            print(f"dhg {__version__}")
            return 0
        from ..errors import UsageError

        raise UsageError(f"no such command: {verb}", hint="`dhg --help` lists them")
    except DhgError as error:
        if debug:
            raise
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough. What is buffered cannot be written any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + SIGPIPE
    except OSError as error:
        if debug:
            raise
        show_error(host_error(error))
        return HostError.exit_code


def run() -> NoReturn:
    """Run the command line of this process and end it.

    Without the interpreter's own way out, which takes as long as a VM's first output: everything of ours is closed, and nothing
    is left to write but the standard streams.
    """
    # A caller's `trap '' CHLD` is inherited: the kernel would reap our children itself, and nobody could wait for them.
    _signal.signal(SIGCHLD, SIG_DFL)
    _fill_descriptors()
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    else:
        code = _flush(code)
    os._exit(code)


def _fill_descriptors() -> None:
    """Put /dev/null where the caller has closed one of our standard descriptors: the next file opened would take its number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Gets the lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if fd else os.O_RDONLY), True)
            # Python has made none of a descriptor that it found closed.
            stream = open(fd, "w" if fd else "r", errors="replace", closefd=False)
            setattr(sys, ("stdin", "stdout", "stderr")[fd], stream)


def _flush(code: int) -> int:
    """Write what the standard streams still hold; the exit code, which was to be `code`."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        return 128 + SIGPIPE
    except OSError as error:
        # An error's code: that has been shown, and may well be this one.
        if not code:
            show_error(host_error(error))
            return HostError.exit_code
    return code


def host_error(error: OSError) -> HostError:
    """What the operating system refused and nobody has translated, as an error of ours."""
    if isinstance(error, FileNotFoundError) and error.filename is None:
        try:
            os.getcwd()
        except OSError:
            return HostError("the working directory does not exist any more", hint="cd to another one")
    why, name = error.strerror or str(error), error.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    return HostError(why if name is None else f"{name}: {why}")


def show_error(error: DhgError) -> None:
    """Print an error as `error:`, what is known in detail, and `hint:`, on stderr."""
    text = f"error: {error}\n"
    if error.detail:
        text += "".join(f"  {line}\n" for line in error.detail.splitlines())
    if error.hint:
        text += f"hint: {error.hint}\n"
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass
