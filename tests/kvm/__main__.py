"""`./dev test-kvm`: every line of the KVM path, on a host that may have no KVM.

QEMU's software emulation has AMD's SVM, so a guest under it (L1) can be a KVM host with guests of its own (L2). L1 is a small
Debian with QEMU and the package under test; in it the public commands run, `checks.py` says which. Slow, and no place to measure
anything but function.

Built once and cached in .dev/kvm: L1's root file system and a disk with the build stages that `prepare` finds cached (L1 has no
network). The package is packed anew each time.
"""

from __future__ import annotations

import _socket
import argparse
import json
import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dhg
from dhg import config, proc
from dhg.engine import probe
from dhg.errors import DhgError
from dhg.files import private_dir, remove_tree
from dhg.image import build as image
from dhg.image import kernel
from dhg.image.cpio import Archive

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".dev" / "kvm"
LOGS = ROOT / ".dev" / "kvm-logs"

PACKAGES = ("qemu-system-x86", "kmod", "python3-minimal", "libpython3.11-stdlib")
#: In L1 beyond what a guest of dhg has.
MODULES = (*kernel.MODULES, "kvm", "kvm_amd")
SLIM = ("path-exclude=/usr/share/doc/*", "path-exclude=/usr/share/man/*", "path-exclude=/usr/share/locale/*")

#: A machine that has not said anything for so long hangs: it beats every five seconds.
SILENCE_S = 180.0
FD_REPORT, FD_LEASH = 200, 201
#: Console logs that are kept.
LOGS_KEPT = 50

KERNEL_ARGS = (
    "console=ttyS0 loglevel=4 panic=-1 reboot=t rdinit=/init mitigations=off audit=0 nowatchdog tsc=reliable no_timer_check "
    "rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on"
)


class Plan(NamedTuple):
    """What is to be tried."""

    engines: list[str]
    version: str
    memory_mib: int
    deadline_s: float
    verbose: bool = False
    silence_s: float = SILENCE_S


class Verdict(NamedTuple):
    """How one boot of L1 ended: the checks as (name, ok), and why it did not come to its end, if it did not."""

    checks: list[tuple[str, bool]]
    lost: str | None

    @property
    def good(self) -> bool:
        """All that was to be checked was, and is as it should be."""
        return not self.lost and all(ok for _, ok in self.checks)


def cached(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The file .dev/kvm/NAME-KEY, built if it is not there; older ones of that name go."""
    CACHE.mkdir(parents=True, exist_ok=True)
    result = CACHE / f"{name}-{key}"
    if not result.exists():
        print(f"building {name}", flush=True)
        for old in CACHE.glob(f"{name}-*"):
            remove_tree(str(old)) if old.is_dir() else old.unlink()
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=CACHE) as folder:
            build(Path(folder))
            os.replace(Path(folder) / name, result)
    return result


def l1_root() -> Path:
    """The root file system of L1."""

    def build(tmp: Path) -> None:
        tmp.chmod(0o755)
        argv = ["mmdebstrap", "--variant=minbase", "--include=" + ",".join(PACKAGES)]
        argv += [f"--dpkgopt={option}" for option in SLIM] + [image.SUITE, f"{tmp}/root.tar"]
        argv += [mirror] if (mirror := os.environ.get("DHG_DEBIAN_MIRROR")) else []
        env = proc.minimal_env({name: value for name, value in os.environ.items() if name.endswith("_proxy")})
        log = f"{CACHE}/build.log"
        proc.run(argv, timeout_s=1800, env=env, log=log)
        tree = tmp / "tree"
        tree.mkdir()
        proc.run(
            ["tar", "-xf", f"{tmp}/root.tar", "-C", str(tree), "--exclude=./dev/*", "--no-same-owner"],
            timeout_s=300,
            log=log,
        )
        proc.run(["mkfs.erofs", "-d0", "-T0", "--all-root", f"{tmp}/l1", str(tree)], timeout_s=600, log=log)
        remove_tree(str(tree))

    return cached("l1", image.stage_key(image.SUITE, *PACKAGES, *SLIM), build)


def stages_disk(version: str) -> tuple[Path, str]:
    """A disk with the build stages of `version`, without what only building them needs; and the base stage's directory."""
    log = f"{private_dir(config.home() + '/log')}/test-kvm.log"
    base = image.base_system(log)
    root = image.root_image(base, version, log)
    vmlinux = os.path.dirname(image.vmlinux(base))

    def build(tmp: Path) -> None:
        tree = tmp / "tree"
        target = tree / "base" / os.path.basename(base)
        shutil.copytree(base, target, symlinks=True, ignore=shutil.ignore_patterns("root.tar"))
        shutil.copytree(root, tree / "image" / os.path.basename(root))
        shutil.copytree(vmlinux, tree / "vmlinux" / os.path.basename(vmlinux))
        # As they are in a home: what is not private there would be made so, which cannot be on a disk that is read-only.
        for stage in tree.iterdir():
            stage.chmod(0o700)
        proc.run(["mkfs.erofs", "-d0", "-T0", "--all-root", f"{tmp}/stages-{version}", str(tree)], timeout_s=600)
        remove_tree(str(tree))

    return cached(f"stages-{version}", image.stage_key(base, root, vmlinux, "private"), build), base


def payload(archive: Archive, plan: Plan) -> None:
    """Add what L1 copies over its root file system: the installed package, its command, the checks."""
    package = Path(dhg.__file__).parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            name = path.relative_to(package.parent)
            archive.file(f"payload/usr/local/lib/python3.11/dist-packages/{name}", path.read_bytes())
    command = b"#!/usr/bin/python3\n" + (ROOT / "scripts" / "dhg").read_bytes().partition(b"\n")[2]
    archive.file("payload/usr/local/bin/dhg", command, mode=0o755)
    archive.file("payload/l1-main", (HERE / "l1-main").read_bytes())
    archive.file("payload/l1-checks.py", (HERE / "checks.py").read_bytes())
    archive.file("payload/l1-args", f"{','.join(plan.engines)} {plan.version}\n".encode())
    firecracker = os.environ.get("DHG_FIRECRACKER")
    if "firecracker" in plan.engines and firecracker:
        archive.file("payload/usr/local/bin/firecracker", Path(firecracker).read_bytes(), mode=0o755)


def l1_initramfs(base: str, plan: Plan) -> bytes:
    """The initramfs of L1."""
    archive = Archive()
    archive.file("init", (HERE / "l1-init").read_bytes(), mode=0o755)
    archive.file("bin/busybox", Path(base, "busybox").read_bytes(), mode=0o755)
    files = kernel.module_files(f"{base}/kernel")
    order = kernel.load_order(files, MODULES)
    for name in order:
        archive.file(f"modules/{name}.ko", Path(files[name]).read_bytes())
    archive.file("modules/order", "".join(f"{name}.ko\n" for name in order).encode())
    payload(archive, plan)
    return archive.whole()


def l1_argv(plan: Plan, *, folder: Path, disks: list[Path], console: str) -> list[str]:
    """QEMU's command line for L1, whose kernel and initramfs are in `folder`.

    One vCPU: with two it hangs now and then where the kernel patches its own code.
    """
    khz = probe.tsc_khz()
    # Told, not measured: under emulation the kernel's calibration loops at times do not end.
    clock = f" tsc_early_khz={khz} lpj={khz * 4}" if khz else ""
    argv = [probe.qemu_path(), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-M", "microvm,rtc=on,acpi=on,isa-serial=on,auto-kernel-cmdline=off", "-accel", "tcg,tb-size=512"]
    argv += ["-cpu", "max,-erms,-fsrm,-la57", "-smp", "1", "-m", f"{plan.memory_mib}M"]
    argv += ["-kernel", f"{folder}/kernel", "-initrd", f"{folder}/initramfs", "-append", KERNEL_ARGS + clock]
    for number, disk in enumerate(disks):
        argv += ["-blockdev", f"driver=file,node-name=d{number},filename={disk},read-only=on,locking=off"]
        argv += ["-device", f"virtio-blk-device,drive=d{number}"]
    argv += ["-device", "virtio-serial-device", "-chardev", f"socket,id=report,fd={FD_REPORT}"]
    argv += ["-device", "virtserialport,chardev=report,nr=1"]
    return [*argv, "-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]


class Watcher:
    """Reads L1's reports and shows them."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self.checks: list[tuple[str, bool]] = []
        self.done = False
        self.at = "boot"
        self._data = b""

    def take(self, data: bytes) -> None:
        """Take what has arrived."""
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
            self._report(json.loads(line))

    def _report(self, report: dict[str, Any]) -> None:
        kind = report["kind"]
        if kind == "up":
            print(f"      L1 is up: {report['text']}", flush=True)
        elif kind == "begin":
            self.at = report["name"]
        elif kind == "end":
            self.checks.append((report["name"], report["ok"]))
            print(f"{'ok  ' if report['ok'] else 'FAIL'}  {report['name']} ({report['s']} s in L1)", flush=True)
            if not report["ok"] or self._verbose:
                print("".join(f"      {line}\n" for line in report["text"].splitlines()), end="", flush=True)
        elif kind == "done":
            self.done = True


def watch(argv: list[str], plan: Plan) -> Verdict:
    """Run L1 to its end, or end it (by its pid) when it has been silent or at work for too long."""
    ours, theirs = _socket.socketpair()
    leash, held = os.pipe2(os.O_CLOEXEC)
    watcher = Watcher(verbose=plan.verbose)
    deadline = proc.Deadline(plan.deadline_s)
    lost = None
    try:
        with proc.spawn(argv, fds={FD_REPORT: theirs.fileno(), FD_LEASH: leash}) as machine:
            proc.kill_with_us(machine.pid, leash)
            theirs.close()
            poller = select.poll()
            poller.register(ours.fileno(), select.POLLIN)
            while not watcher.done:
                wait_s = min(plan.silence_s, deadline.left())
                if not poller.poll(wait_s * 1000):
                    lost = (
                        f"no sign of life for {wait_s:.0f} s"
                        if deadline.left()
                        else f"not done in {plan.deadline_s:g} s"
                    )
                    break
                data = ours.recv(65536)
                if not data:
                    lost = "it ended early"
                    break
                watcher.take(data)
            if watcher.done:
                machine.wait(20)
    finally:
        ours.close()
        os.close(leash)
        os.close(held)
    return Verdict(watcher.checks, f"{lost}, at: {watcher.at}" if lost else None)


def attempt(plan: Plan, base: str, disks: list[Path], log: Path) -> Verdict:
    """One boot of L1."""
    # Its command line names nothing in DHG_HOME, where other tests look for VMs that were left.
    for old in CACHE.glob(".run-*"):
        if not Path("/proc", old.name.split("-")[1]).exists():
            remove_tree(str(old))
    with tempfile.TemporaryDirectory(prefix=f".run-{os.getpid()}-", dir=CACHE) as name:
        folder = Path(name)
        (folder / "initramfs").write_bytes(l1_initramfs(base, plan))
        (folder / "kernel").symlink_to(image.kernel_image(base))
        return watch(l1_argv(plan, folder=folder, disks=disks, console=str(log)), plan)


def engines(asked: str | None) -> list[str]:
    """The engines to try; says why one is left out."""
    if asked:
        return asked.split(",")
    if not os.environ.get("DHG_FIRECRACKER"):
        print("skip  firecracker: no binary is named in DHG_FIRECRACKER", flush=True)
        return ["qemu"]
    if "--engine" not in proc.run(
        [str(Path(sys.executable).with_name("dhg")), "vm", "prepare", "--help"], timeout_s=60
    ):
        print("skip  firecracker: `dhg vm prepare` has no --engine yet", flush=True)
        return ["qemu"]
    return ["qemu", "firecracker"]


def once(plan: Plan, base: str, disks: list[Path]) -> Verdict:
    """Boot and watch; once more if the machine itself was lost, which is said."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for old in sorted(LOGS.glob("*.log"))[:-LOGS_KEPT]:
        old.unlink()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in (1, 2):
        log = LOGS / f"{stamp}-{number}.log"
        verdict = attempt(plan, base, disks, log)
        if not verdict.good:
            print(f"      L1's console ({log}):")
            print("".join(f"      | {line}\n" for line in proc.tail(log.read_text(errors="replace"), 40).splitlines()))
        if verdict.lost is None:
            break
        print(f"LOST  L1: {verdict.lost}{'; trying once more' if number == 1 else ''}", flush=True)
    if number == 2:
        print("note: the first L1 was lost, see above; this is the outcome of the second")
    return verdict


def main() -> int:
    """Build what is missing, run, say how it went. The exit code."""
    parser = argparse.ArgumentParser(prog="./dev test-kvm", description="KVM, tried for real on an emulated KVM host.")
    parser.add_argument("--deephaven", action="store_true", help="the full Deephaven snapshot; takes long")
    parser.add_argument("--engine", help="qemu, firecracker, or both with a comma between")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="the whole of it N times in a row")
    parser.add_argument("-v", action="store_true", help="show what each check saw")
    args = parser.parse_args()
    version = config.DEFAULT_DEEPHAVEN if args.deephaven else config.BARE
    size = (8192, 3600.0) if args.deephaven else (2560, 1500.0)
    plan = Plan(engines(args.engine), version, *size, verbose=args.v)
    stages, base = stages_disk(version)
    disks = [l1_root(), stages]
    passed = failed = 0
    for number in range(1, args.runs + 1):
        began = time.monotonic()
        verdict = once(plan, base, disks)
        good = sum(ok for _, ok in verdict.checks)
        bad = len(verdict.checks) - good + bool(verdict.lost)
        passed, failed = passed + good, failed + bad
        if args.runs > 1:
            print(f"run {number}: {good} passed, {bad} failed, {time.monotonic() - began:.0f} s", flush=True)
    print(f"test-kvm: {passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DhgError as error:
        sys.exit(f"test-kvm: {error}{': ' + error.detail if error.detail else ''}")
