"""Which results of build stages `clean` removes, and which it leaves."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from dhg import config
from dhg.image import build, server
from dhg.snapshot import inventory

OLD_VERSION = "0.36.1"
MEMORY_MIB = 1536


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a snapshot of an image that this dhg would not make, what it would make, and more of each stage."""
    monkeypatch.setenv("DHG_HOME", str(tmp_path))
    monkeypatch.delenv("DHG_VERSION", raising=False)
    base = tmp_path / "cache" / "base" / build._base_key()
    (base / "kernel" / "boot").mkdir(parents=True)
    (base / "kernel" / "boot" / "vmlinuz-6.1").touch()
    (base / "packages").write_text("python3=3.11\n")
    needed = [build._image_key(str(base), version) for version in (OLD_VERSION, config.DEFAULT_DEEPHAVEN)]
    for name in (*needed, "of-the-snapshot", "unused", ".tmp-broken"):
        folder = tmp_path / "cache" / "image" / name
        folder.mkdir(parents=True)
        (folder / "root.erofs").touch()
    for name in ("base/unused", "vmlinux/unused", f"vmlinux/{build._vmlinux_key(str(base))}"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    processes = [server.key(image, config.DEFAULT_MEMORY_MIB) for image in needed]
    for name in (*processes, server.key(needed[0], MEMORY_MIB), "of-the-snapshot", "unused"):
        (tmp_path / "cache" / "server" / name).mkdir(parents=True)
    (tmp_path / "cache" / "image" / ".lock").touch()
    generation(tmp_path, "of-the-snapshot")
    return tmp_path


def generation(home: Path, image: str) -> Path:
    path = home / "snapshots" / OLD_VERSION / f".qemu-{len(image):012x}"
    path.mkdir(parents=True)
    (path / "lock").touch()
    inputs = {"image": image, "server": image, "memory_mib": MEMORY_MIB}
    (path / "manifest.json").write_text(json.dumps({"inputs": inputs}))
    link = path.parent / "qemu"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    return path


def stages(home: Path) -> set[str]:
    return {
        f"{stage.name}/{path.name}"
        for stage in (home / "cache").iterdir()
        for path in stage.iterdir()
        if path.name != ".lock"
    }


UNUSED = {"base/unused", "image/unused", "image/.tmp-broken", "server/unused", "vmlinux/unused"}


def test_stages_that_no_snapshot_needs_are_leftovers(home: Path) -> None:
    before = stages(home)
    paths = {f"{home}/cache/{name}" for name in UNUSED}
    assert set(inventory.leftovers()) == paths
    assert stages(home) == before
    assert set(inventory.clean().removed) == paths
    assert stages(home) == before - UNUSED
    assert inventory.leftovers() == []


def test_a_version_alone_leaves_the_stages(home: Path) -> None:
    before = stages(home)
    inventory.clean(version=OLD_VERSION)
    assert not (home / "snapshots" / OLD_VERSION).exists()
    assert stages(home) == before
    assert "image/of-the-snapshot" in {path.removeprefix(f"{home}/cache/") for path in inventory.clean().removed}


def test_all_of_them(home: Path) -> None:
    inventory.clean(everything=True)
    assert stages(home) == set()


def test_a_vm_keeps_them_all(home: Path) -> None:
    # Of a snapshot that has been replaced since: what it boots from is known to nobody any more.
    lock = os.open(generation(home, "unused") / "lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    generation(home, "of-the-snapshot-too")
    before = stages(home)
    assert inventory.clean(everything=True).kept
    assert stages(home) == before - {"image/.tmp-broken"}
    os.close(lock)
    inventory.clean(everything=True)
    assert stages(home) == set()


def test_a_prepare_at_work_keeps_them_all(home: Path) -> None:
    lock = os.open(home / ".prepare-lock", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    before = stages(home)
    assert inventory.leftovers() == []
    assert inventory.clean().kept == [f"{home}/cache (a prepare is at work)"]
    assert stages(home) == before
    os.close(lock)


@pytest.mark.parametrize("place", ["cache", "cache/image"])
def test_another_homes_cache_is_left_alone(place: str, home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "place"
    (home / place).rename(other)
    (home / place).symlink_to(other)
    before = stages(home)
    removed = UNUSED - {name for name in before if place == "cache" or name.startswith("image/")}
    inventory.clean()
    assert stages(home) == before - removed
    inventory.clean(everything=True)
    assert stages(home) == {name for name in before if place == "cache" or name.startswith("image/")}


def test_a_damaged_base_system_is_needed_by_nobody(home: Path) -> None:
    (home / "cache" / "base" / build._base_key() / "packages").unlink()
    inventory.clean()
    assert stages(home) == {"image/of-the-snapshot", "server/of-the-snapshot"}
