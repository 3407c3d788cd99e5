"""`prepare`: builds the stages, boots the image, waits for the warm-up, freezes, tries the result, puts it in place."""

from __future__ import annotations

import _socket
import datetime
import hashlib
import json
import os
import secrets
import select
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from .. import __version__, config, proc
from ..engine import probe, qemu
from ..errors import DeadlineExceeded, DhgError, HostError, ProtocolError, SnapshotError
from ..files import locked, private_dir, remove_tree, sha256, sync_dir, write_synced
from ..image import build as image
from ..image import server
from ..image.kernel import stub as kernel_stub
from ..wire import frames
from . import engines, inventory, rehearsal, store, trial

#: From one word of the guest to the next, the last being HELLO: all of it takes two minutes under TCG on two cores, but far more on a
#: machine that does other things, too, and the start of the JVM alone six minutes under KVM in an emulated host.
BOOT_TIMEOUT_S = 900.0
BLOCK = 4096

#: Under software emulation one: two threads of QEMU's race where HotSpot patches code that runs (docs/design.md, "TCG").
DEFAULT_VCPUS = {"kvm": 2, "tcg": 1}

#: Called with a stage's name when it starts, and with more about it while it lasts.
Progress = Callable[[str, str], None]

#: The programs that a stage is built with, and the packages that have them.
PROGRAMS = {"base": ("mmdebstrap", "tar", "dpkg-deb"), "image": ("mkfs.erofs", "tar")}
PACKAGES = {"mmdebstrap": "mmdebstrap", "mkfs.erofs": "erofs-utils", "tar": "tar", "dpkg-deb": "dpkg"}


def check_host(version: str, memory_mib: int, engine: str, binary: str | None) -> None:
    """What `prepare` needs is there: programs, disk, memory. Raises `HostError` that says what to install or free."""
    to_build = image.missing_stages(version)
    programs = {program for stage in to_build for program in PROGRAMS[stage]}
    missing = sorted(PACKAGES[program] for program in programs if proc.find_program(program) is None)
    if "base" in to_build and os.geteuid() != 0 and proc.find_program("newuidmap") is None:
        missing.append("uidmap")
    if missing:
        raise HostError(
            f"missing programs; packages: {', '.join(missing)}", hint=f"apt-get install {' '.join(missing)}"
        )
    engines.version(engine, engines.program(engine, binary))
    root = private_dir(config.home())
    free = shutil.disk_usage(root).free
    needed_mib = image.room_mib(version, memory_mib)
    if free >> 20 < needed_mib:
        raise HostError(
            f"{free >> 20} MiB free in {root}; this prepare takes {needed_mib}", hint="free some, or set DHG_HOME"
        )
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) >> 10 for line in file if line.startswith("MemAvailable:"))
    if available < memory_mib + 256:
        raise HostError(f"{available} MiB of memory available; the VM takes {memory_mib} and QEMU some 200")


def pick_acceleration(asked: str, base: str) -> tuple[str, str]:
    """kvm or tcg, and why. Raises `HostError` if KVM was asked for and does not work."""
    if asked == "tcg":
        return "tcg", "asked for"
    initramfs = image.probe_initramfs(base, probe.PROBE_TOKEN)
    found = probe.kvm(probe.qemu_path(), image.kernel_image(base), initramfs, insist=asked == "kvm")
    if found.usable:
        return "kvm", found.reason
    if asked == "kvm":
        raise HostError(
            f"KVM does not work here: {found.reason}",
            hint="leave --accel kvm out: software emulation (TCG) works everywhere",
        )
    return "tcg", found.reason


def prepare(
    *,
    version: str | None,
    memory_mib: int | None = None,
    vcpus: int | None = None,
    accel: str = "auto",
    engine: str = "qemu",
    binary: str | None = None,
    force: bool = False,
    progress: Progress,
) -> str:
    """Make the snapshot of a Deephaven version unless one of the same inputs is there; the generation's path.

    `version` is a release, `latest`, `bare`, or None for the release that this dhg was tested with; `memory_mib` and `vcpus` have
    defaults that depend on it and on the acceleration; `binary` names Firecracker's program. After a failure nothing but the
    caches of the stages that succeeded remains; an older snapshot stays in place.
    """
    progress("check", "programs, disk, memory")
    version = image.resolve_version(version or config.DEFAULT_DEEPHAVEN)
    bare = version == config.BARE
    memory_mib = memory_mib or (config.DEFAULT_BARE_MEMORY_MIB if bare else config.DEFAULT_MEMORY_MIB)
    check_host(version, memory_mib, engine, binary)
    log = f"{private_dir(config.home() + '/log')}/prepare-{version}.log"
    try:
        with open(log, "w"):
            pass
    except OSError as error:
        raise HostError(f"cannot write {log}: {error.strerror}", hint=config.HOME_HINT) from error
    # Shared: `clean --all` waits for nobody, it leaves the caches alone while any prepare is at work.
    with locked(f"{config.home()}/.prepare-lock", shared=True):
        try:
            return _prepare(version, memory_mib, vcpus, accel, engine, binary, force, progress, log)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise HostError(f"{error.strerror}{place}", hint=_hint(log)) from error
        except DhgError as error:
            error.hint = error.hint or _hint(log)
            raise


def _hint(log: str) -> str:
    # A guest whose memory finds no room in its file dies without a word.
    if shutil.disk_usage(config.home()).free < 16 << 20:
        return f"{config.home()} is full: free some, or set DHG_HOME"
    return f"the whole log is in {log}"


def _prepare(
    version: str,
    memory_mib: int,
    vcpus: int | None,
    accel: str,
    engine: str,
    binary: str | None,
    force: bool,
    progress: Progress,
    log: str,
) -> str:
    progress("base system", "Debian, a JRE, the kernel")
    base = image.base_system(log)
    # Before the root image, which takes minutes the first time: --accel kvm in vain should end early.
    progress("acceleration", "")
    if engine == "firecracker":
        accel, reason = "kvm", engines.require_kvm(base, insist=accel == "kvm")
    else:
        accel, reason = pick_acceleration(accel, base)
    progress("acceleration", f"{accel} ({reason})")
    progress("root image", config.title(version))
    root = image.root_image(base, version, log)
    process = ""
    if accel == "tcg" and version != config.BARE:
        progress("server", "started natively")
        process, why = server.try_to_make(root, memory_mib, log)
        if why:
            progress("server", f"to be started in the VM: {why}")
    vcpus = vcpus or (1 if version == config.BARE else DEFAULT_VCPUS[accel])
    initramfs, runner = image.initramfs(base)
    program = engines.program(engine, binary)
    folder = private_dir(f"{config.snapshots_dir()}/{version}")
    inputs: dict[str, Any] = {
        "deephaven": version,
        "engine": engine,
        "engine_path": program,
        "engine_version": engines.version(engine, program),
        "accel": accel,
        "memory_mib": memory_mib,
        "vcpus": vcpus,
        "kernel": os.path.basename(image.kernel_image(base)),
        "kernel_args": engines.kernel_args(engine, accel),
        "initramfs": hashlib.sha256(initramfs).hexdigest(),
        "runner": runner,
        "image": os.path.basename(root),
        "server": _stage_of(process),
        "host_cpu": proc.cpu_model() if accel == "kvm" else "",
        "checkpoint": engines.checkpoint_sources() if accel == "tcg" else "",
    }
    with locked(f"{folder}/.prepare-lock"):
        link = f"{folder}/{engine}"
        if not force and _same(link, inputs):
            progress("snapshot", "already there")
            return os.path.realpath(link)
        inventory.sweep(folder)

        def make(process: str) -> str:
            spec = partial(
                engines.make_spec,
                engine,
                program,
                accel=accel,
                memory_mib=memory_mib,
                vcpus=vcpus,
                base=base,
                root=f"{root}/root.erofs",
                server=process,
            )
            return _make(folder, spec, initramfs, inputs | {"server": _stage_of(process)}, version, log, progress)

        try:
            name = make(process)
        except DhgError as error:
            if not process:
                raise
            progress("server", f"to be started in the VM, as it did not go on there: {error}")
            name = make("")
        os.symlink(name, f"{link}.tmp")
        os.replace(f"{link}.tmp", link)
        sync_dir(folder)
        inventory.sweep(folder)
    return f"{folder}/{name}"


def _stage_of(process: str) -> str:
    return os.path.basename(os.path.dirname(process))


def _make(
    folder: str,
    make_spec: Callable[..., engines.Spec],
    initramfs: bytes,
    inputs: dict[str, Any],
    version: str,
    log: str,
    progress: Progress,
) -> str:
    """Make a generation in `folder` and try it; its name. What did not work is not left there."""
    engine = inputs["engine"]
    name = f".{engine}-{secrets.token_hex(6)}"
    tmp = f"{folder}/{name}.tmp"
    os.mkdir(tmp, 0o700)
    try:
        spec = make_spec(initramfs=f"{tmp}/initramfs", stub=f"{folder}/{name}/kernel")
        _fill(tmp, f"{folder}/{name}", spec, initramfs, inputs, version, progress)
        os.rename(tmp, f"{folder}/{name}")
        sync_dir(folder)
    except BaseException:
        _keep_console(tmp, log)
        remove_tree(tmp)
        raise
    try:
        progress("trial", "restore it once")
        trial.run(f"{folder}/{name}", version, engine, progress)
    except BaseException:
        remove_tree(f"{folder}/{name}")
        raise
    return name


def _same(link: str, inputs: dict[str, Any]) -> bool:
    try:
        with open(f"{link}/manifest.json") as file:
            found = json.load(file)
        if found.get("inputs") != inputs or found.get("format") != store.FORMAT:
            return False
        snapshot = store.open_snapshot(inputs["deephaven"], engine=inputs["engine"])
        os.close(snapshot.lock)
        # Made anew on a host whose kernel or libraries have changed: it would do, but be slow.
        if "checkpoint" in found["files"] and not snapshot.checkpoint and config.use_checkpoint():
            return False
    except (OSError, ValueError, DhgError):
        return False
    return True


def _keep_console(tmp: str, log: str) -> None:
    try:
        with open(f"{tmp}/console.log", "rb") as source, open(log, "ab") as target:
            shutil.copyfileobj(source, target)
    except OSError:
        pass


def _fill(
    tmp: str, final: str, spec: engines.Spec, initramfs: bytes, inputs: dict[str, Any], version: str, progress: Progress
) -> None:
    began = time.monotonic()
    write_synced(f"{tmp}/initramfs", initramfs)
    own = ["ram", "state"]
    if isinstance(spec, qemu.Spec):
        own.append("kernel")
        with open(spec.kernel, "rb") as kernel:
            write_synced(f"{tmp}/kernel", kernel_stub(kernel.read()))
    write_synced(f"{tmp}/lock", b"")
    console = os.open(f"{tmp}/console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    progress("boot", f"{spec.accel}, {spec.memory_mib} MiB, {spec.vcpus} vCPUs")

    def keep(ram: str) -> str:
        progress("compact", "")
        return copy_sparse(ram, f"{tmp}/ram")

    try:
        versions, digest, mapped = engines.boot_and_freeze(
            spec,
            tmp,
            final=final,
            rehearse=rehearsal.rounds(bare=version == config.BARE),
            console=console,
            wait_hello=lambda vm: _ready(vm, version, progress),
            timeout_s=BOOT_TIMEOUT_S,
            note=lambda why: progress("checkpoint", why),
            keep=keep,
        )
    except DhgError as error:
        if not error.detail:
            with open(f"{tmp}/console.log", errors="replace") as file:
                error.detail = proc.tail(file.read())
        raise
    finally:
        os.close(console)
    os.unlink(spec.initramfs)
    files = {"ram": {"size": spec.memory_mib << 20, "disk": os.stat(f"{tmp}/ram").st_blocks * 512, "sha256": digest}}
    if mapped:
        own.append("checkpoint")
    for name in own[1:]:
        found = os.stat(f"{tmp}/{name}")
        files[name] = {"size": found.st_size, "disk": found.st_blocks * 512, "sha256": sha256(f"{tmp}/{name}")}
    manifest = {
        "format": store.FORMAT,
        "dhg": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        "tsc_khz": spec.tsc_khz,
        "prepare_s": round(time.monotonic() - began, 1),
        "guest": versions,
        "files": files,
    }
    with open(os.path.dirname(spec.image) + "/packages.json") as packages:
        manifest["packages"] = json.load(packages)
    write_synced(f"{tmp}/manifest.json", json.dumps(manifest, indent=1).encode())
    checked = [engines.binary_of(spec), spec.image]
    if isinstance(spec, qemu.Spec) and spec.server:
        checked.append(spec.server)
    launch = store.launch_bytes(
        version=version,
        engine=inputs["engine"],
        engine_version=inputs["engine_version"],
        accel=spec.accel,
        memory_mib=spec.memory_mib,
        argv=engines.restore_argv(spec, f"{final}/ram"),
        checked=checked,
        own=[(f"{tmp}/{name}", f"{final}/{name}") for name in own],
        mapped=mapped,
    )
    write_synced(f"{tmp}/launch", launch)
    sync_dir(tmp)


def _ready(vm: Any, version: str, progress: Progress) -> dict[str, str]:
    """Wait until the guest of a VM is ready to be frozen; the versions it names. Raises `SnapshotError` if something is missing."""
    versions = _wait_hello(vm.control, progress)
    if version != config.BARE and "deephaven" not in versions:
        raise SnapshotError(f"the guest is up without Deephaven; it names {versions}")
    return versions


def _wait_hello(control: _socket.socket, progress: Progress) -> dict[str, str]:
    """Wait for the guest's HELLO, showing what it logs; the versions it names."""
    deadline = proc.Deadline(BOOT_TIMEOUT_S)
    decoder = frames.Decoder()
    poller = select.poll()
    poller.register(control.fileno(), select.POLLIN)
    while True:
        if not poller.poll(deadline.left() * 1000):
            raise DeadlineExceeded(f"the guest is not ready, and has been silent for {BOOT_TIMEOUT_S:g} s")
        try:
            data = control.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            raise SnapshotError("the guest ended before it was ready")
        try:
            for kind, payload in decoder.feed(data):
                found = frames.fields(payload)
                if kind == frames.LOG:
                    deadline = proc.Deadline(BOOT_TIMEOUT_S)
                    progress("boot", frames.text(found[frames.F_TEXT][0]))
                elif kind == frames.HELLO:
                    protocol = frames.integer(found[frames.F_PROTOCOL][0])
                    if protocol != frames.PROTOCOL:
                        raise ProtocolError(f"the guest speaks protocol {protocol}, this dhg {frames.PROTOCOL}")
                    pairs = (frames.text(value).partition("=") for value in found.get(frames.F_VERSIONS, ()))
                    return {name: value for name, _, value in pairs}
        except (frames.FrameError, KeyError) as error:
            raise ProtocolError(f"the guest sent no valid frame: {error}") from error


def copy_sparse(source: str, target: str) -> str:
    """Copy a file, leaving out blocks that are all zero; the SHA-256 of the whole content."""
    zeros = bytes(BLOCK)
    step = 1 << 20
    blank = bytes(step)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    # The sum takes as long as all the rest, and needs a CPU only.
    with open(source, "rb", buffering=0) as data, ThreadPoolExecutor(1) as beside:
        digest = beside.submit(sha256, source)
        size = os.fstat(data.fileno()).st_size
        try:
            os.truncate(fd, size)
            at = 0
            while chunk := data.read(step):
                if chunk != blank[: len(chunk)]:
                    _write_blocks(fd, at, chunk, zeros)
                at += len(chunk)
            os.fsync(fd)
        finally:
            os.close(fd)
        return digest.result()


def _write_blocks(fd: int, at: int, chunk: bytes, zeros: bytes) -> None:
    start = None
    for offset in range(0, len(chunk) + BLOCK, BLOCK):
        block = chunk[offset : offset + BLOCK]
        if block and block != zeros[: len(block)]:
            start = offset if start is None else start
        elif start is not None:
            os.pwrite(fd, chunk[start:offset], at + start)
            start = None
