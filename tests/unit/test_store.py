"""Which snapshot is taken, and which is refused before anything is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dhg import config, proc
from dhg.errors import SnapshotError, SnapshotMissing, UsageError
from dhg.snapshot import store
from dhg.wire import frames


def make(home: Path, version: str, *, accel: str, cpu: str | None = None) -> Path:
    """A generation that can be looked up but not restored."""
    folder = home / "snapshots" / version
    generation = folder / ".qemu-000000000000"
    generation.mkdir(parents=True)
    (generation / "lock").touch()
    data = store.launch_bytes(
        version=version,
        engine="qemu",
        accel=accel,
        memory_mib=256,
        argv=["/no/vmm"],
        checked=[str(generation / "lock")],
        own=[],
    )
    if cpu is not None:
        data = data.replace(frames.field(store.L_CPU, proc.cpu_model()), frames.field(store.L_CPU, cpu))
    (generation / "launch").write_bytes(data)
    os.symlink(generation.name, folder / "qemu")
    return generation


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DHG_HOME", str(tmp_path))
    return tmp_path


def opened(version: str | None = None, accel: str | None = None) -> str:
    snapshot = store.open_snapshot(version, accel=accel)
    os.close(snapshot.lock)
    return f"{snapshot.version} {snapshot.accel}"


def test_the_bare_snapshot_is_taken_only_where_it_is_asked_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(home, "bare", accel="tcg")
    with pytest.raises(SnapshotMissing, match="no snapshot of Deephaven yet"):
        opened()
    assert opened("bare") == "bare tcg"
    older = make(home, "42.7", accel="tcg")
    os.utime(older, ns=(1, 1))
    assert store.versions() == ["bare", "42.7"]
    assert opened() == "42.7 tcg"
    monkeypatch.setenv("DHG_VERSION", "bare")
    assert opened() == "bare tcg"


@pytest.mark.parametrize("version", ["bare", "0.36.1", "42.7"])
def test_versions(version: str) -> None:
    assert config.check_version(version) == version


@pytest.mark.parametrize("version", ["Bare", "bare2", "..", "", "42/7", "b"])
def test_no_versions(version: str) -> None:
    with pytest.raises(UsageError):
        config.check_version(version)


def test_a_snapshot_made_under_tcg_is_refused_under_kvm(home: Path) -> None:
    make(home, "42.7", accel="tcg")
    assert opened(accel="tcg") == "42.7 tcg"
    with pytest.raises(SnapshotError, match="made under TCG and does not run under KVM") as refused:
        opened(accel="kvm")
    assert refused.value.hint == "run `dhg vm prepare --version 42.7 --accel kvm`, or leave --accel out"


def test_the_next_step_is_for_the_engine_that_was_asked_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(home, "42.7", accel="tcg")
    assert store.choose() == ("42.7", "qemu")
    monkeypatch.setenv("DHG_ENGINE", "firecracker")
    assert store.choose() == ("42.7", "firecracker")
    with pytest.raises(SnapshotMissing) as refused:
        opened()
    assert refused.value.hint == "run `dhg vm prepare --version 42.7 --engine firecracker`"


def test_a_snapshot_made_under_kvm_needs_kvm(home: Path) -> None:
    make(home, "42.7", accel="kvm")
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert opened() == "42.7 kvm"
        with pytest.raises(SnapshotError, match="made under KVM and does not run under TCG") as refused:
            opened(accel="tcg")
        assert refused.value.hint == "run `dhg vm prepare --version 42.7 --accel tcg`, or leave --accel out"
    else:
        with pytest.raises(SnapshotError, match=r"made under KVM, and .*/dev/kvm") as refused:
            opened()
        assert refused.value.hint == "run `dhg vm prepare --version 42.7` to make one for this host"


def test_a_snapshot_made_under_kvm_needs_its_cpu(home: Path) -> None:
    make(home, "42.7", accel="kvm", cpu="Another CPU (7 flags)")
    reason = "not on this CPU: Another CPU" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm"
    with pytest.raises(SnapshotError, match=reason) as refused:
        opened()
    assert refused.value.hint == "run `dhg vm prepare --version 42.7` to make one for this host"


def test_the_cpu_has_a_name() -> None:
    model, _, flags = proc.cpu_model().rpartition(" (")
    assert model
    assert int(flags.split()[0]) > 10
