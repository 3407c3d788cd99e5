"""The KVM probe's patience and memory, on processes that stand in for a VM: what boots is waited for, what hangs is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dhg.engine import probe
from dhg.errors import HostError
from dhg.snapshot import engines, inventory
from dhg.snapshot.build import pick_acceleration


def console(script: str) -> tuple[str, str]:
    return probe._console(["/bin/sh", "-c", script])


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_FIRST_WORD_S", 3.0)
    monkeypatch.setattr(probe, "PROBE_SILENCE_S", 6.0)
    monkeypatch.setattr(probe, "PROBE_TIMEOUT_S", 30.0)


def test_what_ends_by_itself_is_read_to_its_end() -> None:
    assert console("echo one; echo two >&2") == ("one\ntwo\n", "")


def test_who_pauses_is_waited_for() -> None:
    # Longer than the wait for the first word, shorter than that for any other.
    assert console("echo booting; sleep 4; echo up") == ("booting\nup\n", "")


def test_who_says_nothing_is_ended() -> None:
    assert console("exec sleep 1000") == ("", "silent for 3 s, last: ")


def test_who_falls_silent_is_ended() -> None:
    assert console("echo booting; exec sleep 1000") == ("booting\n", "silent for 6 s, last: ")


def test_who_talks_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_TIMEOUT_S", 2.0)
    text, late = console("while :; do echo more; sleep 0.1; done")
    assert text.startswith("more\n")
    assert late == "not done in 2 s, last: "


class Host:
    """A host with a /dev/kvm that opens, and a QEMU that says what `boot` has and counts how often it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._says, self._tries, self.qemu = folder / "says", folder / "tries", folder / "qemu"
        self.qemu.write_text(
            f"#!/bin/sh\n[ $1 = --version ] && exec echo QEMU emulator version 1\necho >> {self._tries}\ncat {self._says}\n"
        )
        self.qemu.chmod(0o755)
        self._tries.touch()
        self.base = folder / "base"
        (self.base / "kernel" / "boot").mkdir(parents=True)
        for name in ("kernel/boot/vmlinuz-6.1", "busybox"):
            (self.base / name).touch()
        monkeypatch.setenv("DHG_QEMU", str(self.qemu))
        monkeypatch.setenv("DHG_HOME", str(folder / "home"))
        monkeypatch.setattr(probe, "kvm_device", lambda: None)
        self.boots(False)

    def boots(self, well: bool) -> None:
        self._says.write_text(probe.PROBE_TOKEN if well else "KVM: entry failed")

    def tries(self) -> int:
        return len(self._tries.read_text())

    def pick(self, asked: str) -> str:
        return pick_acceleration(asked, str(self.base))[0]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_an_answer_is_remembered(host: Host) -> None:
    for _ in range(2):
        assert host.pick("auto") == "tcg"
        assert host.tries() == 1
    # Whoever asks for it has it tried again, as long as it does not work.
    for tries in (2, 3):
        with pytest.raises(HostError, match="KVM does not work here: no stock kernel boots on it: KVM: entry failed"):
            host.pick("kvm")
        assert host.tries() == tries
    host.boots(True)
    assert host.pick("auto") == "tcg"
    assert host.tries() == 3
    for asked in ("kvm", "kvm", "auto"):
        assert host.pick(asked) == "kvm"
        assert host.tries() == 4


def test_firecracker_has_it_tried_again_if_asked_to(host: Host) -> None:
    with pytest.raises(HostError) as caught:
        engines.require_kvm(str(host.base))
    assert caught.value.hint == "leave --engine out: QEMU runs everywhere; --accel kvm tries KVM again"
    with pytest.raises(HostError) as caught:
        engines.require_kvm(str(host.base), insist=True)
    assert caught.value.hint == "leave --engine out: QEMU runs everywhere"
    host.boots(True)
    with pytest.raises(HostError):
        engines.require_kvm(str(host.base))
    for insist in (True, False):
        assert engines.require_kvm(str(host.base), insist=insist) == "a stock kernel boots on it"
    assert host.tries() == 3


def test_clean_forgets_it_with_everything_else(host: Host, tmp_path: Path) -> None:
    host.pick("auto")
    memory = tmp_path / "home" / "cache" / "probe.json"
    assert list(json.loads(memory.read_text()).values()) == [[False, "no stock kernel boots on it: KVM: entry failed"]]
    assert inventory.clean().removed == []
    assert memory.exists()
    assert inventory.clean(everything=True).removed == [str(memory)]
    assert not memory.exists()
    host.boots(True)
    assert host.pick("auto") == "kvm"


def test_another_homes_memory_is_left_alone(host: Host, tmp_path: Path) -> None:
    host.pick("auto")
    (tmp_path / "home" / "cache").rename(tmp_path / "other")
    (tmp_path / "home" / "cache").symlink_to(tmp_path / "other")
    inventory.clean(everything=True)
    assert (tmp_path / "other" / "probe.json").exists()
