"""What runs inside the L1 guest: the public commands, under KVM. Stand-alone: standard library only.

Usage: l1-checks.py PORT ENGINE[,ENGINE...] VERSION. Reports to PORT, one JSON object a line: `beat` every few seconds, `begin` and
`end` of each check, `done`. The checks build on one another: the first that fails is the last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

#: A command that takes longer hangs. KVM under emulation is a hundred times slower than KVM.
COMMAND_S = 240.0
BEAT_S = 5.0
CLOCK_MS = 3000.0
#: Where the sockets of VMs are while they are needed.
RUN = "/root/.dhg/run"


class Port:
    """The channel to the host."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY)
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, kind: str, **more: object) -> None:
        """Send one report."""
        data = json.dumps({"kind": kind, "at": round(time.monotonic(), 1), **more}).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            self.say("beat")


class Failed(Exception):
    """A check found something else than it should."""


READING = """
import hashlib, os, sys
import helper
print(os.getcwd(), sys.path[0], __file__, sorted(os.listdir()))
print(helper.X, open('a.txt').read(), hashlib.sha256(open('big', 'rb').read()).hexdigest())
print(open('/mnt/more/b.txt').read())
for path in ('new', '/mnt/more/new'):
    try:
        open(path, 'w')
    except OSError as error:
        print(error.strerror)
"""

WRITING = """
import os
with open('new', 'wb') as file:
    file.write(b'12345678' * 100_000)
os.rename('new', 'done')
os.unlink('a.txt')
with open('/mnt/more/c.txt', 'w') as file:
    file.write('from the VM')
"""

#: What `--output` takes for a table where there is no Deephaven.
TABLE = """
import sys, types

class Table:
    is_refreshing = False

def write_csv(table, path):
    with open(path, 'w') as file:
        file.write('x\\n1\\n')

deephaven, table = types.ModuleType('deephaven'), types.ModuleType('deephaven.table')
deephaven.write_csv, table.Table = write_csv, Table
sys.modules.update({'deephaven': deephaven, 'deephaven.table': table})
t = Table()
"""


def put(path: str, data: bytes) -> None:
    """Make a file."""
    with open(path, "wb") as file:
        file.write(data)


def got(path: str) -> bytes:
    """What is in a file."""
    with open(path, "rb") as file:
        return file.read()


class Done:
    """How a command ended."""

    def __init__(self, argv: list[str], code: int, out: str, err: str) -> None:
        self.argv, self.code, self.out, self.err = argv, code, out, err

    def must(self, code: int, out: str | None = None, *, err: str | None = None) -> Done:
        """It ended with `code`, printed `out`, and something on stderr that matches `err`. Raises `Failed`."""
        if self.code == code and (out is None or self.out == out) and (err is None or re.search(err, self.err, re.S)):
            return self
        raise Failed(
            f"{' '.join(self.argv)}\nexit code {self.code} (must be {code})\nstdout {self.out[-1500:]!r}"
            f" (must be {out!r})\nstderr (must match {err!r}):\n{self.err[-3000:]}"
        )


def dhg(
    *args: str,
    stdin: bytes = b"",
    env: dict[str, str] | None = None,
    timeout_s: float = COMMAND_S,
    cwd: str | None = None,
) -> Done:
    """Run the command as a user does; `env` is added to the environment."""
    argv = ["dhg", *args]
    environ = {**os.environ, **(env or {})}
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, env=environ, timeout=timeout_s, cwd=cwd, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{' '.join(argv)}: no end after {timeout_s:g} s; {late.stdout!r} {late.stderr!r}") from None
    return Done(argv, done.returncode, done.stdout.decode(), done.stderr.decode())


def running(*kinds: str) -> dict[int, str]:
    """The processes of these kinds, by pid; all kinds by default."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    argv = file.read().decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            # A zombie's is empty.
            kind = os.path.basename(argv[0]).partition("-system")[0]
            for ours, module in (("pager", "dhg.pager"), ("files", "dhg.share")):
                kind = ours if any(module in arg for arg in argv) else kind
            if kind in (kinds or ("qemu", "firecracker", "pager", "files")):
                found[int(name)] = kind
    return found


def none_left(within_s: float = 20.0) -> None:
    """No VMM, pager, server of files or socket is left after at most `within_s` seconds. Raises `Failed`."""
    until = time.monotonic() + within_s
    while left := [*running().items(), *(os.listdir(RUN) if os.path.isdir(RUN) else [])]:
        if time.monotonic() > until:
            raise Failed(f"left: {left}")
        time.sleep(0.2)


class Script:
    """A script that has looked at a file, says `up` and then sleeps, and the client that runs it."""

    def __init__(self, *in_vm: str) -> None:
        code = "import os, time; os.listdir(); print('up', flush=True); time.sleep(3600)"
        argv = ["dhg", "exec", *in_vm, "-c", code]
        self.client = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __enter__(self) -> Script:
        assert self.client.stdout is not None
        line = self.client.stdout.readline()
        if line != b"up\n":
            raise Failed(f"the script said {line!r}: {self.client.communicate()}")
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.kill()
        self.client.communicate()

    def end(self) -> Done:
        """What the client ends with, after what was done to it."""
        out, err = self.client.communicate(timeout=COMMAND_S)
        return Done(["dhg", "exec"], self.client.returncode, out.decode(), err.decode())


class Checks:
    """The checks of one engine and one version, in order."""

    def __init__(self, engine: str, version: str) -> None:
        self.version = version
        self.bare = version == "bare"
        # The engine is only named where it is not the default.
        self.engine = [] if engine == "qemu" else ["--engine", engine]
        self.name = engine
        self.in_vm = ["--vm", *self.engine, "--version", version]

    def all(self) -> list[Callable[[], object]]:
        """The checks."""
        return [
            self.prepare,
            self.kvm_is_usable,
            self.five_runs,
            self.streams,
            self.files_are_read,
            self.files_are_written,
            self.outputs,
            self.clones_differ,
            *([self.memory_modes, self.without_override, self.pager_dies] if self.name == "firecracker" else []),
            self.interrupt,
            self.interpreter_dies,
            self.kill_9_leaves_nothing,
            self.refused_under_tcg,
            self.refused_without_the_device,
            self.clean,
        ]

    def prepare(self) -> str:
        """The snapshot is made, under KVM."""
        # One CPU is all that L1 has.
        args = ["--version", self.version, "--accel", "kvm", "--vcpus", "1", *self.engine]
        done = dhg("vm", "prepare", *args, timeout_s=900.0 if self.bare else 3000.0).must(0)
        if "kvm" not in done.out:
            raise Failed(f"prepare says {done.out!r}")
        return done.err + done.out

    def kvm_is_usable(self) -> str:
        """doctor and status say that KVM works here, and that the snapshot fits."""
        found = json.loads(dhg("doctor", "--json").out)["findings"]
        kvm = next(item for item in found if item["name"] == "kvm")
        status: dict[str, Any] = json.loads(dhg("vm", "status", "--json").must(0).out)
        mine = [item for item in status["snapshots"] if (item["version"], item["engine"]) == (self.version, self.name)]
        if kvm["level"] != "ok" or not status["host"]["kvm"]["usable"] or len(mine) != 1:
            raise Failed(json.dumps([kvm, status], indent=1))
        if mine[0]["accel"] != "kvm" or not mine[0]["fits"]:
            raise Failed(json.dumps(mine))
        return str(kvm["text"])

    def five_runs(self) -> str:
        """Five restores, each with an answer and an exit code of its own."""
        times = []
        for number in range(5):
            began = time.monotonic()
            code = f"import colorsys, sys; print({number} * 7); sys.exit({number})"
            dhg("exec", *self.in_vm, "-c", code).must(number, f"{number * 7}\n")
            times.append(f"{time.monotonic() - began:.1f} s")
        none_left()
        return ", ".join(times)

    def streams(self) -> None:
        """Bytes go in and come out as they are, stderr on its own."""
        code = (
            "import sys; data = sys.stdin.buffer.read(); sys.stdout.buffer.write(data[::-1]); sys.stderr.write('e\\n')"
        )
        data = bytes(range(128)) * 1000
        dhg("exec", *self.in_vm, "-c", code, stdin=data).must(0, data[::-1].decode(), err=r"^e\n$")

    def files_are_read(self) -> None:
        """A script finds what is beside it and in another directory that is shared, and may not write there."""
        with tempfile.TemporaryDirectory() as top:
            work, more, big = f"{top}/work", f"{top}/more", os.urandom(20_000_001)
            os.mkdir(work)
            os.mkdir(more)
            put(f"{work}/report.py", READING.encode())
            put(f"{work}/helper.py", b"X = 42")
            put(f"{work}/a.txt", b"in a")
            put(f"{work}/big", big)
            put(f"{more}/b.txt", b"in b")
            names = ["a.txt", "big", "helper.py", "report.py"]
            expected = (
                f"/workspace /workspace /workspace/report.py {names}\n42 in a {hashlib.sha256(big).hexdigest()}\n"
            )
            expected += "in b\n" + "Read-only file system\n" * 2
            done = dhg("exec", *self.in_vm, "--mount", f"{more}:/mnt/more", "report.py", cwd=work)
            done.must(0, expected, err=r"^hint: the script tried to write to files of this host")
            if sorted(os.listdir(work)) != names or os.listdir(more) != ["b.txt"]:
                raise Failed(f"{os.listdir(work)} {os.listdir(more)}")
            code = "import os; print(os.getcwd(), os.listdir())"
            dhg("exec", *self.in_vm, "--no-workspace", "-c", code, cwd=work).must(0, "/workspace []\n")
        none_left()

    def files_are_written(self) -> None:
        """With --rw, and :rw for a mount, what a script does to files is done."""
        with tempfile.TemporaryDirectory() as top:
            work, more = f"{top}/work", f"{top}/more"
            os.mkdir(work)
            os.mkdir(more)
            put(f"{work}/a.txt", b"in a")
            dhg("exec", *self.in_vm, "--rw", "--mount", f"{more}:/mnt/more:rw", "-c", WRITING, cwd=work).must(0, "")
            if os.listdir(work) != ["done"] or got(f"{work}/done") != b"12345678" * 100_000:
                raise Failed(str(os.listdir(work)))
            if os.listdir(more) != ["c.txt"] or got(f"{more}/c.txt") != b"from the VM":
                raise Failed(str(os.listdir(more)))
        none_left()

    def outputs(self) -> None:
        """A table becomes a file when the script has succeeded, and only then."""
        code = "from deephaven import empty_table; t = empty_table(1).update('x = 1')\n" if not self.bare else TABLE
        with tempfile.TemporaryDirectory() as top:
            put(f"{top}/t.csv", b"old")
            command = ["exec", *self.in_vm, "--no-show-tables", "--output", f"t={top}/t.csv", "-c"]
            dhg(*command, code + "raise SystemExit(3)").must(3, "", err="no output was written")
            if os.listdir(top) != ["t.csv"] or got(f"{top}/t.csv") != b"old":
                raise Failed(f"{os.listdir(top)} {got(f'{top}/t.csv')!r}")
            dhg(*command, code).must(0, "")
            if os.listdir(top) != ["t.csv"] or got(f"{top}/t.csv").split() != [b"x", b"1"]:
                raise Failed(f"{os.listdir(top)} {got(f'{top}/t.csv')!r}")

    def memory_modes(self) -> str:
        """The guest's memory from the pager, lazily, all at first, or in a mapping of the file."""
        found = []
        for env in ({"DHG_VM_MEMORY": "lazy"}, {"DHG_VM_EAGER_UFFD": "1"}, {"DHG_VM_MEMORY": "file"}):
            began = time.monotonic()
            dhg("exec", *self.in_vm, "-c", "print(sum(range(1000)))", env=env).must(0, "499500\n")
            found.append(f"{env}: {time.monotonic() - began:.1f} s")
        return "\n".join(found)

    def without_override(self) -> None:
        """As a Firecracker before 1.16 is restored, which cannot be told another path of the vsock device's socket."""
        code = "import sys; from dhg.engine import firecracker; firecracker.VSOCK_OVERRIDE = (99, 0);"
        code += "from dhg.cli import main; sys.exit(main(sys.argv[1:]))"
        argv = ["python3", "-c", code, "exec", *self.in_vm, "-c", "print(6 * 7)"]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S, check=False)
        Done(argv, done.returncode, done.stdout.decode(), done.stderr.decode()).must(0, "42\n")
        none_left()

    def pager_dies(self) -> str:
        """A VM whose pager is gone does not hang: it is ended, and the client says so."""
        with Script(*self.in_vm) as script:
            pagers = running("pager")
            if len(pagers) != 1:
                raise Failed(f"running: {running()}")
            os.kill(next(iter(pagers)), signal.SIGKILL)
            done = script.end().must(2, "", err=r"error: the VM ended while the script ran")
        none_left()
        return done.err

    def interrupt(self) -> None:
        """Ctrl+C ends the script as it would end it anywhere."""
        with Script(*self.in_vm) as script:
            script.client.send_signal(signal.SIGINT)
            script.end().must(130, "", err=r"Traceback.*time\.sleep.*KeyboardInterrupt")
        none_left()

    def interpreter_dies(self) -> None:
        """A script that takes its interpreter down is told apart from one that ends."""
        code = "import os; print('last', flush=True); os.kill(os.getpid(), 9)"
        dhg("exec", *self.in_vm, "-c", code).must(2, "last\n", err=r"ended its interpreter \(killed by signal 9\)")
        none_left()

    def clones_differ(self) -> str:
        """`dhg vm verify`: two clones differ where they must, agree where they must.

        Only their clocks may be off by more than verify allows: two clones on one emulated CPU answer each other's way late.
        """
        done = dhg("vm", "verify", *self.engine, "--version", self.version, "--restores", "2", "--json")
        if not done.out:
            done.must(0)
        checks = json.loads(done.out)["checks"]
        clocks = [check for check in checks if check["name"].endswith("against the host")]
        wrong = [check for check in checks if not check["ok"] and check not in clocks]
        wrong += [check for check in clocks if any(abs(float(off.split()[0])) > CLOCK_MS for off in check["values"])]
        if wrong or not clocks or not any(check["must"] == "differ" for check in checks):
            raise Failed(json.dumps(wrong or checks, indent=1) + done.err)
        return "\n".join(f"{check['name']}: must {check['must']}: {', '.join(check['values'])}" for check in checks)

    def kill_9_leaves_nothing(self) -> None:
        """A client that is killed takes its VM along and leaves nothing for doctor to find."""
        with Script(*self.in_vm) as script:
            alive = running(self.name, "files")
            script.client.kill()
        if sorted(alive.values()) != sorted((self.name, "files")):
            raise Failed(f"running: {alive}")
        none_left()
        left = [item for item in json.loads(dhg("doctor", "--json").out)["findings"] if item["name"] == "leftovers"]
        if [item["text"] for item in left] != ["none"]:
            raise Failed(json.dumps(left))

    def refused_under_tcg(self) -> str:
        """What was made under KVM does not run under TCG, and the error names the command that mends it."""
        done = dhg("exec", *self.in_vm, "--accel", "tcg", "-c", "pass")
        return done.must(2, "", err=r"made under KVM.*hint: .*dhg vm prepare.*--accel tcg").err

    def refused_without_the_device(self) -> str:
        """Where /dev/kvm is gone the same holds."""
        os.rename("/dev/kvm", "/dev/kvm-away")
        try:
            done = dhg("exec", *self.in_vm, "-c", "pass")
        finally:
            os.rename("/dev/kvm-away", "/dev/kvm")
        return done.must(2, "", err=r"/dev/kvm.*hint: .*dhg vm prepare").err

    def clean(self) -> None:
        """Nothing of the snapshot is left."""
        dhg("vm", "clean", "--version", self.version).must(0)
        dhg("exec", *self.in_vm, "-c", "pass").must(4, "")
        if os.path.exists(f"/root/.dhg/snapshots/{self.version}"):
            raise Failed(str(os.listdir(f"/root/.dhg/snapshots/{self.version}")))


def main() -> None:
    """Run the checks."""
    port = Port(sys.argv[1])
    engines, version = sys.argv[2].split(","), sys.argv[3]
    os.makedirs("/root/.dhg/cache", mode=0o700)
    for stage in ("base", "image", "vmlinux"):
        os.symlink(f"/cache/{stage}", f"/root/.dhg/cache/{stage}")
    with open("/proc/cpuinfo") as file:
        cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    port.say(
        "up",
        text=f"Linux {os.uname().release}, {cpu}, /dev/kvm {'is' if os.path.exists('/dev/kvm') else 'is not'} there",
    )
    good = True
    for engine in engines:
        for check in Checks(engine, version).all():
            name = f"{engine}: {check.__name__.replace('_', ' ')}"
            port.say("begin", name=name)
            began = time.monotonic()
            try:
                text, good = str(check() or ""), True
            except Exception as error:
                text, good = str(error) if isinstance(error, Failed) else repr(error), False
            port.say("end", name=name, ok=good, text=text, s=round(time.monotonic() - began, 1))
            if not good:
                break
    port.say("done")


if __name__ == "__main__":
    main()
