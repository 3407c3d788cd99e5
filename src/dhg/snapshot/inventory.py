"""What there is and what may go: `status` and `clean`."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from typing import Any, NamedTuple

from .. import config, proc
from ..engine import probe
from ..errors import DhgError, SnapshotError, SnapshotMissing
from ..files import remove_tree, try_lock
from ..image import build, server
from . import engines, store

ENGINES = ("qemu", "firecracker")
#: The stages that have a cache (image/build.py, image/server.py).
STAGES = ("base", "image", "server", "vmlinux")


def describe(path: str) -> dict[str, Any]:
    """What the generation in the directory `path` is, and whether it fits this host. Does not raise for a damaged one."""
    version = os.path.basename(os.path.dirname(path))
    engine = os.path.basename(path).lstrip(".").partition("-")[0]
    item: dict[str, Any] = {
        "version": version,
        "engine": engine,
        "accel": None,
        "path": path,
        "disk_bytes": _disk_bytes(path),
        "created": None,
        "age_s": 0.0,
        "prepare_s": None,
        "memory_mib": None,
        "vcpus": None,
        "in_use": in_use(path),
        "fits": False,
        # Whether clones go on with QEMU's process; None where there is no checkpoint (under KVM there never is).
        "checkpoint": None,
        "problem": None,
    }
    try:
        with open(path + "/manifest.json") as file:
            manifest = json.load(file)
        inputs = manifest["inputs"]
        created = datetime.datetime.fromisoformat(manifest["created"])
        item.update({key: inputs[key] for key in ("accel", "memory_mib", "vcpus")}, created=manifest["created"])
        item["prepare_s"] = manifest["prepare_s"]
        item["age_s"] = (datetime.datetime.now(datetime.UTC) - created).total_seconds()
    except (OSError, ValueError, KeyError, TypeError) as error:
        item["problem"] = f"damaged: no readable manifest ({error})"
        return item
    try:
        snapshot = check(path, version, engine, inputs)
        item["fits"] = True
        if "checkpoint" in manifest["files"]:
            item["checkpoint"] = snapshot.checkpoint is not None
    except DhgError as error:
        item["problem"] = str(error)
    return item


def check(path: str, version: str, engine: str, inputs: dict[str, Any]) -> store.Snapshot:
    """The snapshot of a generation, if it can be restored here; without its lock. Raises `SnapshotError`."""
    try:
        lock = os.open(path + "/lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotError(f"damaged: {error.strerror}: {path}/lock") from None
    try:
        snapshot = store.read(path, version, engine, lock)
    except FileNotFoundError as error:
        raise SnapshotError(f"damaged: there is no {error.filename}") from None
    finally:
        os.close(lock)
    now = engines.version(engine, inputs["engine_path"])
    if now != inputs["engine_version"]:
        raise SnapshotError(f"made with {engines.title(engine)} {inputs['engine_version']}; here is {now}")
    return snapshot


def in_use(path: str) -> bool:
    """Whether a VM of this generation lives."""
    try:
        fd = os.open(path + "/lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def stages_of(path: str) -> set[str]:
    """The stage directories whose files the VMs of a generation read: the root image, and the server's process where it has one."""
    try:
        with open(path + "/manifest.json") as file:
            inputs = json.load(file)["inputs"]
        found = {f"{config.cache_dir()}/image/{inputs['image']}"}
        return found | ({f"{config.cache_dir()}/server/{inputs['server']}"} if inputs.get("server") else set())
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _memory_of(path: str) -> int:
    try:
        with open(path + "/manifest.json") as file:
            return int(json.load(file)["inputs"]["memory_mib"])
    except (OSError, ValueError, KeyError, TypeError):
        return config.DEFAULT_MEMORY_MIB


def _disk_bytes(path: str) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(f"{folder}/{name}").st_blocks * 512
            except OSError:
                pass
    return total


def generations() -> list[str]:
    """The generations that links point to, ordered by version and engine."""
    found = []
    root = config.snapshots_dir()
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    for name in names:
        for engine in ENGINES:
            try:
                found.append(f"{root}/{name}/{os.readlink(f'{root}/{name}/{engine}')}")
            except OSError:
                continue
    return found


def survey() -> dict[str, Any]:
    """Everything `dhg vm status` shows: home, host, snapshots."""
    qemu: dict[str, Any] = {"path": None, "version": None, "problem": None}
    kvm: dict[str, Any] = {"usable": None, "reason": "`dhg vm prepare` tries it"}
    try:
        qemu["path"] = probe.qemu_path()
        qemu["version"] = probe.qemu_version(qemu["path"])
        answer = probe.known_kvm(qemu["path"])
        if answer is not None:
            kvm = {"usable": answer.usable, "reason": answer.reason}
    except DhgError as error:
        qemu["problem"] = str(error)
    with open("/proc/meminfo") as file:
        memory = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in file}
    return {
        "home": config.home(),
        "host": {
            "cpu": proc.cpu_model(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_mib": memory["MemTotal"],
            "available_mib": memory["MemAvailable"],
            "kernel": os.uname().release,
            "kvm": kvm,
            "qemu": qemu,
        },
        "snapshots": [describe(path) for path in generations()],
    }


class Cleaned(NamedTuple):
    """What `clean` removed, and what it left because a VM uses it."""

    removed: list[str]
    kept: list[str]


def remove_generation(path: str) -> bool:
    """Remove a generation unless a VM of it lives; whether it is gone."""
    try:
        fd = os.open(f"{path}/lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        remove_tree(path)
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_tree(path)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def sweep(folder: str) -> Cleaned:
    """Remove what no link in a version's directory points to and no VM uses. The caller holds the prepare lock."""
    result = Cleaned([], [])
    names = os.listdir(folder)
    current = {
        os.readlink(f"{folder}/{name}") for name in names if os.path.islink(f"{folder}/{name}") and name in ENGINES
    }
    for name in names:
        path = f"{folder}/{name}"
        if name.endswith(".tmp") and os.path.islink(path):
            os.unlink(path)
        elif name.startswith(tuple(f".{engine}-" for engine in ENGINES)) and name not in current:
            (result.removed if remove_generation(path) else result.kept).append(path)
    return result


def leftovers() -> list[str]:
    """What interrupted commands left, and nobody is at work on or uses, and build stages that no snapshot needs any more."""
    found = []
    if not os.access(config.home(), os.W_OK):
        # Nobody leaves anything there, and nothing could be removed.
        return []
    for folder in _subdirs(config.snapshots_dir()):
        lock = try_lock(f"{folder}/.prepare-lock")
        if lock is None:
            continue
        try:
            current = {os.path.basename(path) for path in generations() if os.path.dirname(path) == folder}
            for name in os.listdir(folder):
                ours = name.startswith(tuple(f".{engine}-" for engine in ENGINES))
                if (ours and name not in current and not in_use(f"{folder}/{name}")) or name.endswith(".tmp"):
                    found.append(f"{folder}/{name}")
        finally:
            os.close(lock)
    if os.path.isdir(config.cache_dir()):
        lock = try_lock(f"{config.home()}/.prepare-lock")
        if lock is not None:
            found += _unused_stages()
            os.close(lock)
    return found


def _unused_stages(*, everything: bool = False) -> list[str]:
    """Results of build stages that no snapshot needs nor, without `everything`, a prepare of the same version would take.

    The caller holds the home's prepare lock.
    """
    paths = generations()
    used = set[str]().union(*(stages_of(path) for path in paths))
    versions = {os.path.basename(os.path.dirname(path)) for path in paths} | {config.DEFAULT_DEEPHAVEN}
    needed = {} if everything else build.needed_stages(versions)
    sizes = {_memory_of(path) for path in paths} | {config.DEFAULT_MEMORY_MIB}
    needed["server"] = {server.key(image, size) for image in needed.get("image", ()) for size in sizes}
    found = []
    for stage in STAGES:
        folder = f"{config.cache_dir()}/{stage}"
        # One that is linked to belongs to another home, whose snapshots are not known here.
        if not os.path.isdir(folder) or os.path.islink(folder) or os.path.islink(config.cache_dir()):
            continue
        for name in sorted(os.listdir(folder)):
            keep = f"{folder}/{name}" in used or name in needed.get(stage, ()) or name[0] == "."
            if not keep or name.startswith(build.TEMPORARY):
                found.append(f"{folder}/{name}")
    return found


def _subdirs(path: str) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(path) if entry.is_dir())
    except OSError:
        return []


def _clean_version(folder: str, result: Cleaned, *, snapshots: bool) -> None:
    lock = try_lock(f"{folder}/.prepare-lock")
    if lock is None:
        result.kept.append(f"{folder} (a prepare is at work)")
        return
    try:
        if snapshots:
            for engine in ENGINES:
                if os.path.islink(f"{folder}/{engine}"):
                    # The link goes first: whoever comes now is told that there is no snapshot, not that it is damaged.
                    path = f"{folder}/{os.readlink(f'{folder}/{engine}')}"
                    if in_use(path):
                        result.kept.append(path)
                        continue
                    os.unlink(f"{folder}/{engine}")
        swept = sweep(folder)
        result.removed.extend(swept.removed)
        result.kept.extend(path for path in swept.kept if path not in result.kept)
        if set(os.listdir(folder)) <= {".prepare-lock"}:
            remove_tree(folder)
    finally:
        os.close(lock)


def clean(*, version: str | None = None, everything: bool = False) -> Cleaned:
    """Remove the snapshots of `version`, or `leftovers` only, or with `everything` all snapshots, build caches, the probe's memory.

    Nothing that a VM uses or a prepare is making is removed. Raises `SnapshotMissing` for a version that is not there.
    """
    result = Cleaned([], [])
    root = config.snapshots_dir()
    if version is not None:
        if not os.path.isdir(f"{root}/{version}"):
            raise SnapshotMissing(f"there is no snapshot of {config.title(version)}", hint="`dhg vm status` lists them")
        _clean_version(f"{root}/{version}", result, snapshots=True)
        return result
    try:
        names = sorted(os.listdir(root))
    except OSError:
        names = []
    for name in names:
        _clean_version(f"{root}/{name}", result, snapshots=everything)
    _clean_run(f"{config.home()}/run", result)
    _clean_stages(result, everything=everything)
    return result


def _clean_run(folder: str, result: Cleaned) -> None:
    """Remove the socket directories that killed clients left (engine/firecracker.py); their names have the client's pid."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        words = name.split("-")
        if words[0] == "dhg" and len(words) == 3 and words[1].isdigit() and not os.path.exists(f"/proc/{words[1]}"):
            remove_tree(f"{folder}/{name}")
            result.removed.append(f"{folder}/{name}")


def _clean_stages(result: Cleaned, *, everything: bool) -> None:
    if not os.path.isdir(config.cache_dir()):
        return
    # A prepare holds this lock shared from its first stage to its end; a VM needs the root image that it booted from.
    lock = try_lock(f"{config.home()}/.prepare-lock")
    if lock is None:
        result.kept.append(f"{config.cache_dir()} (a prepare is at work)")
        return
    try:
        for path in _unused_stages(everything=everything):
            if not result.kept or os.path.basename(path).startswith(build.TEMPORARY):
                remove_tree(path)
                result.removed.append(path)
        # As the stages: what is linked to is another home's.
        if everything and not os.path.islink(config.cache_dir()) and os.path.exists(probe.memory()):
            os.unlink(probe.memory())
            result.removed.append(probe.memory())
    finally:
        os.close(lock)
