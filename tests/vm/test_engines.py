"""What `exec`, `status`, `verify` and `clean` promise holds whatever the engine.

Firecracker needs a KVM on which a stock kernel boots, and its program; where they are not, its half is skipped, and
tests/firecracker has what can be shown against a stand-in.
"""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.conftest import DHG, Dhg, run_dhg

from dhg import config
from dhg.engine import firecracker, probe, qemu
from dhg.errors import DhgError

#: What the environment names before each test cleans it.
PROGRAM = os.environ.get("DHG_FIRECRACKER")


def why_not_firecracker() -> str | None:
    """Why there is no Firecracker to test with; None if there is."""
    try:
        firecracker.version_of(firecracker.path(PROGRAM))
        known = probe.known_kvm(probe.qemu_path())
    except DhgError as error:
        return str(error)
    if known is None:
        return "it is not known whether KVM works here: `dhg vm prepare` tries it"
    return None if known.usable else f"no usable KVM: {known.reason}"


@pytest.fixture(scope="module", params=["qemu", "firecracker"])
def engine(request: pytest.FixtureRequest) -> str:
    """An engine with a snapshot."""
    name: str = request.param
    if name == "firecracker":
        why = why_not_firecracker()
        if why is not None:
            pytest.skip(why)
        argv = [DHG, "vm", "prepare", "--engine", name, "--firecracker", firecracker.path(PROGRAM)]
        subprocess.run(argv, check=True, timeout=1200)
    return name


@pytest.fixture
def on(engine: str, monkeypatch: pytest.MonkeyPatch) -> Dhg:
    """The command line, with that engine."""
    monkeypatch.setenv("DHG_ENGINE", engine)
    return run_dhg


def test_output_stdin_and_exit_code(on: Dhg) -> None:
    source = "import sys; print(sys.stdin.read()); print('err', file=sys.stderr); sys.exit(5)"
    done = on("exec", "--vm", "-c", source, stdin=b"in")
    assert (done.returncode, done.stdout, done.stderr) == (5, b"in\n", b"err\n")


def test_a_table_and_what_ran_it(on: Dhg, engine: str) -> None:
    done = on("exec", "--vm", "--json", "-c", "from deephaven import empty_table; t = empty_table(3).update('x = i')")
    found = json.loads(done.stdout)
    assert found["engine"] == engine
    assert found["tables"][0]["name"] == "t"


def test_a_timeout_and_a_script_that_ends_its_interpreter(on: Dhg) -> None:
    assert on("exec", "--vm", "--timeout", "4", "-c", "import time; time.sleep(60)").returncode == 3
    done = on("exec", "--vm", "-c", "import os; os._exit(3)")
    assert done.returncode == 2
    assert b"exit status 3" in done.stderr


def test_several_at_once_differ_where_they_must(on: Dhg) -> None:
    source = "import random, time; print(random.random(), time.time())"
    with ThreadPoolExecutor(3) as workers:
        found = [done.stdout.split() for done in workers.map(lambda _: on("exec", "--vm", "-c", source), range(3))]
    assert len({number for number, _ in found}) == 3


def test_status_and_verify(on: Dhg, engine: str) -> None:
    found = json.loads(on("vm", "status", "--json").stdout)
    assert any(item["engine"] == engine and item["fits"] for item in found["snapshots"])
    done = on("vm", "verify", "--json", "--restores", "2")
    assert json.loads(done.stdout)["ok"], done.stdout


def test_a_snapshot_made_by_the_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `prepare` but the guest: with the real stages, kernel and initramfs; KVM is taken on trust."""
    from tests.firecracker.conftest import requests, stand_in

    from dhg.pager import uffd
    from dhg.snapshot import build, engines, inventory, trial

    why = uffd.available()
    if why is not None:
        pytest.skip(why)
    home = tmp_path / "home"
    home.mkdir()
    os.symlink(config.cache_dir(), home / "cache")
    monkeypatch.setenv("DHG_HOME", str(home))
    monkeypatch.setattr(engines, "require_kvm", lambda base, *, insist: "taken on trust")
    # There is no Deephaven in the stand-in's guest.
    monkeypatch.setattr(trial, "TYPICAL", b"print(6 * 7)")
    program = stand_in(tmp_path)
    monkeypatch.setenv("STANDIN_MEMORY", str(256 << 20))
    path = build.prepare(
        version=None, memory_mib=256, engine="firecracker", binary=program, progress=lambda stage, text: None
    )
    boot = next(line for line in requests(tmp_path) if line.startswith("PUT /boot-source"))
    with open(json.loads(boot.partition("/boot-source ")[2])["kernel_image_path"], "rb") as file:
        assert file.read(4) == b"\x7fELF"
    found = inventory.describe(path)
    assert (found["engine"], found["accel"], found["problem"]) == ("firecracker", "kvm", None)
    assert os.path.exists(f"{path}/{firecracker.WORKING_SET}")
    # The only snapshot there is: no engine has to be named.
    done = run_dhg("exec", "--vm", "-c", "print('hello')")
    assert (done.returncode, done.stdout) == (0, b"hello\n"), done.stderr
    assert run_dhg("vm", "clean", "--version", config.DEFAULT_DEEPHAVEN).returncode == 0
    assert not os.path.exists(path)


def test_the_extracted_kernel_boots(tmp_path: Path) -> None:
    """The vmlinux that Firecracker is given, booted by QEMU through the same kind of entry (PVH)."""
    from dhg.image import build as image

    base = image.base_system(str(tmp_path / "log"))
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(image.probe_initramfs(base, "vmlinux-is-up"))
    argv = [
        probe.qemu_path(),
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "microvm,rtc=on,acpi=on,isa-serial=on",
        "-accel",
        "tcg",
    ]
    argv += [
        "-cpu",
        "max,-la57",
        "-m",
        "256M",
        "-serial",
        "stdio",
        "-kernel",
        image.vmlinux(base),
        "-initrd",
        str(initramfs),
    ]
    argv += ["-append", f"{qemu.KERNEL_ARGS} tsc_early_khz={probe.tsc_khz()}"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=100, check=False)
    assert b"vmlinux-is-up" in done.stdout, done.stdout[-2000:] + done.stderr
