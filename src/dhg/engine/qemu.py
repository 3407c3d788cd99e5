"""QEMU: command lines, boot, snapshot, restore.

The snapshot is two files: `ram`, the guest's memory, and `state`, the device state as QEMU's migration writes it with the
capability x-ignore-shared (which leaves out memory that is mapped shared). A restore maps `ram` private, so that the kernel
pages it in as the guest touches it and no clone can change it.

On the hot path: no json, no subprocess. QMP is matched as bytes where only one answer is awaited.
"""

from __future__ import annotations

import _socket
import os
import select
from collections.abc import Sequence
from typing import NamedTuple

from .. import proc
from ..errors import DeadlineExceeded, MachineError, SnapshotError

# Descriptor numbers in QEMU, the same in every run, so that the command line is, too.
FD_QMP, FD_CONTROL, FD_STDOUT, FD_STDERR, FD_STDIN, FD_STATE, FD_CONSOLE, FD_LOCK = range(200, 208)
CHANNELS = (("control", FD_CONTROL), ("stdout", FD_STDOUT), ("stderr", FD_STDERR), ("stdin", FD_STDIN))

#: The kernel command line. tsc_early_khz is appended: without a TSC of known frequency a TCG guest has a 4 ms clock.
KERNEL_ARGS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t rdinit=/init mitigations=off audit=0 nmi_watchdog=0 "
    "nowatchdog random.trust_cpu=on tsc=reliable no_timer_check rcupdate.rcu_cpu_stall_suppress=1 cryptomgr.notests"
)


class Spec(NamedTuple):
    """What a VM is made of. Everything here is an input of the snapshot."""

    qemu: str
    accel: str  # kvm or tcg
    memory_mib: int
    vcpus: int
    kernel: str
    initramfs: str
    image: str
    tsc_khz: int

    @property
    def cpu(self) -> str:
        """The CPU model. Under TCG without erms: the kernel clears and copies pages eight bytes at a time instead of one."""
        return "host" if self.accel == "kvm" else "max,-erms,-fsrm,-la57"


def machine_args(spec: Spec) -> list[str]:
    """Machine, CPU and everything that is off."""
    return [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "microvm,rtc=on,memory-backend=ram,acpi=on,isa-serial=on,auto-kernel-cmdline=off",
        "-accel",
        spec.accel,
        "-cpu",
        spec.cpu,
        "-smp",
        str(spec.vcpus),
        "-m",
        f"{spec.memory_mib}M",
    ]


def sandbox_args() -> list[str]:
    """QEMU's seccomp filter: no new programs, no new privileges, no old system calls."""
    return ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]


def memory_args(spec: Spec, ram: str, *, shared: bool) -> list[str]:
    """The guest's RAM: the file itself (shared, to make a snapshot) or a private view of it (to restore one)."""
    share = "on" if shared else "off"
    return ["-object", f"memory-backend-file,id=ram,size={spec.memory_mib}M,mem-path={_escape(ram)},share={share}"]


def kernel_args(spec: Spec) -> list[str]:
    """Kernel, initramfs and command line."""
    append = KERNEL_ARGS
    if spec.accel == "tcg" and spec.tsc_khz:
        append += f" tsc_early_khz={spec.tsc_khz}"
    return ["-kernel", spec.kernel, "-initrd", spec.initramfs, "-append", append]


def drive_args(spec: Spec) -> list[str]:
    """The root file system, read-only and shared by all VMs."""
    return [
        "-blockdev",
        f"driver=file,node-name=root,filename={_escape(spec.image)},read-only=on,locking=off",
        "-device",
        "virtio-blk-device,drive=root",
    ]


def channel_args() -> list[str]:
    """QMP and the four ports, each over a socket that QEMU inherits."""
    args = ["-chardev", f"socket,id=qmp,fd={FD_QMP}", "-mon", "chardev=qmp,mode=control"]
    args += ["-device", "virtio-serial-device,max_ports=8"]
    for number, (name, fd) in enumerate(CHANNELS, start=1):
        args += ["-chardev", f"socket,id={name},fd={fd}", "-device", f"virtserialport,chardev={name},nr={number}"]
    return args


def console_args() -> list[str]:
    """The guest's serial console, into a file that QEMU inherits."""
    return ["-add-fd", f"fd={FD_CONSOLE},set=1", "-chardev", "file,id=console,path=/dev/fdset/1", "-serial", "chardev:console"]


def boot_argv(spec: Spec, ram: str) -> list[str]:
    """The command line that boots a VM to be snapshotted."""
    return [
        spec.qemu,
        *machine_args(spec),
        *sandbox_args(),
        *memory_args(spec, ram, shared=True),
        *kernel_args(spec),
        *drive_args(spec),
        *channel_args(),
        *console_args(),
    ]


def restore_argv(spec: Spec, ram: str) -> list[str]:
    """The command line that restores one: the same devices, memory private, state to come."""
    return [
        spec.qemu,
        *machine_args(spec),
        *sandbox_args(),
        *memory_args(spec, ram, shared=False),
        *kernel_args(spec),
        *drive_args(spec),
        *channel_args(),
        *console_args(),
        "-incoming",
        "defer",
    ]


def _escape(path: str) -> str:
    # QEMU's option syntax doubles commas.
    return path.replace(",", ",,")


class Qmp:
    """The control socket of a QEMU. Reads are matched as bytes; `deadline` bounds every wait."""

    __slots__ = ("_data", "socket")

    def __init__(self, sock: _socket.socket) -> None:
        self.socket = sock
        self._data = b""

    def send(self, *commands: bytes) -> None:
        """Send commands, without waiting for their answers."""
        try:
            self.socket.send(b"".join(commands))
        except OSError as error:
            raise MachineError(f"QEMU went away: {error.strerror}") from error

    def wait_for(self, *wanted: bytes, deadline: proc.Deadline, errors: Sequence[bytes] = (b'"error"',)) -> bytes:
        """Read until a line contains one of `wanted`; that line. Raises `MachineError` for a line with one of `errors`."""
        poller = select.poll()
        poller.register(self.socket.fileno(), select.POLLIN)
        while True:
            while (end := self._data.find(b"\n")) >= 0:
                line, self._data = self._data[:end], self._data[end + 1 :]
                for error in errors:
                    if error in line:
                        raise MachineError("QEMU refused", detail=line.decode("utf-8", "replace").strip())
                for match in wanted:
                    if match in line:
                        return line
            if not poller.poll(deadline.left() * 1000):
                raise DeadlineExceeded(f"QEMU did not answer within {deadline.timeout_s:g} s")
            try:
                data = self.socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise MachineError("QEMU went away")
            self._data += data


CAPABILITIES = b'{"execute":"qmp_capabilities"}\n'
SET_CAPABILITIES = (
    b'{"execute":"migrate-set-capabilities","arguments":{"capabilities":['
    b'{"capability":"x-ignore-shared","state":true},{"capability":"events","state":true}]}}\n'
)
STOP = b'{"execute":"stop"}\n'
CONT = b'{"execute":"cont"}\n'
QUIT = b'{"execute":"quit"}\n'
COMPLETED, FAILED = b'"status": "completed"', b'"status": "failed"'


class Vm:
    """A QEMU process and the host's ends of its channels. A context manager: leaving it kills QEMU."""

    __slots__ = ("control", "process", "qmp", "stderr", "stdin", "stdout")

    def __init__(self, argv: Sequence[str], *, extra: dict[int, int], prefix: Sequence[str] = ()) -> None:
        ours: list[_socket.socket] = []
        theirs: dict[int, int] = dict(extra)
        pairs = []
        for fd in (FD_QMP, *(fd for _, fd in CHANNELS)):
            host, guest = _socket.socketpair()
            ours.append(host)
            pairs.append(guest)
            theirs[fd] = guest.fileno()
        try:
            self.process = proc.spawn([*prefix, *argv], fds=theirs)
        except BaseException:
            for sock in ours:
                sock.close()
            raise
        finally:
            for sock in pairs:
                sock.close()
        self.qmp = Qmp(ours[0])
        self.control, self.stdout, self.stderr, self.stdin = ours[1:]

    def close(self) -> None:
        """Kill QEMU, reap it, close the channels."""
        self.process.kill()
        self.process.close()
        for sock in (self.qmp.socket, self.control, self.stdout, self.stderr, self.stdin):
            sock.close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def boot(spec: Spec, ram: str, *, console: int, prefix: Sequence[str] = ()) -> Vm:
    """Start a VM from its kernel; `console` is a descriptor for the guest's serial output and QEMU's own messages."""
    return Vm(boot_argv(spec, ram), extra={1: console, 2: console, FD_CONSOLE: console}, prefix=prefix)


def freeze(vm: Vm, state: str, *, timeout_s: float = 60.0) -> None:
    """Stop the VM, write its device state to the file `state`, end QEMU. The RAM file then is the memory snapshot."""
    deadline = proc.Deadline(timeout_s)
    fd = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        vm.qmp.send(CAPABILITIES, STOP)
        vm.qmp.wait_for(b'"STOP"', deadline=deadline)
        vm.qmp.send(SET_CAPABILITIES)
        vm.qmp.wait_for(b'"return"', deadline=deadline)
        # fd: and not exec: (which the sandbox forbids, and which can report `completed` before the file is whole).
        _send_fd(vm.qmp.socket, b'{"execute":"getfd","arguments":{"fdname":"state"}}\n', fd)
        vm.qmp.wait_for(b'"return"', deadline=deadline)
        vm.qmp.send(b'{"execute":"migrate","arguments":{"uri":"fd:state"}}\n')
        vm.qmp.wait_for(COMPLETED, deadline=deadline, errors=(b'"error"', FAILED))
        vm.qmp.send(QUIT)
        if vm.process.wait(deadline.left()) is None:
            raise MachineError(f"QEMU did not end within {timeout_s:g} s after the snapshot")
        os.fsync(fd)
    finally:
        os.close(fd)
    if os.path.getsize(state) == 0:
        raise SnapshotError("QEMU wrote no device state")


def _send_fd(sock: _socket.socket, data: bytes, fd: int) -> None:
    sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, "little"))])


def start(argv: Sequence[str], *, state: int, console: int, lock: int) -> Vm:
    """Start QEMU for a restore and ask it to load the device state from the descriptor `state`; does not wait.

    `lock` is held by QEMU for as long as it lives."""
    vm = Vm(argv, extra={FD_STATE: state, FD_LOCK: lock, 1: console, 2: console, FD_CONSOLE: console})
    vm.qmp.send(
        CAPABILITIES,
        SET_CAPABILITIES,
        b'{"execute":"migrate-incoming","arguments":{"uri":"fd:%d"}}\n' % FD_STATE,
    )
    return vm


def wait_loaded(vm: Vm, *, deadline: proc.Deadline) -> None:
    """Wait until the state is loaded. `cont` before that hangs the guest for good."""
    vm.qmp.wait_for(COMPLETED, deadline=deadline, errors=(b'"error"', FAILED))


def resume(vm: Vm, *, deadline: proc.Deadline) -> None:
    """Let the guest run, and wait until it does: a write to a port before that hangs the guest for good."""
    vm.qmp.send(CONT)
    vm.qmp.wait_for(b'"RESUME"', deadline=deadline)
