"""Which acceleration works here. `/dev/kvm` that opens proves nothing: it may be a KVM on which no stock kernel boots
(a paravirtual one such as PVM), so the probe boots one, with a deadline, and remembers the answer for this machine.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import tempfile
import time
from typing import NamedTuple

from .. import config, proc
from ..errors import DhgError, HostError
from ..files import private_dir

#: A stock kernel takes about a second under KVM, far longer where that KVM is itself in an emulated VM. A KVM that cannot boot
#: one is given up, once per machine, when the guest's console has not begun after so long, has paused for so long, or is not done.
PROBE_FIRST_WORD_S = 10.0
PROBE_SILENCE_S = 30.0
PROBE_TIMEOUT_S = 120.0
PROBE_TOKEN = "dhg-probe-ok"


class Kvm(NamedTuple):
    """Whether KVM runs guests here, and if not, why."""

    usable: bool
    reason: str


def qemu_path() -> str:
    """The QEMU to use: `DHG_QEMU`, or qemu-system-x86_64 on the PATH. Raises `HostError`."""
    name = os.environ.get("DHG_QEMU") or "qemu-system-x86_64"
    found = proc.find_program(name)
    if found is None:
        raise HostError(f"program not found: {name}", hint="apt-get install qemu-system-x86")
    return found


def qemu_version(qemu: str) -> str:
    """What a QEMU says of its version, with the distribution's package version."""
    text = proc.run([qemu, "--version"], timeout_s=30)
    first = text.splitlines()[0] if text else ""
    return first.removeprefix("QEMU emulator version ").strip()


def tsc_khz() -> int:
    """The frequency of the host's time stamp counter in kHz, measured against CLOCK_MONOTONIC_RAW; 0 if it is not constant.

    A guest under TCG reads the host's counter, and without being told its frequency falls back to a 4 ms clock. The kernel's
    own figure is only in its log, which an unprivileged user may not read. Measured over 0.2 s it is good to some parts per million.
    """
    with open("/proc/cpuinfo") as file:
        if "constant_tsc" not in file.read():
            return 0
    # rdtsc; shl rdx, 32; or rax, rdx; ret
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("0f3148c1e2204809d0c3"))
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)

    def sample() -> tuple[int, int]:
        # The tightest of several pairs: a pair that was interrupted is wide.
        best = None
        for _ in range(50):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            ticks = rdtsc()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            if best is None or after - before < best[0]:
                best = (after - before, ticks, (before + after) // 2)
        assert best is not None
        return best[1], best[2]

    start_ticks, start_ns = sample()
    time.sleep(0.2)
    end_ticks, end_ns = sample()
    return round((end_ticks - start_ticks) * 1e6 / (end_ns - start_ns))


def kvm_device() -> Kvm | None:
    """Why `/dev/kvm` cannot even be opened; None if it can."""
    if not os.path.exists("/dev/kvm"):
        return Kvm(False, "there is no /dev/kvm")
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return Kvm(False, "no permission to open /dev/kvm (is the user in the group kvm?)")
    except OSError as error:
        return Kvm(False, f"/dev/kvm cannot be opened: {error.strerror}")
    return None


def probe_argv(qemu: str, kernel: str, initramfs: str) -> list[str]:
    """The command that boots a kernel under KVM, which talks from its first moment on, and prints a word."""
    argv = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "microvm,isa-serial=on"]
    argv += ["-accel", "kvm", "-cpu", "host", "-m", "256M", "-serial", "stdio", "-kernel", kernel, "-initrd", initramfs]
    return [*argv, "-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=t rdinit=/init"]


def probe_kvm(qemu: str, kernel: str, initramfs: bytes) -> Kvm:
    """Boot `kernel` under KVM with an `initramfs` whose init prints PROBE_TOKEN.

    Where no guest begins to run it takes at most PROBE_FIRST_WORD_S; in any case at most PROBE_TIMEOUT_S.
    """
    closed = kvm_device()
    if closed is not None:
        return closed
    with tempfile.TemporaryDirectory(prefix="dhg-probe-") as folder:
        with open(f"{folder}/initramfs", "wb") as out:
            out.write(initramfs)
        try:
            text, late = _console(probe_argv(qemu, kernel, f"{folder}/initramfs"))
        except DhgError as error:
            return Kvm(False, f"no stock kernel boots on it: {error}")
    if PROBE_TOKEN in text:
        return Kvm(True, "a stock kernel boots on it")
    last = text.strip().splitlines()
    said = last[-1].removeprefix("qemu-system-x86_64: ")[:100] if last else "it printed nothing"
    return Kvm(False, f"no stock kernel boots on it: {late}{said}")


def _console(argv: list[str]) -> tuple[str, str]:
    """What a VM that is to end by itself prints, and why it was ended if it was."""
    deadline = proc.Deadline(PROBE_TIMEOUT_S)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    data = late = b""
    try:
        with proc.spawn(argv, fds={1: writer, 2: writer}) as machine:
            os.close(writer)
            writer = -1
            poller = select.poll()
            poller.register(reader, select.POLLIN)
            while not late:
                wait_s = min(PROBE_SILENCE_S if data else PROBE_FIRST_WORD_S, deadline.left())
                if not poller.poll(wait_s * 1000):
                    late = (
                        b"silent for %.0f s, last: " % wait_s
                        if deadline.left()
                        else b"not done in %.0f s, last: " % PROBE_TIMEOUT_S
                    )
                elif part := os.read(reader, 65536):
                    data += part
                else:
                    break
            if late:
                machine.kill()
            else:
                machine.wait(deadline.left())
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    return data.decode("utf-8", "replace"), late.decode()


def memory() -> str:
    """The file that remembers the answers of probes."""
    return f"{config.cache_dir()}/probe.json"


def remembered() -> dict[str, list[object]]:
    """The answers of earlier probes, by machine."""
    try:
        with open(memory()) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def probe_key(qemu: str) -> str:
    """What a remembered answer is for: the machine's kernel, CPU and QEMU, and whether we may open /dev/kvm."""
    return "|".join(
        (os.uname().release, proc.cpu_model(), qemu, qemu_version(qemu), "root" if os.geteuid() == 0 else "user")
    )


def known_kvm(qemu: str) -> Kvm | None:
    """What is known without trying: that the device cannot be opened, or the answer of an earlier probe."""
    closed = kvm_device()
    if closed is not None:
        return closed
    answer = remembered().get(probe_key(qemu))
    if isinstance(answer, list) and len(answer) == 2:
        return Kvm(bool(answer[0]), str(answer[1]))
    return None


def kvm(qemu: str, kernel: str, initramfs: bytes, *, insist: bool = False) -> Kvm:
    """The remembered answer of the probe, or a fresh one: with `insist` also where the remembered one is that KVM is not usable.

    A device that cannot be opened is not worth remembering.
    """
    result = known_kvm(qemu)
    if result is not None and (result.usable or not insist):
        return result
    closed = kvm_device()
    if closed is not None:
        return closed
    result = probe_kvm(qemu, kernel, initramfs)
    known = remembered()
    known[probe_key(qemu)] = [result.usable, result.reason]
    private_dir(config.cache_dir())
    with open(f"{memory()}.{os.getpid()}", "w") as file:
        json.dump(known, file)
    os.replace(f"{memory()}.{os.getpid()}", memory())
    return result
