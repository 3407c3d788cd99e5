"""The snapshot store: layout, lookup, locks, removal. On the hot path: imports `os`, `fcntl` (built in) and the frame format.

    DHG_HOME/snapshots/<version>/<engine>          link to the generation in use
    DHG_HOME/snapshots/<version>/.<engine>-<hex>/  a generation:
        launch         what a restore needs (below), written last but for the link
        manifest.json  every input and checksum, for `dhg vm status` and people
        ram, state     guest memory (sparse) and device state
        checkpoint     QEMU's process, as a program (engine/checkpoint.py)
        kernel         the head of the kernel that the guest was booted with
        lock           held shared by every VM of this generation, also by the VMM itself
        console.log    the guest's console during prepare

`launch` is a list of fields (see wire/frames.py) so that it is read without a parser that would have to be imported.
A generation is never changed once the link points to it; a new one takes its place by renaming the link.
"""

from __future__ import annotations

import fcntl
import os
import time

from .. import config, proc
from ..errors import SnapshotError, SnapshotMissing
from ..wire import frames

#: Version of `launch` and of the manifest.
FORMAT = 4

#: How often a lock is tried, every 10 ms.
LOCK_TRIES = 1000

L_FORMAT = 1
L_ARG = 2  # the restore's command line, one argument a field
L_CHECK = 3  # "size mtime_ns path" of a file that must not have changed
L_ACCEL = 4
L_VERSION = 5
L_ENGINE = 6
L_MEMORY_MIB = 8
L_CPU = 9  # the CPU of the host that made it, where the guest sees that CPU (KVM)
L_ENGINE_VERSION = 16  # where the restore depends on it
L_BASE_NS = 7  # the guest's monotonic clock at the moment of a resume
L_AHEAD = 17  # pages of `ram` that every clone touches, see readahead.py
L_AHEAD_OWN = 21  # pages of `checkpoint` that every clone touches
L_MAPPED = 19  # "size mtime_ns path" of a file that `checkpoint` maps
L_HOST = 20  # where it holds, see `host`


class Snapshot:
    """A snapshot that is locked against removal; `lock` is a descriptor to pass to the VMM and then close."""

    __slots__ = (
        "accel",
        "ahead",
        "ahead_own",
        "argv",
        "base_ns",
        "checkpoint",
        "engine",
        "engine_version",
        "lock",
        "memory_mib",
        "path",
        "version",
    )

    def __init__(
        self,
        path: str,
        version: str,
        engine: str,
        accel: str,
        argv: list[str],
        lock: int,
        *,
        memory_mib: int,
        base_ns: int,
        engine_version: str = "",
        ahead: bytes = b"",
        ahead_own: bytes = b"",
        checkpoint: str | None = None,
    ) -> None:
        self.path = path
        self.version = version
        self.engine = engine
        self.accel = accel
        #: The restore's command line.
        self.argv = argv
        self.lock = lock
        self.memory_mib = memory_mib
        #: The VMM's version, where a restore depends on it.
        self.engine_version = engine_version
        #: The guest's monotonic clock at the moment of a resume; 0 while it is not known.
        self.base_ns = base_ns
        #: Pages of `ram` to be read ahead, see readahead.py; empty where they are not known.
        self.ahead = ahead
        #: The same for `checkpoint`.
        self.ahead_own = ahead_own
        #: QEMU's process with what it has translated, as a program; None where there is none that fits this host.
        self.checkpoint = checkpoint

    @property
    def state(self) -> str:
        """The device state."""
        return self.path + "/state"


def prepare_command(version: str | None = None, *, engine: str | None = None, accel: str | None = None) -> str:
    """The command that makes a snapshot; QEMU is what it takes by default."""
    more = (f" --version {version}" if version else "") + (" --engine firecracker" if engine == "firecracker" else "")
    return f"dhg vm prepare{more}" + (f" --accel {accel}" if accel else "")


def prepare_hint(version: str | None = None, *, engine: str | None = None, accel: str | None = None) -> str:
    """The next step where a snapshot is missing or does not fit."""
    return f"run `{prepare_command(version, engine=engine, accel=accel)}`"


def versions() -> list[str]:
    """The versions that have a snapshot, newest snapshot first."""
    root = config.snapshots_dir()
    found = []
    try:
        names = os.listdir(root)
    except OSError:
        return []
    for name in names:
        try:
            newest = max(
                os.stat(f"{root}/{name}/{engine}").st_mtime_ns
                for engine in ("qemu", "firecracker")
                if os.path.exists(f"{root}/{name}/{engine}")
            )
        except (OSError, ValueError):
            continue
        found.append((newest, name))
    return [name for _, name in sorted(found, reverse=True)]


def resolve_version(version: str | None) -> str:
    """The version to use: `version`, `DHG_VERSION`, or the newest snapshot's. Raises `SnapshotMissing`.

    The bare snapshot is only taken where it is asked for.
    """
    version = version or os.environ.get("DHG_VERSION")
    if version:
        return config.check_version(version)
    found = versions()
    if found[:1] == [config.BARE]:
        del found[0]
    if not found:
        raise SnapshotMissing("there is no snapshot of Deephaven yet", hint=prepare_hint())
    return found[0]


def choose(version: str | None = None, engine: str | None = None) -> tuple[str, str]:
    """The version and the engine whose snapshot is taken, whether it is there or not, as `open_snapshot` has them.

    Raises `SnapshotMissing` if there is no snapshot of Deephaven at all, `UsageError` for a version or an engine that cannot be.
    """
    version = resolve_version(version)
    return version, engine or config.engine() or _engine_in(f"{config.snapshots_dir()}/{version}")


def open_snapshot(version: str | None = None, *, engine: str | None = None, accel: str | None = None) -> Snapshot:
    """Look a snapshot up, check that it fits, and lock it against removal.

    `engine` is qemu or firecracker; by default `DHG_ENGINE`, then whichever has a snapshot, QEMU first.
    A snapshot runs under the acceleration that it was made with; one made with another than `accel`, if given, is refused.

    Raises `SnapshotMissing` if there is none of that version, `SnapshotError` if it is damaged or does not fit this host.
    """
    version, engine = choose(version, engine)
    link = f"{config.snapshots_dir()}/{version}/{engine}"
    # A prepare may replace the generation between our look at the link and our lock.
    name = None
    while True:
        try:
            before, name = name, os.readlink(link)
        except OSError:
            raise SnapshotMissing(
                f"there is no snapshot of {config.title(version)}", hint=prepare_hint(version, engine=engine)
            ) from None
        path = f"{os.path.dirname(link)}/{name}"
        lock = -1
        try:
            lock = lock_shared(path)
            snapshot = read(path, version, engine, lock)
            if accel not in (None, snapshot.accel):
                raise SnapshotError(
                    f"the snapshot of {config.title(version)} was made under {snapshot.accel.upper()}"
                    f" and does not run under {accel.upper()}",
                    hint=prepare_hint(version, engine=engine, accel=accel) + ", or leave --accel out",
                )
            return snapshot
        except FileNotFoundError as error:
            if lock >= 0:
                os.close(lock)
            if name == before:
                raise SnapshotError(
                    f"the snapshot of {config.title(version)} is damaged: there is no {error.filename}",
                    hint=prepare_hint(version, engine=engine) + " to make it anew",
                ) from None
        except BaseException:
            if lock >= 0:
                os.close(lock)
            raise


def _engine_in(folder: str) -> str:
    if not os.path.lexists(f"{folder}/qemu") and os.path.lexists(f"{folder}/firecracker"):
        return "firecracker"
    return "qemu"


def lock_shared(generation: str) -> int:
    """Lock a generation against removal; the descriptor to close. Raises `SnapshotError`, `FileNotFoundError`."""
    path = generation + "/lock"
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    # Whoever holds it exclusively looks whether it is in use, or is removing it, and is done in a moment.
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            time.sleep(0.01)
    os.close(fd)
    raise SnapshotError(f"{path} has been locked for {LOCK_TRIES // 100} s", hint="is a `dhg vm clean` stuck?")


def read(path: str, version: str, engine: str, lock: int) -> Snapshot:
    """The snapshot in the directory `path`, checked. Raises `SnapshotError`, `FileNotFoundError`."""
    damaged = f"the snapshot of {config.title(version)} is damaged"
    hint = prepare_hint(version, engine=engine) + " to make it anew"
    fd = os.open(path + "/launch", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, 1 << 20)
    finally:
        os.close(fd)
    try:
        found = frames.fields(data)
        form = frames.integer(found[L_FORMAT][0])
        if form != FORMAT:
            raise SnapshotError(f"{path} has format {form}; this dhg reads {FORMAT}", hint=hint)
        argv = [os.fsdecode(value) for value in found[L_ARG]]
        accel = frames.text(found[L_ACCEL][0])
        memory_mib = frames.integer(found[L_MEMORY_MIB][0])
        base_ns = frames.integer(found[L_BASE_NS][0]) if L_BASE_NS in found else 0
        engine_version = frames.text(found[L_ENGINE_VERSION][0]) if L_ENGINE_VERSION in found else ""
        ahead = found[L_AHEAD][0] if L_AHEAD in found else b""
        ahead_own = found[L_AHEAD_OWN][0] if L_AHEAD_OWN in found else b""
        if problem := _changed(found[L_CHECK]):
            raise SnapshotError(f"the snapshot of {config.title(version)} does not fit: {problem}", hint=hint)
        if accel == "kvm":
            _check_kvm(version, engine, frames.text(found[L_CPU][0]))
        checkpoint = None
        if (
            L_MAPPED in found
            and config.use_checkpoint()
            and found[L_HOST][0] == host()
            and not _changed(found[L_MAPPED])
        ):
            checkpoint = path + "/checkpoint"
    except (frames.FrameError, KeyError, ValueError) as error:
        raise SnapshotError(f"{damaged}: {path}/launch", hint=hint) from error
    return Snapshot(
        path,
        version,
        engine,
        accel,
        argv,
        lock,
        memory_mib=memory_mib,
        base_ns=base_ns,
        engine_version=engine_version,
        ahead=bytes(ahead),
        ahead_own=bytes(ahead_own),
        checkpoint=checkpoint,
    )


def host() -> bytes:
    """What a checkpoint holds for: this build of the kernel, whose vdso is in it, and this CPU."""
    system = os.uname()
    return os.fsencode(f"{system.release} {system.version} {proc.cpu_model()}")


def _changed(checks: list[bytes]) -> str | None:
    """Which of the files is not as it was recorded, and how; None if all are. Raises `ValueError` for what is no record."""
    for check in checks:
        size, mtime_ns, name = check.split(b" ", 2)
        seen = stat_check(os.fsdecode(name))
        if seen != (int(size), int(mtime_ns)):
            return f"{os.fsdecode(name)} {'is gone' if seen is None else 'has changed since'}"
    return None


def _check_kvm(version: str, engine: str, cpu: str) -> None:
    """A snapshot that was made under KVM needs it, and the CPU that its guest saw. Raises `SnapshotError`."""
    here = proc.cpu_model()
    if not os.path.exists("/dev/kvm"):
        problem = "and there is no /dev/kvm"
    elif not os.access("/dev/kvm", os.R_OK | os.W_OK):
        problem = "and /dev/kvm cannot be opened"
    elif cpu != here:
        problem = f"not on this CPU: {cpu} there, {here} here"
    else:
        return
    hint = prepare_hint(version, engine=engine) + " to make one for this host"
    raise SnapshotError(f"the snapshot of {config.title(version)} was made under KVM, {problem}", hint=hint)


def stat_check(path: str) -> tuple[int, int] | None:
    """Size and modification time of a file, or None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def launch_bytes(
    *,
    version: str,
    engine: str,
    accel: str,
    memory_mib: int,
    argv: list[str],
    checked: list[str],
    own: list[tuple[str, str]],
    engine_version: str = "",
    mapped: list[str] | None = None,
) -> bytes:
    """The contents of `launch`; `checked` are files whose size and time are recorded, `own` those of the generation, as
    (path now, path later); `mapped` are the files that the checkpoint maps, if there is one."""
    data = frames.field(L_FORMAT, FORMAT) + frames.field(L_MEMORY_MIB, memory_mib)
    data += b"".join(frames.field(L_ARG, os.fsencode(arg)) for arg in argv)
    everything = [(L_CHECK, path, path) for path in checked] + [(L_CHECK, path, later) for path, later in own]
    if mapped:
        # Without the guest's memory, which is among its own.
        others = sorted(set(mapped) - {later for _, later in own})
        everything += [(L_MAPPED, path, path) for path in others]
        data += frames.field(L_HOST, host())
    for key, path, later_path in everything:
        found = os.stat(path)
        data += frames.field(key, b"%d %d %s" % (found.st_size, found.st_mtime_ns, os.fsencode(later_path)))
    if accel == "kvm":
        data += frames.field(L_CPU, proc.cpu_model())
    if engine == "firecracker":
        data += frames.field(L_ENGINE_VERSION, engine_version)
    return data + frames.field(L_ACCEL, accel) + frames.field(L_VERSION, version) + frames.field(L_ENGINE, engine)
