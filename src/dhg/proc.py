"""The only place that makes processes. On the hot path: imports `os` and `fcntl`, and once there is a child `select`.

A child has its own process group, stdin from /dev/null, a minimal environment, and exactly the descriptors it was
given. Every wait has a deadline. Leaving a `Process` is TERM, a grace period, KILL, reap.
"""

from __future__ import annotations

import fcntl
import os
import time

from .errors import DeadlineExceeded, DhgError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The numbers of the `signal` module, whose import builds enums.
SIGINT, SIGKILL, SIGPIPE, SIGALRM, SIGTERM, SIGCHLD = 2, 9, 13, 14, 15, 17
SIG_DFL, SIG_IGN = 0, 1

MINIMAL_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "USER", "LOGNAME")


class CommandFailed(DhgError):
    """A program ended with a status other than zero."""

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        super().__init__(f"{argv[0]} ended with status {status}", detail=output or None)
        self.argv = list(argv)
        self.status = status


def minimal_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of ours that a child gets, and `extra`."""
    env = {name: os.environ[name] for name in MINIMAL_ENV if name in os.environ}
    env.setdefault("PATH", os.defpath)
    if extra:
        env.update(extra)
    return env


def find_program(name: str, *, path: str | None = None) -> str | None:
    """The path of an executable; system directories are searched even when PATH lacks them."""
    if "/" in name:
        return name if os.access(name, os.X_OK) and os.path.isfile(name) else None
    places = (path or os.environ.get("PATH", os.defpath)).split(":") + ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
    for place in places:
        candidate = f"{place}/{name}"
        if place and os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return candidate
    return None


class Process:
    """A running child. Use as a context manager; leaving it ends the child and reaps it."""

    __slots__ = ("argv", "pid", "pidfd", "status")

    def __init__(self, pid: int, argv: Sequence[str]) -> None:
        self.pid = pid
        self.argv = argv
        self.pidfd = os.pidfd_open(pid)
        #: Exit status, or minus the signal that ended it; None while it runs.
        self.status: int | None = None

    def poll(self) -> int | None:
        """The exit status if the child has ended."""
        return self._reap(os.WNOHANG)

    def wait(self, timeout_s: float) -> int | None:
        """The exit status, or None if the child still runs after `timeout_s` seconds."""
        if self.status is None:
            import select

            poller = select.poll()
            poller.register(self.pidfd, select.POLLIN)
            deadline = Deadline(timeout_s)
            while not poller.poll(deadline.left_ms()):
                if deadline.left() == 0.0:
                    return None
        return self._reap(0)

    def kill(self) -> None:
        """KILL the child and reap it. Does nothing if it has ended."""
        if self.status is None:
            os.kill(self.pid, SIGKILL)
            self._reap(0)

    def stop(self, *, grace_s: float = 2.0) -> None:
        """TERM the child's process group, KILL it after `grace_s` seconds, reap."""
        if self.status is None:
            _signal_group(self.pid, SIGTERM)
            if self.wait(grace_s) is None:
                _signal_group(self.pid, SIGKILL)
                self._reap(0)
        self.close()

    def close(self) -> None:
        """Give the pidfd back. The child must have been reaped."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _reap(self, flags: int) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def spawn(
    argv: Sequence[str],
    *,
    fds: Mapping[int, int] | None = None,
    env: Mapping[str, str] | None = None,
    program: str | None = None,
) -> Process:
    """Start `program`, or `argv[0]` (a path).

    `fds` maps the child's descriptor numbers to ours; 0 defaults to /dev/null, 1 and 2 are ours where not named.
    Raises `HostError` if it cannot be started.
    """
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
    given = fds or {}
    if 0 not in given:
        actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))
    # dup2 of a descriptor onto itself would leave it closed on exec, and a target that is another's source would be
    # overwritten before it is used: move such sources out of the way. 0 always is a target.
    moved: dict[int, int] = {}
    for ours in given.values():
        if (ours in given or ours == 0) and ours not in moved:
            moved[ours] = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, max(given) + 1)
    for number, ours in given.items():
        actions.append((os.POSIX_SPAWN_DUP2, moved.get(ours, ours), number))
    try:
        pid = os.posix_spawn(
            program or argv[0],
            list(argv),
            minimal_env() if env is None else env,
            file_actions=actions,
            setpgroup=0,
            setsigmask=(),
            # One that inherits SIGCHLD as ignored cannot wait for its own children.
            setsigdef=(SIGINT, SIGPIPE, SIGTERM, SIGCHLD),
        )
    except OSError as error:
        raise HostError(f"cannot start {program or argv[0]}: {error.strerror}") from error
    finally:
        for fd in moved.values():
            os.close(fd)
    return Process(pid, argv)


# fcntl.h; the module has F_SETOWN but not this one.
F_SETSIG = 10


def kill_with_us(pid: int, leash: int) -> None:
    """Have the kernel send SIGKILL to `pid` when the other end of the pipe `leash` is closed.

    `leash` is our copy of the read end that the child inherited. Nobody else may hold the write end.
    """
    fcntl.fcntl(leash, fcntl.F_SETOWN, pid)
    fcntl.fcntl(leash, F_SETSIG, SIGKILL)
    fcntl.fcntl(leash, fcntl.F_SETFL, os.O_ASYNC)


# Far above what distributions and subordinate ids use; one for each client process, so that a VMM which has been broken into
# finds nothing else that runs as its user.
UNPRIVILEGED_BASE = 0x7000_0000


def unprivileged_id() -> int:
    """The user (and group) id that a VMM is to change to; 0 if we are not root and there is nothing to give up."""
    if os.geteuid() != 0:
        return 0
    wanted = UNPRIVILEGED_BASE + os.getpid()
    # In a user namespace only mapped ids can be changed to (user_namespaces(7)).
    largest = 0
    try:
        with open("/proc/self/uid_map", "rb") as file:
            for line in file:
                first, _, count = [int(word) for word in line.split()]
                if first <= wanted < first + count:
                    return wanted
                largest = max(largest, first + count - 1)
    except (OSError, ValueError):
        pass
    return min(largest, 65534)


def limit(pid: int, *, address_space_bytes: int, files: bool = True) -> None:
    """Bound what a child may take: address space, no core; with `files` (a VMM) also no files written, few descriptors."""
    import resource

    limits = [(resource.RLIMIT_AS, address_space_bytes), (resource.RLIMIT_CORE, 0)]
    if files:
        # Room for what it says of itself into the log that it inherits.
        limits += [(resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_NOFILE, 512)]
    for kind, value in limits:
        try:
            resource.prlimit(pid, kind, (value, value))
        except (OSError, ValueError):
            # A lower hard limit of the caller's is stricter than ours.
            pass
    try:
        # Where the host runs out of memory, a VM goes first: it can be run again.
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"500")
        os.close(fd)
    except OSError:
        pass


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    log: str | None = None,
) -> str:
    """Run a program to its end and return its stdout (with stderr), or append both to the file `log`.

    Raises `CommandFailed` for a status other than zero, `DeadlineExceeded` after `timeout_s` seconds, `HostError` if
    the program is not there. No child is left in any case.
    """
    program = find_program(argv[0])
    if program is None:
        raise HostError(f"program not found: {argv[0]}")
    out = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600) if log else os.memfd_create("dhg-output")
    try:
        start = os.lseek(out, 0, os.SEEK_END)
        with spawn([program, *argv[1:]], fds={1: out, 2: out}, env=env) as child:
            status = child.wait(timeout_s)
            if status is None:
                child.stop()
        text = os.pread(out, 16 << 20, start).decode("utf-8", "replace")
    finally:
        os.close(out)
    if status is None:
        raise DeadlineExceeded(f"{argv[0]} did not end within {timeout_s:g} s", detail=tail(text))
    if status:
        raise CommandFailed([program, *argv[1:]], status, tail(text))
    return text


def tail(text: str, lines: int = 20) -> str:
    """The last `lines` lines of `text`."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def usage(pid: int) -> dict[str, int]:
    """Page faults and bytes read from disk of a running process (proc(5): stat, io); zeros where that is not to be had."""
    found = {"pages_faulted": 0, "major_faults": 0, "bytes_read": 0}
    try:
        with open(f"/proc/{pid}/stat") as file:
            words = file.read().rpartition(")")[2].split()
        found["pages_faulted"] = int(words[7]) + int(words[9])
        found["major_faults"] = int(words[9])
        with open(f"/proc/{pid}/io") as file:
            found["bytes_read"] = next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))
    except (OSError, ValueError, StopIteration):
        pass
    return found


def cpu_model() -> str:
    """The host's CPU by name, and its flags' number: part of what a KVM snapshot depends on."""
    model = flags = ""
    # The first CPU is in the first page of it; making up the entries of many more would take milliseconds.
    fd = os.open("/proc/cpuinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, 4096).decode("utf-8", "replace")
    finally:
        os.close(fd)
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and not model:
            model = value.strip()
        if name.strip() == "flags" and not flags:
            flags = value
    return f"{model} ({len(flags.split())} flags)"


#: The longest single wait: poll(2) takes no more than 2**31 ms, and setitimer(2) is as particular.
LONGEST_WAIT_S = 3600.0


class Deadline:
    """A point on the monotonic clock, however far off; `left()` are the seconds until then, at least 0."""

    __slots__ = ("at", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.at = time.monotonic() + timeout_s

    def left(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self.at - time.monotonic())

    def left_ms(self) -> float:
        """How long to poll, in ms: until it has passed, or LONGEST_WAIT_S. So where nothing came, `left()` says whether it has."""
        return min(self.left(), LONGEST_WAIT_S) * 1000
