"""The bare snapshot: made, run, checked and removed by the public commands, in a home of its own that shares the build stages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from tests.conftest import Completed, Dhg, qemus_of, run_dhg, share_stages

import dhg as dhg_package
from dhg import config, machine, proc
from dhg.errors import SnapshotError
from dhg.share import start
from dhg.snapshot import build, rehearsal
from dhg.wire import client

BARE = ("exec", "--vm", "--version", "bare")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with a bare snapshot."""
    home = tmp_path_factory.mktemp("bare")
    share_stages(home)
    done = run_dhg("vm", "prepare", "--bare", env={"DHG_HOME": str(home)})
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"ready: a bare Python, ")
    yield home
    assert qemus_of(home) == []


@pytest.fixture
def at_home(home: Path, dhg: Dhg) -> Dhg:
    """The command line, with that home."""

    def run(*args: str, stdin: bytes = b"") -> Completed:
        return dhg(*args, stdin=stdin, env={"DHG_HOME": str(home)})

    return run


def test_it_is_made_once(at_home: Dhg) -> None:
    done = at_home("vm", "prepare", "--version", "bare")
    assert done.returncode == 0
    assert b"already there" in done.stderr


def test_it_runs_scripts(at_home: Dhg) -> None:
    code = "import sys; print(sys.argv[1], sys.stdin.read()); print('e', file=sys.stderr); sys.exit(7)"
    done = at_home(*BARE, "-c", code, "argument", stdin=b"input")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"argument input\n", b"e\n")


def test_it_has_no_deephaven(at_home: Dhg) -> None:
    done = at_home(*BARE, "-c", "import deephaven")
    assert done.returncode == 1
    assert b"ModuleNotFoundError: No module named 'deephaven'" in done.stderr


def test_it_is_not_taken_by_itself(at_home: Dhg) -> None:
    done = at_home("exec", "--vm", "-c", "pass")
    assert done.returncode == 4
    assert done.stderr == b"error: there is no snapshot of Deephaven yet\nhint: run `dhg vm prepare`\n"


def test_clones_differ(at_home: Dhg) -> None:
    done = at_home("vm", "verify", "--version", "bare", "--restores", "2", "--json")
    report = json.loads(done.stdout)
    assert report["ok"], report
    names = {check["name"] for check in report["checks"] if check["must"] == "differ"}
    assert {"os.urandom", "random.random", "uuid.uuid4", "machine-id"} <= names
    assert "Math.random" not in names


def test_what_it_was_made_under_is_shown_and_kept_to(at_home: Dhg) -> None:
    status = json.loads(at_home("vm", "status", "--json").stdout)
    (item,) = status["snapshots"]
    assert (item["version"], item["fits"], item["memory_mib"], item["vcpus"]) == ("bare", True, 256, 1)
    accel = item["accel"]
    assert accel == ("kvm" if status["host"]["kvm"]["usable"] else "tcg")
    report = json.loads(at_home(*BARE, "--accel", accel, "--json", "-c", "6 * 7").stdout)
    assert (report["acceleration"], report["result_repr"]) == (accel, "42")
    other = "tcg" if accel == "kvm" else "kvm"
    done = at_home(*BARE, "--accel", other, "-c", "pass")
    assert done.returncode == 2
    assert f"was made under {accel.upper()} and does not run under {other.upper()}" in done.stderr.decode()
    assert f"hint: run `dhg vm prepare --version bare --accel {other}`" in done.stderr.decode()


def test_kvm_that_does_not_work_says_why(at_home: Dhg, home: Path) -> None:
    host = json.loads(at_home("vm", "status", "--json").stdout)["host"]
    if host["kvm"]["usable"]:
        pytest.skip("KVM works here")
    (home / "cache" / "probe.json").unlink(missing_ok=True)
    reasons = []
    for _ in range(2):
        done = at_home("vm", "prepare", "--bare", "--accel", "kvm")
        assert done.returncode == 2
        *_, error, hint = done.stderr.decode().splitlines()
        assert error.startswith("error: KVM does not work here: ")
        assert hint.startswith("hint: leave --accel kvm out")
        reasons.append(error)
    # A device that opens was tried each time, and what came of it is remembered.
    assert reasons[0] == reasons[1]
    assert (home / "cache" / "probe.json").exists() == ("no stock kernel boots on it" in reasons[0])
    assert at_home(*BARE, "-c", "print(1)").stdout == b"1\n"


def test_without_shares_the_workspace_is_empty(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DHG_HOME", str(home))
    out: list[bytes] = []
    with machine.restore("bare") as vm:
        # The import looks for the module in the working directory first.
        request = client.Request(b"import colorsys, os; print(os.getcwd(), os.listdir())")
        vm.run(request, stdout=out.append, stderr=out.append, deadline=proc.Deadline(100))
    assert b"".join(out) == b"/workspace []\n"


def test_the_relay_over_the_kernels_own_vsock(at_home: Dhg) -> None:
    # What Firecracker's guests do, but for the device: under QEMU there is none, and the kernel connects with itself.
    module = next(Path(f"{config.cache_dir()}/base").glob("*/kernel/lib/modules/**/vsock_loopback.ko"))
    code = (
        "import subprocess, sys; sys.exit(subprocess.run(['/usr/bin/python3', 'over_vsock.py'], timeout=60).returncode)"
    )
    mounts = [f"{module.parent}:/mnt/modules", f"{Path(dhg_package.__file__).parents[1]}:/mnt/site"]
    with chdir(Path(__file__).parent):
        done = at_home(*BARE, "--mount", mounts[0], "--mount", mounts[1], "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"good\n", b"")


def test_clean_leaves_nothing(at_home: Dhg, home: Path) -> None:
    assert at_home("vm", "clean", "--version", "bare").returncode == 0
    assert os.listdir(home / "snapshots") == []
    assert at_home(*BARE, "-c", "pass").returncode == 4


@pytest.mark.parametrize(
    ("where", "name", "value", "said", "detail"),
    [
        (rehearsal, "BESIDE", {"dhg_rehearsal.csv": ""}, "a rehearsal ended with 1", "No module named 'dhg_rehearsal'"),
        (start, "CODE", "raise SystemExit('out of order')", "the server of the host's files ended", "out of order"),
    ],
)
def test_a_rehearsal_that_does_not_get_its_files(
    where: object, name: str, value: object, said: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_stages(tmp_path)
    monkeypatch.setenv("DHG_HOME", str(tmp_path))
    monkeypatch.setattr(where, name, value)
    with pytest.raises(SnapshotError, match=said) as error:
        build.prepare(version="bare", accel="tcg", progress=lambda *_: None)
    assert detail in (error.value.detail or "")
    assert not [found for found in os.listdir(tmp_path / "snapshots" / "bare") if "qemu" in found]
