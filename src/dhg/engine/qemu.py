"""QEMU's command lines, one builder a device or concern, and the boot of a VM that is to be frozen.

The snapshot is two files: `ram`, the guest's memory, and `state`, the device state as QEMU's migration writes it with the
capability x-ignore-shared (which leaves out memory that is mapped shared). A restore maps `ram` private, so that the kernel
pages it in as the guest touches it and no clone can change it.

Not on the hot path: `prepare` stores the restore's command line in the snapshot.
"""

from __future__ import annotations

from typing import NamedTuple

from .qmp import CHANNELS, FD_CONSOLE, FD_GO, FD_QMP, FD_RAM, FD_STATE, TB_SIZE_MIB, Vm, load, logged

#: The kernel command line. tsc_early_khz is appended: without a TSC of known frequency a TCG guest has a 4 ms clock.
#: The initcall that is left out makes 10,000 files for tracing, which nobody mounts: 9 MB of memory that each snapshot would have.
KERNEL_ARGS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t rdinit=/init mitigations=off audit=0 nmi_watchdog=0 "
    "nowatchdog random.trust_cpu=on tsc=reliable no_timer_check rcupdate.rcu_cpu_stall_suppress=1 cryptomgr.notests "
    "psi=0 cgroup_disable=memory init_on_alloc=0 init_on_free=1 hardened_usercopy=off transparent_hugepage=never "
    "initcall_blacklist=tracer_init_tracefs"
)

#: And under software emulation. 112 is X86_FEATURE_REP_GOOD (arch/x86/include/asm/cpufeatures.h): with it pages are cleared by one
#: instruction that repeats itself, of which TCG makes a slower loop than the kernel's own is.
KERNEL_ARGS_TCG = " clearcpuid=112"


class Spec(NamedTuple):
    """What a VM is made of. Everything here is an input of the snapshot."""

    qemu: str
    accel: str  # kvm or tcg
    memory_mib: int
    vcpus: int
    kernel: str
    initramfs: str
    stub: str
    image: str
    tsc_khz: int
    #: A file system with the server's process, which was started natively (image/server.py); empty where the guest starts it itself.
    server: str = ""

    @property
    def cpu(self) -> str:
        """The CPU model. Under TCG without erms: the kernel clears and copies pages eight bytes at a time instead of one. And without
        random numbers: those would be drawn by QEMU's own generator, whose state all clones of a checkpoint have in common."""
        return "host" if self.accel == "kvm" else "max,-erms,-fsrm,-la57,-rdrand,-rdseed"


def machine_args(spec: Spec) -> list[str]:
    """Machine, CPU and everything that is off."""
    return [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "microvm,rtc=on,memory-backend=ram,acpi=on,isa-serial=on,auto-kernel-cmdline=off,mem-merge=off,dump-guest-core=off",
        "-accel",
        f"tcg,tb-size={TB_SIZE_MIB}" if spec.accel == "tcg" else spec.accel,
        "-cpu",
        spec.cpu,
        "-smp",
        str(spec.vcpus),
        "-m",
        f"{spec.memory_mib}M",
    ]


def memory_args(spec: Spec, ram: str, *, shared: bool) -> list[str]:
    """The guest's RAM: the file itself (shared, to make a snapshot) or a private view of one (to restore it)."""
    # Where it is mapped decides whether huge pages of the file can be mapped as such.
    share = "on,align=2M" if shared else "off"
    return ["-object", f"memory-backend-file,id=ram,size={spec.memory_mib}M,mem-path={_escape(ram)},share={share}"]


def command_line(accel: str) -> str:
    """The kernel's command line but for what depends on the host."""
    return KERNEL_ARGS + (KERNEL_ARGS_TCG if accel == "tcg" else "")


def kernel_args(spec: Spec, *, stub: bool) -> list[str]:
    """Kernel, initramfs and command line; for a restore only the head of the kernel.

    The guest's kernel is in its memory. QEMU wants one all the same, so that it makes the same devices, and would read all of it
    and of the initramfs: 12 MB, 10 ms.
    """
    append = f"{command_line(spec.accel)} dhg.accel={spec.accel}"
    if spec.accel == "tcg" and spec.tsc_khz:
        append += f" tsc_early_khz={spec.tsc_khz}"
    if spec.server:
        append += " dhg.server=1"
    files = ["-kernel", spec.stub] if stub else ["-kernel", spec.kernel, "-initrd", spec.initramfs]
    return [*files, "-append", append]


def drive_args(spec: Spec) -> list[str]:
    """The root file system and the server's process, read-only and shared by all VMs."""
    args = []
    for name, path in (("root", spec.image), ("server", spec.server)):
        if path:
            args += ["-blockdev", f"driver=file,node-name={name},filename={_escape(path)},read-only=on,locking=off"]
            args += ["-device", f"virtio-blk-device,drive={name}"]
    return args


def channel_args() -> list[str]:
    """QMP and the ports, each over a socket that QEMU inherits."""
    args = ["-chardev", f"socket,id=qmp,fd={FD_QMP}", "-mon", "chardev=qmp,mode=control"]
    args += ["-device", "virtio-serial-device,max_ports=8"]
    for number, (name, fd) in enumerate(CHANNELS, start=1):
        if number < len(CHANNELS):
            args += ["-chardev", f"socket,id={name},fd={fd}"]
        args += ["-device", f"virtserialport,chardev={name},nr={number}"]
    # The last one's socket comes when the VM is sure to die with its client; see qmp.Vm.
    return [*args, "-readconfig", f"/dev/fd/{FD_GO}"]


def console_args() -> list[str]:
    """The guest's serial console, into a file that QEMU inherits."""
    return [
        "-add-fd",
        f"fd={FD_CONSOLE},set=1",
        "-chardev",
        "file,id=console,path=/dev/fdset/1",
        "-serial",
        "chardev:console",
    ]


def boot_argv(spec: Spec) -> list[str]:
    """The command line that boots a VM to be snapshotted, its memory being the file behind FD_RAM."""
    return [
        spec.qemu,
        *machine_args(spec),
        *memory_args(spec, f"/dev/fd/{FD_RAM}", shared=True),
        *kernel_args(spec, stub=False),
        *drive_args(spec),
        *channel_args(),
        *console_args(),
    ]


def restore_argv(spec: Spec, ram: str, *, shared: bool = False) -> list[str]:
    """The command line that restores one: the same devices, memory private (or `shared`, to freeze it again), state to come."""
    return [
        spec.qemu,
        *machine_args(spec),
        *memory_args(spec, ram, shared=shared),
        *kernel_args(spec, stub=True),
        *drive_args(spec),
        *channel_args(),
        "-chardev",
        "null,id=console",
        "-serial",
        "chardev:console",
        # Not fd: at once: QEMU 7.2 can set the capability that the snapshot was written with over QMP only.
        "-incoming",
        "defer",
    ]


def _escape(path: str) -> str:
    # QEMU's option syntax doubles commas.
    return path.replace(",", ",,")


def boot_again(spec: Spec, ram: int, *, state: int) -> Vm:
    """Start another QEMU for a VM that was frozen: its memory is what `ram` has, its device state what `state` has. Does not wait."""
    argv = restore_argv(spec, f"/dev/fd/{FD_RAM}", shared=True)
    # As this user: where root lacks the right to look into another's process (containers), it can look into this one.
    vm = logged(argv, extra={FD_STATE: state, FD_RAM: ram}, change_user=False)
    load(vm)
    return vm


def boot(spec: Spec, ram: int, *, console: int) -> Vm:
    """Start a VM from its kernel; `ram` is a descriptor of its memory, `console` of its serial output and QEMU's own messages."""
    return Vm(boot_argv(spec), extra={1: console, 2: console, FD_CONSOLE: console, FD_RAM: ram})
