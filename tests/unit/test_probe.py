"""The KVM probe's patience, on processes that stand in for a VM: what boots is waited for, what hangs is not."""

from __future__ import annotations

import pytest

from dhg.engine import probe


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
