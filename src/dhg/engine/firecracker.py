"""Firecracker: boots a VM to be frozen, freezes it, restores it with its memory served by our pager.

The snapshot is two files as with QEMU: `ram`, the guest's memory, and `state`, the device state. A restore is a new process that
is told over its API to load them; its memory comes over userfaultfd from the pager, or where DHG_VM_MEMORY is `file` from a
private mapping of the file. The guest is reached over vsock.

Each VM has a directory of its own for its sockets, which is removed as soon as all of them are connected. Where Firecracker can
be told another path of the vsock device's socket than the snapshot has (`vsock_override`, 1.16), it is; otherwise it has the
directory as its working directory, and the path in the snapshot is relative.

Not on QEMU's hot path.
"""

from __future__ import annotations

import _socket
import os
import select
import time

from .. import config, proc
from ..errors import DeadlineExceeded, HostError, MachineError, ProtocolError, UsageError
from ..pager import handshake
from ..pager.process import EAGER, LAZY, SET, PagerProcess
from ..wire import frames
from . import fcapi, vsock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .fcapi import Value

#: The oldest release that this was written for, and the one that has `vsock_override`.
OLDEST = (1, 12)
VSOCK_OVERRIDE = (1, 16)

KERNEL_ARGS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 reboot=k rdinit=/init mitigations=off audit=0 nmi_watchdog=0 nowatchdog "
    "random.trust_cpu=on no_timer_check rcupdate.rcu_cpu_stall_suppress=1 cryptomgr.notests pci=off "
    # No PS/2 devices are behind the controller, which is there for the reset alone; looking for them takes a second.
    "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd dhg.accel=kvm dhg.channels=vsock"
)

#: Names in a VM's directory. A Unix socket's path has 107 bytes at most.
API, VSOCK, UFFD = "api", "v", "uffd"
#: The working set's file, beside the snapshot's.
WORKING_SET = "workingset"
#: Measured better than 2 MiB, warm and cold (bench/pager.md).
CHUNK = 64 << 10
_MAX_PATH = 107
#: Firecracker's own reserve in its address space: itself and its stacks.
OVERHEAD_MIB = 512
FD_LOCK, FD_LEASH, FD_PAGER_LEASH = 200, 201, 202
GUEST_CID = 3
#: The guest of a VM that is restored is there at once, or something is wrong with this try.
MEET_TIMEOUT_S = 5.0


class Spec:
    """What a VM is made of. Everything here is an input of the snapshot."""

    __slots__ = ("firecracker", "image", "initramfs", "kernel", "memory_mib", "vcpus", "version")

    #: Firecracker has nothing else.
    accel = "kvm"
    #: The guest has KVM's clock.
    tsc_khz = 0

    def __init__(
        self, firecracker: str, version: str, *, memory_mib: int, vcpus: int, kernel: str, initramfs: str, image: str
    ) -> None:
        """`version` is Firecracker's, `kernel` an uncompressed vmlinux."""
        self.firecracker = firecracker
        self.version = version
        self.memory_mib = memory_mib
        self.vcpus = vcpus
        self.kernel = kernel
        self.initramfs = initramfs
        self.image = image


def path(name: str | None = None) -> str:
    """The Firecracker to use: `name`, `DHG_FIRECRACKER`, or firecracker on the PATH. Raises `HostError`."""
    name = name or os.environ.get("DHG_FIRECRACKER") or "firecracker"
    found = proc.find_program(name)
    if found is None:
        raise HostError(f"program not found: {name}", hint="name one with --firecracker or DHG_FIRECRACKER")
    return found


def version_of(binary: str) -> str:
    """What a Firecracker says of its version, such as 1.12.1. Raises `HostError` for something else, or one that is too old."""
    text = proc.run([binary, "--version"], timeout_s=30)
    name, _, version = text.partition("\n")[0].strip().partition(" v")
    if name != "Firecracker" or not version:
        raise HostError(f"{binary} is no Firecracker: it says {text[:80]!r}")
    if numbers(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise HostError(f"{binary} is version {version}; {oldest} or newer is needed")
    return version


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    try:
        return tuple(int(word) for word in version.split("-")[0].split(".")[:2])
    except ValueError:
        raise HostError(f"not a version of Firecracker's: {version!r}") from None


def boot_requests(spec: Spec) -> list[tuple[str, str, dict[str, Value]]]:
    """Method, path and body of the requests that boot a VM."""
    return [
        ("PUT", "/machine-config", {"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mib, "smt": False}),
        (
            "PUT",
            "/boot-source",
            {"kernel_image_path": spec.kernel, "initrd_path": spec.initramfs, "boot_args": KERNEL_ARGS},
        ),
        (
            "PUT",
            "/drives/root",
            # Not as root device: the initramfs mounts it.
            {"drive_id": "root", "path_on_host": spec.image, "is_root_device": False, "is_read_only": True},
        ),
        ("PUT", "/vsock", {"guest_cid": GUEST_CID, "uds_path": VSOCK}),
        ("PUT", "/actions", {"action_type": "InstanceStart"}),
    ]


def freeze_requests(state: str, ram: str) -> list[tuple[str, str, dict[str, Value]]]:
    """The requests that write a snapshot."""
    create: dict[str, Value] = {"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": ram}
    return [("PATCH", "/vm", {"state": "Paused"}), ("PUT", "/snapshot/create", create)]


def load_request(state: str, backend: str, memory: str, *, uds: str | None) -> tuple[str, str, dict[str, Value]]:
    """The request that loads a snapshot; `backend` is File or Uffd, `uds` overrides the path of the vsock device's socket."""
    body: dict[str, Value] = {
        "snapshot_path": state,
        "mem_backend": {"backend_type": backend, "backend_path": memory},
        "resume_vm": False,
    }
    if uds is not None:
        body["vsock_override"] = {"uds_path": uds}
    return "PUT", "/snapshot/load", body


RESUME: tuple[str, str, dict[str, Value]] = ("PATCH", "/vm", {"state": "Resumed"})


def memory_mode(path: str) -> str:
    """How the memory of the snapshot at `path` is to be had: `file`, or a mode of the pager. Raises `UsageError`."""
    wanted = os.environ.get("DHG_VM_MEMORY", "")
    if wanted not in ("", "file", "lazy", "set", "eager"):
        raise UsageError(f"DHG_VM_MEMORY is {wanted!r}; it may be file, lazy, set or eager")
    if not wanted and os.environ.get("DHG_VM_EAGER_UFFD") == "1":
        return EAGER
    if wanted in ("file", LAZY, EAGER):
        return wanted
    return SET if os.path.exists(f"{path}/{WORKING_SET}") else LAZY


def chunk_bytes() -> int:
    """How much the pager fills around a fault: `DHG_VM_CHUNK` (such as 2M or 64K), by default CHUNK. Raises `UsageError`."""
    text = os.environ.get("DHG_VM_CHUNK", "")
    if not text:
        return CHUNK
    number, unit = text[:-1], {"K": 10, "M": 20}.get(text[-1].upper())
    size = int(number) << unit if unit and number.isdigit() else 0
    if size < 4096 or size > 1 << 30 or size & (size - 1):
        raise UsageError(f"DHG_VM_CHUNK is {text!r}", hint="a power of two from 4K to 1024M")
    return size


def make_folder() -> str:
    """A directory for the sockets of one VM. Its name begins with the client's pid, so that leftovers can be told."""
    problem = "none has a path that is short enough"
    for root in (f"{config.home()}/run", "/tmp"):
        folder = f"{root}/dhg-{os.getpid()}-{os.urandom(4).hex()}"
        if len(os.fsencode(f"{folder}/{UFFD}")) <= _MAX_PATH:
            try:
                os.makedirs(root, mode=0o700, exist_ok=True)
                os.mkdir(folder, 0o700)
                return folder
            except OSError as error:
                problem = f"{error.strerror}: {error.filename}"
    raise HostError(f"no directory for sockets: {problem}")


def remove_folder(folder: str) -> None:
    """Remove what `make_folder` made, if it is there."""
    for name in (API, VSOCK, UFFD):
        try:
            os.unlink(f"{folder}/{name}")
        except FileNotFoundError:
            pass
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        pass


class Vm:
    """A Firecracker process and the host's ends of its channels. A context manager: leaving it kills Firecracker.

    It dies with this process, as QEMU does (engine/qmp.py), and with its pager (pager/process.py).
    """

    __slots__ = (
        "_api",
        "_folder",
        "_leash",
        "_load",
        "_log",
        "control",
        "files",
        "pager",
        "process",
        "stderr",
        "stdin",
        "stdout",
    )

    def __init__(
        self,
        binary: str,
        *,
        folder: str,
        fds: dict[int, int],
        relative: bool,
        log: int = -1,
        pager: PagerProcess | None = None,
        load: tuple[str, str, dict[str, Value]] | None = None,
    ) -> None:
        """Start Firecracker, with nothing in it, for `wait_resumed` to send `load` to.

        Takes `folder`, `log` and `pager` over: they are given back by `close`, not if this raises. `relative`: with the
        folder as its working directory. `fds` are given to it.
        """
        self._log = log
        self._load = load
        self._folder = folder
        self._api: fcapi.Api | None = None
        self.pager = pager
        self.control: _socket.socket
        self.stdout: _socket.socket
        self.stderr: _socket.socket
        self.stdin: _socket.socket
        self.files: _socket.socket
        argv = [binary, "--api-sock", API if relative else f"{folder}/{API}", "--id", "dhg"]
        if relative:
            argv = ["/usr/bin/env", "-C", folder, *argv]
        leash, self._leash = os.pipe2(os.O_CLOEXEC)
        theirs = {**fds, FD_LEASH: leash}
        if pager:
            theirs[FD_PAGER_LEASH] = pager.vmm_leash
        try:
            self.process = proc.spawn(argv, fds=theirs)
            proc.kill_with_us(self.process.pid, leash)
            if pager:
                pager.tie(self.process.pid)
        except BaseException:
            os.close(self._leash)
            raise
        finally:
            os.close(leash)

    def wait_resumed(self, *, deadline: proc.Deadline) -> tuple[int, int, int]:
        """Load, resume, connect. The wall clock when Firecracker was up, and before and after the resume, in ns since the epoch.

        Raises `MachineError`, `DeadlineExceeded`.
        """
        assert self._load is not None
        api = self.connect_api(deadline)
        up = time.time_ns()
        api.request(*self._load, deadline=deadline)
        if self.pager:
            self.pager.wait_ready(deadline)
        before = time.time_ns()
        api.request(*RESUME, deadline=deadline)
        after = time.time_ns()
        self._meet(deadline)
        remove_folder(self._folder)
        return up, before, after

    def connect_api(self, deadline: proc.Deadline) -> fcapi.Api:
        """The API, once Firecracker has opened it."""
        self._api = fcapi.Api(f"{self._folder}/{API}", self.process, deadline)
        return self._api

    def _meet(self, deadline: proc.Deadline) -> None:
        """Connect the channels. The device is reset at the restore: a connection that was quicker than that is lost."""
        path = f"{self._folder}/{VSOCK}"
        last: Exception | None = None
        for number in range(1, 256):
            limit = proc.Deadline(min(MEET_TIMEOUT_S, deadline.left()))
            found: list[_socket.socket] = []
            try:
                found = vsock.connect_all(path, number, limit)
                if _greeted(found[0], limit):
                    self.files = vsock.connect(path, vsock.FILES, limit)
                    self.control, self.stdout, self.stderr, self.stdin = found
                    found = []
                    return
            except (vsock.Refused, DeadlineExceeded) as error:
                last = error
            finally:
                for sock in found:
                    sock.close()
            if self.process.wait(vsock.PAUSE_S) is not None:
                raise MachineError(f"Firecracker ended with status {self.process.status}")
            if deadline.left() == 0.0:
                break
        raise DeadlineExceeded(f"the guest did not answer within {deadline.timeout_s:g} s", detail=str(last))

    def connect_control(self, deadline: proc.Deadline) -> None:
        """Connect the control channel of a VM that boots, as soon as its runner listens. Raises as `wait_resumed`."""
        while True:
            try:
                self.control = vsock.connect(f"{self._folder}/{VSOCK}", vsock.CHANNELS[0][1], deadline)
                return
            except vsock.Refused:
                pass
            if self.process.wait(vsock.PAUSE_S) is not None:
                raise MachineError("the VM ended before its guest was up")
            if deadline.left() == 0.0:
                raise DeadlineExceeded(f"the guest was not up within {deadline.timeout_s:g} s")

    def said(self) -> str | None:
        """The last that Firecracker and the pager said, if it is kept."""
        parts = [self.pager.said() if self.pager else None]
        if self._log >= 0:
            parts.append(proc.tail(os.pread(self._log, 65536, 0).decode("utf-8", "replace")))
        return "\n".join(part for part in parts if part) or None

    def close(self) -> None:
        """Kill Firecracker and the pager, reap them, close the channels, remove the directory."""
        self.process.kill()
        self.process.close()
        os.close(self._leash)
        if self._log >= 0:
            os.close(self._log)
        if self.pager:
            self.pager.close()
        if self._api:
            self._api.close()
        for name in ("control", "stdout", "stderr", "stdin", "files"):
            sock = getattr(self, name, None)
            if sock is not None:
                sock.close()
        remove_folder(self._folder)

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _greeted(control: _socket.socket, deadline: proc.Deadline) -> bool:
    """Whether the guest's HELLO comes, which says that it has all channels. Raises `ProtocolError` for anything else."""
    decoder = frames.Decoder()
    poller = select.poll()
    poller.register(control.fileno(), select.POLLIN)
    while poller.poll(deadline.left() * 1000):
        try:
            data = control.recv(4096)
        except ConnectionError:
            data = b""
        if not data:
            return False
        try:
            for kind, payload in decoder.feed(data):
                protocol = frames.integer(frames.fields(payload)[frames.F_PROTOCOL][0])
                if kind != frames.HELLO or protocol != frames.PROTOCOL:
                    raise ProtocolError(f"the guest begins with frame {kind}, protocol {protocol}")
                # It says nothing else before it is asked.
                return True
        except (frames.FrameError, KeyError) as error:
            raise ProtocolError(f"the guest sent no valid frame: {error}") from error
    return False


def boot(spec: Spec, *, console: int, timeout_s: float) -> Vm:
    """Boot a VM to be frozen, and connect its control channel; `console` is a descriptor for what the guest and Firecracker print.

    Raises `MachineError` where Firecracker refuses, `DeadlineExceeded` if the guest is not up after `timeout_s` seconds.
    """
    deadline = proc.Deadline(timeout_s)
    folder = make_folder()
    try:
        vm = Vm(spec.firecracker, folder=folder, fds={1: console, 2: console}, relative=True)
    except BaseException:
        remove_folder(folder)
        raise
    try:
        api = vm.connect_api(deadline)
        for request in boot_requests(spec):
            api.request(*request, deadline=deadline)
        vm.connect_control(deadline)
    except BaseException:
        vm.close()
        raise
    return vm


def freeze(vm: Vm, state: str, ram: str, *, timeout_s: float = 120.0) -> None:
    """Pause a VM and write its device state and its memory to two files; both appear with all that was written."""
    assert vm._api is not None
    deadline = proc.Deadline(timeout_s)
    for request in freeze_requests(state, ram):
        vm._api.request(*request, deadline=deadline)
    if not os.path.getsize(state):
        raise MachineError("Firecracker wrote no device state")


def start(path: str, binary: str, *, version: str, lock: int, memory_mib: int, mode: str | None = None) -> Vm:
    """Start restoring the snapshot in the directory `path` with the Firecracker `binary` of `version`; does not wait.

    `lock` is held by Firecracker for as long as it lives. `mode` is one of the pager's, or `file`; by default that of
    `memory_mode`. Raises `HostError`, `UsageError`; nothing stays then.
    """
    mode = mode or memory_mode(path)
    override = numbers(version) >= VSOCK_OVERRIDE
    folder = make_folder()
    pager = None
    log = os.memfd_create("dhg-firecracker-log")
    try:
        if mode != "file":
            pager = _start_pager(f"{folder}/{UFFD}", path, mode)
        uffd = f"{folder}/{UFFD}"
        backend, memory = ("File", f"{path}/ram") if pager is None else ("Uffd", uffd)
        load = load_request(f"{path}/state", backend, memory, uds=f"{folder}/{VSOCK}" if override else None)
        fds = {1: log, 2: log, FD_LOCK: lock}
        vm = Vm(binary, folder=folder, fds=fds, relative=not override, log=log, pager=pager, load=load)
    except BaseException:
        os.close(log)
        if pager:
            pager.close()
        remove_folder(folder)
        raise
    proc.limit(vm.process.pid, address_space_bytes=memory_mib + OVERHEAD_MIB << 20)
    return vm


def _start_pager(socket: str, path: str, mode: str) -> PagerProcess:
    listener = handshake.listen(socket)
    try:
        chunk = chunk_bytes()
        return PagerProcess(listener, f"{path}/ram", mode=mode, chunk=chunk, working_set=f"{path}/{WORKING_SET}")
    finally:
        listener.close()


def record(vm: Vm) -> None:
    """End a VM that was started with mode RECORD, and wait until its working set is written. Raises `MachineError`."""
    assert vm.pager is not None
    vm.process.kill()
    if not vm.pager.counts(60.0):
        raise MachineError("the working set was not recorded", detail=vm.pager.said())
