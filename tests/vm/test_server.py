"""The server that was started natively, as it goes on in a VM; and what happens where it cannot (image/server.py)."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import pytest
from tests.conftest import DHG, gone, run_dhg, share_stages

from dhg import config
from dhg.guest import native
from dhg.image import server
from dhg.snapshot import build, store


@pytest.fixture
def shared() -> None:
    """The snapshot that all tests share is one of these."""
    found = store.open_snapshot(engine="qemu")
    os.close(found.lock)
    if found.accel != "tcg":
        pytest.skip("the snapshot is a KVM one: there the server starts in the VM")
    with open(f"{found.path}/manifest.json") as file:
        inputs = json.load(file)["inputs"]
    if not inputs["server"]:
        image = f"{config.cache_dir()}/image/{inputs['image']}"
        pytest.skip(f"not here: {server.try_to_make(image, inputs['memory_mib'], os.devnull)[1]}")


def output(code: str) -> str:
    done = run_dhg("exec", "--vm", "--no-show-tables", "-c", code)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.usefixtures("shared")
def test_it_goes_on_with_the_kernels_clock() -> None:
    """The C library's functions that tell the time end in this kernel's vdso and not in system calls."""
    code = """
import ctypes, sys
sys.path.insert(0, "/run/dhg/lib")
from dhg.guest import vdso
real, end = vdso.find()
with open("/proc/self/maps") as file:
    own = [line.split()[0].split("-") for line in file if "r-xp" in line and line.endswith("/run/dhg/server/start\\n")]
for begin, after in own:
    begin, after = int(begin, 16), int(after, 16)
    image = ctypes.string_at(begin, after - begin)
    if image[:4] == bytes([0x7f]) + b"ELF" and after - begin < 65536:
        at = vdso.symbols(image)["__vdso_clock_gettime"]
        print(real <= int.from_bytes(image[at + 8 : at + 16], "little") < end)
"""
    assert output(code) == "True\n"


@pytest.mark.usefixtures("shared")
def test_its_clocks_were_not_put_back() -> None:
    """Its threads wait for moments of a clock that has run natively; the guest had just booted."""
    code = """
import ctypes, time
with open("/proc/self/timens_offsets") as file:
    offsets = {name: int(seconds) for name, seconds, _ in map(str.split, file)}
with open("/proc/uptime") as file:
    uptime = float(file.read().split()[0])
class Spec(ctypes.Structure):
    _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]
spec = Spec()
assert ctypes.CDLL(None).syscall(228, time.CLOCK_MONOTONIC, ctypes.byref(spec)) == 0
# By the C library's function in the vdso, and by the kernel itself.
print(min(offsets.values()) > 3, abs(time.monotonic() - spec.s) < 2, abs(time.monotonic() - uptime) < 2)
"""
    assert output(code) == "True True True\n"


@pytest.mark.usefixtures("shared")
def test_it_is_as_if_it_had_been_started_there() -> None:
    code = """
import json, os, resource, subprocess, threading
child = os.fork()
if not child:
    os._exit(7)
print(json.dumps({
    "environ": dict(os.environ),
    "fork": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]),
    "run": subprocess.run(["pwd"], capture_output=True, text=True).stdout,
    "files": len(set(resource.getrlimit(resource.RLIMIT_NOFILE))),
    "thread": threading.get_native_id() == os.getpid(),
    "left": [name for name in os.listdir("/tmp") if "." in name and not name.startswith(("snappy-", "jetty-"))],
    "more": bytearray(200 << 20)[-1],
}))
"""
    found = json.loads(output(code))
    assert found.pop("environ") == native.environ()
    assert found == {"left": [], "fork": 7, "run": "/workspace\n", "files": 1, "thread": True, "more": 0}


@pytest.mark.usefixtures("shared")
def test_its_libraries_use_what_the_emulated_cpu_has() -> None:
    """Each has chosen among variants natively, where the CPU may have more; one that has chosen wrongly ends the interpreter."""
    code = """
import base64, hashlib, hmac, json, ssl, zlib
import jpy, numpy, pandas, pyarrow
import pyarrow.compute as compute
data = bytes(range(256)) * 1000
found = [hashlib.new(name, data).hexdigest() for name in ("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b")]
found += [hmac.new(b"key", data, "sha256").hexdigest(), zlib.crc32(data)]
found += [len(ssl.RAND_bytes(99)), len(zlib.compress(data)) > 0]
digest = jpy.get_type("java.security.MessageDigest").getInstance
for name in "SHA-1", "SHA-256", "SHA-512":
    d = digest(name)
    for _ in range(3000):
        d.update(jpy.array("byte", 640))
    found.append(sum(d.digest()) != 0)
ones = numpy.ones((300, 300))
found += [float((ones @ ones)[7, 7]), float(numpy.sqrt(numpy.arange(10000.0)).sum() > 0)]
found += [int(numpy.sort(numpy.arange(9999)[::-1])[0])]
found += [numpy.linalg.svd(numpy.eye(30))[1].sum().item(), float(numpy.exp(numpy.zeros(999, "f4")).sum())]
array = pyarrow.array(range(100000))
found += [compute.sum(array).as_py(), compute.filter(array, compute.less(array, 5)).to_pylist()]
found.append(compute.count_distinct(array).as_py())
found.append(pandas.Series(range(1000)).rolling(10).mean().iloc[-1])
print(json.dumps(found))
"""
    found = json.loads(output(code))
    data = bytes(range(256)) * 1000
    assert found[:6] == [
        hashlib.new(name, data).hexdigest() for name in ("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b")
    ]
    assert found[6:10] == [hmac.new(b"key", data, "sha256").hexdigest(), zlib.crc32(data), 99, True]
    assert found[10:] == [True, True, True, 300.0, 1.0, 0, 30.0, 999.0, 4999950000, [0, 1, 2, 3, 4], 100000, 994.5]


def natives() -> list[int]:
    """The processes that a native start is made of."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if b"native.main" in file.read():
                        found.append(int(name))
            except OSError:
                continue
    return found


def test_it_ends_with_a_prepare_that_is_killed(tmp_path: Path) -> None:
    share_stages(tmp_path)
    env = {**os.environ, "DHG_HOME": str(tmp_path)}
    argv = (DHG, "vm", "prepare", "--accel", "tcg")
    with subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"started natively" in line:
                break
        until = time.monotonic() + 120
        while not (pids := natives()) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
    if not pids:
        pytest.skip(f"nothing is started natively here: {process.stdout.read().decode()}")
    assert all(gone(pid, 10) for pid in pids)
    done = run_dhg("vm", "clean", env={"DHG_HOME": str(tmp_path)})
    assert done.returncode == 0
    assert not [name for name in os.listdir(tmp_path / "cache" / "server") if name != ".lock"], done.stdout


def test_it_is_started_without_root() -> None:
    """As a user who is root in a namespace of users only, and whose PATH is a user's."""
    if os.geteuid():
        pytest.skip("not root: the snapshot that all tests share was made so")
    found = store.open_snapshot(engine="qemu")
    os.close(found.lock)
    with open(f"{found.path}/manifest.json") as file:
        inputs = json.load(file)["inputs"]
    image, memory_mib = f"{config.cache_dir()}/image/{inputs['image']}", inputs["memory_mib"]
    # The interpreter, this directory and the image may be root's own: they may be read, and nothing else is allowed.
    may = "+dac_override,+dac_read_search"
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={may}", f"--ambient-caps={may}"]
    # Not below pytest's own directory, which is root's.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as home:
        os.chown(home, 65534, 65534)
        log = Path(home) / "log"
        code = f"from dhg.image import server; print(server.make({image!r}, {memory_mib}, {str(log)!r}))"
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": home, "DHG_HOME": home}
        done = subprocess.run([*user, sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr + log.read_text()
        assert os.stat(done.stdout.rstrip("\n")).st_uid == 65534


@pytest.mark.timeout(600)
def test_where_it_does_not_go_on_it_starts_in_the_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes minutes: a start and a warm-up under emulation, which nothing else here does."""
    share_stages(tmp_path / "home")
    place = tmp_path / "other" / "server.erofs"
    tree = tmp_path / "tree"
    for name in ("tmp", "root"):
        (tree / name).mkdir(parents=True)
    (tree / "start").write_text("#!/bin/sh\nexit 121\n")
    (tree / "start").chmod(0o755)
    place.parent.mkdir()
    subprocess.run(["mkfs.erofs", "--quiet", str(place), str(tree)], check=True, timeout=60)
    monkeypatch.setenv("DHG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(server, "try_to_make", lambda *_: (str(place), ""))
    said: list[tuple[str, str]] = []
    path = build.prepare(version=None, accel="tcg", progress=lambda stage, text: said.append((stage, text)))
    why = [text for stage, text in said if stage == "server" and "did not go on" in text]
    assert len(why) == 1, said
    assert ("boot", "starting the server") in said
    with open(f"{path}/manifest.json") as file:
        assert json.load(file)["inputs"]["server"] == ""
    done = run_dhg(
        "exec", "--vm", "-c", "from deephaven import empty_table; print(empty_table(9).update('x = i').size)"
    )
    assert (done.returncode, done.stdout) == (0, b"9\n"), done.stderr
