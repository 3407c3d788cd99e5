"""What `prepare` needs to know of each engine: its program, its inputs, how it boots and freezes, how a restore is started."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .. import proc, seccomp
from ..engine import checkpoint, firecracker, machinecode, probe, ptrace, qemu, qmp, resume
from ..errors import DhgError, HostError
from ..image import build as image
from ..wire import client
from . import rehearsal, scratch

Spec = qemu.Spec | firecracker.Spec
#: Waits for the guest's HELLO; the versions that it names.
WaitHello = Callable[[Any], dict[str, str]]


class Frozen(NamedTuple):
    """What came of a freeze: the guest's versions, what `keep` returned, the files that the checkpoint maps (none without one)."""

    versions: dict[str, str]
    kept: str
    mapped: list[str]


def program(engine: str, given: str | None = None) -> str:
    """The path of an engine's VMM; `given` is what the user named for Firecracker. Raises `HostError`."""
    if engine == "firecracker":
        return os.path.realpath(firecracker.path(given))
    return os.path.realpath(probe.qemu_path())


def version(engine: str, binary: str) -> str:
    """What a VMM says of its version. Raises `HostError`."""
    return firecracker.version_of(binary) if engine == "firecracker" else probe.qemu_version(binary)


def title(engine: str) -> str:
    """The engine's name for people."""
    return {"qemu": "QEMU", "firecracker": "Firecracker"}[engine]


def kernel_args(engine: str, accel: str) -> str:
    """The kernel's command line but for what depends on the host."""
    return firecracker.KERNEL_ARGS if engine == "firecracker" else qemu.command_line(accel)


def checkpoint_sources() -> str:
    """What stands for the code that makes a checkpoint: the SHA-256 of its sources."""
    digest = hashlib.sha256()
    for module in (checkpoint, machinecode, ptrace, resume, seccomp, rehearsal):
        with open(str(module.__file__), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def require_kvm(base: str, *, insist: bool = False) -> str:
    """That KVM works, as far as can be told before Firecracker itself tries; why we think so. For `insist` see `probe.kvm`.

    Raises `HostError`.
    """
    found = probe.kvm_device()
    if found is None:
        try:
            found = probe.kvm(
                probe.qemu_path(),
                image.kernel_image(base),
                image.probe_initramfs(base, probe.PROBE_TOKEN),
                insist=insist,
            )
        except HostError:
            return "/dev/kvm opens; without QEMU it is not tried beforehand"
    if not found.usable:
        raise HostError(
            f"Firecracker needs KVM, which does not work here: {found.reason}",
            hint="leave --engine out: QEMU runs everywhere"
            + ("" if insist or probe.kvm_device() else "; --accel kvm tries KVM again"),
        )
    return found.reason


def make_spec(
    engine: str,
    binary: str,
    *,
    accel: str,
    memory_mib: int,
    vcpus: int,
    base: str,
    initramfs: str,
    stub: str,
    root: str,
    server: str = "",
) -> Spec:
    """What a VM is made of; `stub` is the head of the kernel, for a restore with QEMU, `server` the server's process, if it was
    started natively."""
    if engine == "firecracker":
        return firecracker.Spec(
            binary,
            firecracker.version_of(binary),
            memory_mib=memory_mib,
            vcpus=vcpus,
            kernel=image.vmlinux(base),
            initramfs=initramfs,
            image=root,
        )
    return qemu.Spec(
        qemu=binary,
        accel=accel,
        memory_mib=memory_mib,
        vcpus=vcpus,
        kernel=image.kernel_image(base),
        initramfs=initramfs,
        stub=stub,
        image=root,
        tsc_khz=probe.tsc_khz(),
        server=server,
    )


def boot_and_freeze(
    spec: Spec,
    folder: str,
    *,
    final: str,
    rehearse: Sequence[Sequence[client.Request]],
    console: int,
    wait_hello: WaitHello,
    timeout_s: float,
    note: Callable[[str], None],
    keep: Callable[[str], str],
) -> Frozen:
    """Boot a VM and freeze it when it is ready: `state` in `folder`, which will be `final`, and with QEMU's software emulation
    `checkpoint`.

    `note` is told why there is no checkpoint, if there is none; `keep` is called with the path of the file that has the guest's
    memory, which is gone afterwards.
    Raises `MachineError`, `DeadlineExceeded`, what `wait_hello` raises. No VM is left in any case.
    """
    state = f"{folder}/state"
    if isinstance(spec, firecracker.Spec):
        ram = f"{folder}/ram.boot"
        with firecracker.boot(spec, console=console, timeout_s=timeout_s) as vm:
            versions = wait_hello(vm)
            firecracker.freeze(vm, state, ram)
        os.chmod(state, 0o600)
        kept = keep(ram)
        os.unlink(ram)
        return Frozen(versions, kept, [])
    # Not in the file that is kept: each page that is touched for the first time would be a block of the disk's to be found.
    fd = os.open(state, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with scratch.memory(spec.memory_mib << 20) as memory:
            with qemu.boot(spec, memory, console=console) as booted:
                qmp.prepare_freeze(booted)
                versions = wait_hello(booted)
                qmp.stop(booted)
                qmp.freeze(booted, fd)
            mapped = list[str]()
            if spec.accel == "tcg":
                mapped = _rehearse(
                    spec, folder, memory, fd, final=final, rounds=rehearse, wait_hello=wait_hello, note=note
                )
            return Frozen(versions, keep(f"/proc/self/fd/{memory}"), mapped)
    finally:
        os.close(fd)


def _rehearse(
    spec: qemu.Spec,
    folder: str,
    memory: int,
    state: int,
    *,
    final: str,
    rounds: Sequence[Sequence[client.Request]],
    wait_hello: WaitHello,
    note: Callable[[str], None],
) -> list[str]:
    """Go on with a VM that was frozen in a QEMU that has translated nothing yet, run what scripts do, freeze it again and keep that
    QEMU, too; the files that it maps."""
    os.lseek(state, 0, os.SEEK_SET)
    with (
        qemu.boot_again(spec._replace(stub=f"{folder}/kernel"), memory, state=state) as vm,
        rehearsal.directory(folder) as shared,
    ):
        vm.wait_resumed(deadline=proc.Deadline(rehearsal.TIMEOUT_S))
        for requests in rounds:
            rehearsal.run(vm, requests, shared)
            wait_hello(vm)
        qmp.stop(vm)
        place = f"{folder}/checkpoint"
        try:
            mapped = checkpoint.write(vm.process.pid, place, ram=checkpoint.file_of(memory), ram_later=f"{final}/ram")
        except (DhgError, OSError, LookupError, ValueError, struct.error) as error:
            # It does without, and each clone translates anew what it runs.
            note(f"none: {error}")
            mapped = []
            if os.path.exists(place):
                os.unlink(place)
        os.lseek(state, 0, os.SEEK_SET)
        os.truncate(state, 0)
        qmp.freeze(vm, state)
    return mapped


def restore_argv(spec: Spec, ram: str) -> list[str]:
    """The command line that `launch` keeps for a restore."""
    return [spec.firecracker] if isinstance(spec, firecracker.Spec) else qemu.restore_argv(spec, ram)


def binary_of(spec: Spec) -> str:
    """The VMM's path."""
    return spec.firecracker if isinstance(spec, firecracker.Spec) else spec.qemu
