"""The watchdog of `./dev test-kvm`, on processes that stand in for a machine that hangs, dies, or is too slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kvm.__main__ import FD_REPORT, Plan, watch

SAY = f"import json, os, sys, time\ndef say(**r): os.write({FD_REPORT}, json.dumps(r).encode() + b'\\n')\n"


def machine(tmp_path: Path, code: str) -> list[str]:
    script = tmp_path / "machine.py"
    script.write_text(f"{SAY}open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{code}")
    return ["/usr/bin/env", "python3", str(script)]


def gone(tmp_path: Path) -> bool:
    try:
        os.kill(int((tmp_path / "pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def plan(*, deadline_s: float = 60.0, silence_s: float = 60.0) -> Plan:
    return Plan(["qemu"], "bare", 256, deadline_s, silence_s=silence_s)


def test_a_machine_that_falls_silent_is_ended(tmp_path: Path) -> None:
    code = "say(kind='begin', name='a')\nsay(kind='end', name='a', ok=True, text='', s=1)\ntime.sleep(1000)"
    verdict = watch(machine(tmp_path, code), plan(silence_s=5.0))
    assert verdict.checks == [("a", True)]
    assert verdict.lost == "no sign of life for 5 s, at: a"
    assert not verdict.good
    assert gone(tmp_path)


def test_a_machine_that_beats_for_ever_is_ended(tmp_path: Path) -> None:
    verdict = watch(machine(tmp_path, "while True:\n    say(kind='beat')\n    time.sleep(0.05)"), plan(deadline_s=1.0))
    assert verdict.lost == "not done in 1 s, at: boot"
    assert gone(tmp_path)


def test_a_machine_that_dies_is_lost(tmp_path: Path) -> None:
    verdict = watch(machine(tmp_path, "say(kind='begin', name='b')"), plan())
    assert verdict.lost == "it ended early, at: b"


def test_a_check_that_fails_is_shown_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "say(kind='begin', name='c')\nsay(kind='end', name='c', ok=False, text='why', s=2)\nsay(kind='done')"
    verdict = watch(machine(tmp_path, code), plan())
    assert (verdict.checks, verdict.lost, verdict.good) == ([("c", False)], None, False)
    assert capsys.readouterr().out == "FAIL  c (2 s in L1)\n      why\n"
