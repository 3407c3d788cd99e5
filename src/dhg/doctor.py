"""`dhg doctor`: what this host has and lacks, and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, NamedTuple

from . import config, proc
from .engine import probe
from .errors import DhgError, SnapshotMissing
from .image import build
from .snapshot import inventory, store


class Finding(NamedTuple):
    """One thing looked at. `level` is ok, note (something is missing that `exec --vm` can do without) or bad."""

    name: str
    level: str
    text: str
    remedy: str | None = None


#: Programs that prepare needs, by the package that has them; those that only some hosts need are looked at elsewhere.
PREPARE_PROGRAMS = {"mmdebstrap": "mmdebstrap", "mkfs.erofs": "erofs-utils", "tar": "tar", "dpkg-deb": "dpkg"}


def examine() -> list[Finding]:
    """Look at everything. Changes nothing."""
    return [
        _python(),
        _qemu(),
        *_programs(),
        _kvm(),
        _userfaultfd(),
        _namespaces(),
        _home(),
        _memory(),
        *_snapshots(),
        *_leftovers(),
    ]


def fix() -> list[str]:
    """Remove what interrupted commands left and what no snapshot needs any more; what was removed."""
    return inventory.clean().removed


def _python() -> Finding:
    return Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def _qemu() -> Finding:
    try:
        path = probe.qemu_path()
        return Finding("qemu", "ok", f"{probe.qemu_version(path)} at {path}")
    except DhgError as error:
        return Finding("qemu", "bad", str(error), error.hint or "apt-get install --reinstall qemu-system-x86")


def _programs() -> list[Finding]:
    found = []
    for program, package in PREPARE_PROGRAMS.items():
        path = proc.find_program(program)
        if path:
            found.append(Finding(program, "ok", path))
        else:
            found.append(Finding(program, "note", "not there; `dhg vm prepare` needs it", f"apt-get install {package}"))
    return found


def _known_kvm() -> probe.Kvm | None:
    answer = probe.kvm_device()
    if answer is None:
        try:
            answer = probe.known_kvm(probe.qemu_path())
        except DhgError:
            answer = None
    return answer


def _kvm() -> Finding:
    answer = _known_kvm()
    if answer is None:
        return Finding("kvm", "note", "/dev/kvm opens; whether a guest boots on it is not known yet", "dhg vm prepare")
    if answer.usable:
        return Finding("kvm", "ok", answer.reason)
    remedy = "nothing: software emulation is used instead"
    if probe.kvm_device() is None:
        remedy += "; `dhg vm prepare --accel kvm` tries again"
    return Finding("kvm", "note", f"not usable: {answer.reason}", remedy)


def _userfaultfd() -> Finding:
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return Finding("userfaultfd", "ok", "/dev/userfaultfd opens")
    try:
        with open("/proc/sys/vm/unprivileged_userfaultfd") as file:
            allowed = file.read().strip() == "1" or os.geteuid() == 0
    except OSError:
        return Finding("userfaultfd", "note", "the kernel has none; only the firecracker engine needs it")
    if allowed:
        return Finding("userfaultfd", "ok", "the system call is allowed")
    return Finding(
        "userfaultfd",
        "note",
        "not allowed; only the firecracker engine needs it",
        "sysctl vm.unprivileged_userfaultfd=1",
    )


def _namespaces() -> Finding:
    if os.geteuid() == 0:
        return Finding("user namespaces", "ok", "not needed: this is root")
    for name in ("kernel/unprivileged_userns_clone", "user/max_user_namespaces"):
        try:
            with open(f"/proc/sys/{name}") as file:
                if file.read().strip() == "0":
                    return Finding(
                        "user namespaces",
                        "note",
                        "off; without root prepare needs them",
                        f"sysctl {name.replace('/', '.')}=1",
                    )
        except OSError:
            continue
    return Finding("user namespaces", "ok", "allowed")


def _home() -> Finding:
    home = config.home()
    place = home
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    if not os.access(place, os.W_OK):
        # QEMU opens the memory of a snapshot for writing, though it maps it private; a checkpoint does not.
        restorable = _has_checkpoint()
        text = f"{home} cannot be written; `dhg vm prepare` {'needs' if restorable else 'and QEMU need'} that"
        return Finding("home", "note" if restorable else "bad", text, "set DHG_HOME to a directory that can")
    free = shutil.disk_usage(place).free
    needed_mib = build.room_mib(config.DEFAULT_DEEPHAVEN, config.DEFAULT_MEMORY_MIB)
    if free >> 20 < needed_mib:
        text = f"{home}: {free >> 20} MiB free; `dhg vm prepare` takes {needed_mib}"
        return Finding("home", "note", text, "free some, or set DHG_HOME")
    return Finding("home", "ok", f"{home}: {free >> 30} GiB free")


def _has_checkpoint() -> bool:
    """Whether the snapshot that `dhg exec --vm` takes by itself has one that fits."""
    try:
        snapshot = store.open_snapshot()
    except DhgError:
        return False
    os.close(snapshot.lock)
    return snapshot.checkpoint is not None


def _memory() -> Finding:
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) >> 10 for line in file if line.startswith("MemAvailable:"))
    if available < 512:
        return Finding("memory", "bad", f"{available} MiB available; a VM takes 150 MiB and up", "end something")
    return Finding("memory", "ok", f"{available} MiB available")


def _snapshots() -> list[Finding]:
    """Only the snapshot that `dhg exec --vm` takes by itself can be bad; the others have to be asked for."""
    items = [inventory.describe(path) for path in inventory.generations()]
    found, chosen = list[Finding](), None
    try:
        chosen = store.choose()
        if chosen not in [(item["version"], item["engine"]) for item in items]:
            remedy = store.prepare_command(chosen[0], engine=chosen[1])
            found.append(
                Finding("snapshots", "bad", f"there is none of {config.title(chosen[0])} ({chosen[1]})", remedy)
            )
    except SnapshotMissing as error:
        found.append(Finding("snapshots", "bad", str(error), store.prepare_command()))
    except DhgError as error:
        found.append(Finding("snapshots", "bad", str(error), error.hint))
    return found + [_snapshot(item, (item["version"], item["engine"]) == chosen) for item in items]


def _snapshot(item: dict[str, Any], chosen: bool) -> Finding:
    name = f"snapshot {item['version']} ({item['engine']})"
    remedy = store.prepare_command(item["version"], engine=item["engine"])
    if not item["fits"]:
        return Finding(name, "bad" if chosen else "note", str(item["problem"]), remedy + " --force")
    text = f"{item['accel']}, {item['disk_bytes'] >> 20} MiB"
    kvm = _known_kvm()
    if item["accel"] == "tcg" and kvm is not None and kvm.usable:
        return Finding(name, "note", f"{text}; KVM works here and would be faster", remedy)
    if item["accel"] == "tcg" and not item["checkpoint"] and config.use_checkpoint():
        why = (
            "there is no checkpoint of QEMU"
            if item["checkpoint"] is None
            else "made with another kernel, CPU or library"
        )
        return Finding(name, "note", f"{text}; {why}: clones take three times as long", remedy + " --force")
    return Finding(name, "ok", text)


def _leftovers() -> list[Finding]:
    left = inventory.leftovers()
    if not left:
        return [Finding("leftovers", "ok", "none")]
    return [Finding("leftovers", "note", path, "dhg doctor --fix") for path in left]
