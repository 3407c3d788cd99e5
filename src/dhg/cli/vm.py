"""`dhg vm`: prepare, status, clean. Not on the hot path."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from .. import config
from ..errors import UsageError
from .options import Option, Values, help_text, parse, positive_integer

HELP = """\
usage: dhg vm prepare | status | verify | clean [options]

  prepare   build kernel, root file system and Deephaven, boot them, warm up, freeze
  status    what this host can do, and the snapshots it has
  verify    restore clones: clocks, random numbers, results, checksums
  clean     remove snapshots, and with --all everything that prepare made

`dhg vm VERB --help` says more.
"""

_HELP = Option("-h, --help", None, "show this help")
_DEBUG = Option("--debug", None, "show Python tracebacks of dhg's own errors")

PREPARE = [
    Option("--version", "V", f"Deephaven version, or latest (default {config.DEFAULT_DEEPHAVEN})"),
    Option("--bare", None, "a plain Python without Deephaven: quick to make, to try a host with (--version bare)"),
    Option(
        "--memory",
        "SIZE",
        f"the VM's memory (default {config.DEFAULT_MEMORY_MIB >> 10}G; bare: {config.DEFAULT_BARE_MEMORY_MIB}M)",
    ),
    Option("--vcpus", "N", "the VM's virtual CPUs (default: 2 with KVM, 1 without; bare: 1)"),
    Option("--accel", "auto|kvm|tcg", "auto takes KVM where it boots a stock kernel (default); kvm tries that again"),
    Option("--engine", "qemu|firecracker", "the VMM (default qemu; firecracker needs KVM)"),
    Option("--firecracker", "PATH", "its program (default: DHG_FIRECRACKER, or firecracker on the PATH)"),
    Option("--force", None, "make the snapshot anew even if it is there"),
    _DEBUG,
    _HELP,
]

STATUS = [Option("--json", None, "one JSON object"), _DEBUG, _HELP]

VERIFY = [
    Option("--version", "V", "which snapshot (default: DHG_VERSION, or the newest)"),
    Option("--engine", "qemu|firecracker", "which VMM's snapshot (default: DHG_ENGINE, or whichever there is)"),
    Option("--restores", "N", "how many restores in a row (default 20)"),
    Option("--at-once", "N", "how many at the same time (default 2)"),
    Option("--json", None, "one JSON object"),
    _DEBUG,
    _HELP,
]

CLEAN = [
    # An empty one is no version like any other.
    Option("--version", "V", "the snapshots of this version only", empty=True),
    Option("--all", None, "every snapshot, the caches of the build stages, and what is known of KVM here"),
    _DEBUG,
    _HELP,
]


def main(argv: list[str]) -> int:
    """Run `dhg vm VERB`; the exit code. Raises `DhgError`."""
    verbs = {"prepare": prepare, "status": status, "verify": verify, "clean": clean}
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0 if argv else 2
    if argv[0] not in verbs:
        raise UsageError(f"no such command: vm {argv[0]}", hint="`dhg vm --help` lists them")
    return verbs[argv[0]](argv[1:])


def unwind_on_signals() -> None:
    """Have SIGTERM and SIGHUP unwind as Ctrl+C does, to the context managers that end what was started: it has process groups of its
    own, so nobody else ends it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup the one is to be ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _ended)


def _ended(number: int, _: object) -> None:
    # Whatever comes next must not cut that short.
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _parse(argv: list[str], options: list[Option], verb: str, more: str) -> Values | None:
    values = parse(argv, options, verb=f"vm {verb}")
    if values.flag("help"):
        sys.stdout.write(help_text(f"usage: dhg vm {verb} [options]", options, more))
        return None
    if values.rest:
        raise UsageError(f"unexpected argument: {values.rest[0]}", hint=f"see `dhg vm {verb} --help`")
    return values


class Display:
    """Progress by stage: on a terminal one live line a stage with its elapsed time, otherwise plain lines on stderr."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._stage = ""
        self._text = ""
        self._began = self._since = time.monotonic()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if self._live:
            self._thread = threading.Thread(target=self._tick, daemon=True)
            self._thread.start()

    def __call__(self, stage: str, text: str) -> None:
        """A stage begins, or says more about itself."""
        with self._lock:
            if stage != self._stage:
                self._finish()
                self._stage, self._since = stage, time.monotonic()
            self._text = text
            if self._live:
                self._draw()
            else:
                print(
                    f"{time.monotonic() - self._began:7.1f} s  {stage}{': ' + text if text else ''}",
                    file=self._stream,
                    flush=True,
                )

    def close(self) -> None:
        """End the display; the last stage keeps its line."""
        self._done.set()
        if self._thread:
            self._thread.join()
        with self._lock:
            self._finish()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def _finish(self) -> None:
        if self._live and self._stage:
            self._draw()
            self._stream.write("\n")
            self._stream.flush()
            self._stage = ""

    def _draw(self) -> None:
        width = 100
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            pass
        line = f"{time.monotonic() - self._since:7.1f} s  {self._stage}{': ' + self._text if self._text else ''}"
        self._stream.write(f"\r\x1b[K{line[: width - 1]}")
        self._stream.flush()

    def _tick(self) -> None:
        while not self._done.wait(0.2):
            with self._lock:
                if self._stage:
                    self._draw()


def prepare(argv: list[str]) -> int:
    """`dhg vm prepare`."""
    more = "A second prepare with the same inputs is done at once. The first one takes five to ten minutes without KVM."
    values = _parse(argv, PREPARE, "prepare", more)
    if values is None:
        return 0
    version = values.text("version")
    if values.flag("bare"):
        if version not in (None, config.BARE):
            raise UsageError("--bare and --version exclude each other")
        version = config.BARE
    memory = values.text("memory")
    vcpus = values.text("vcpus")
    accel = values.text("accel") or "auto"
    if accel not in ("auto", "kvm", "tcg"):
        raise UsageError(f"--accel takes auto, kvm or tcg, not {accel!r}")
    engine = config.check_engine(values.text("engine") or ("firecracker" if values.text("firecracker") else "qemu"))
    if engine == "qemu" and values.text("firecracker"):
        raise UsageError("--firecracker needs --engine firecracker")
    if engine == "firecracker" and accel == "tcg":
        raise UsageError("Firecracker has no software emulation: leave --accel tcg out")
    unwind_on_signals()
    from ..snapshot import build

    display = Display()
    try:
        path = build.prepare(
            version=version,
            memory_mib=config.parse_size_mib(memory) if memory else None,
            vcpus=positive_integer("--vcpus", vcpus) if vcpus else None,
            accel=accel,
            engine=engine,
            binary=values.text("firecracker"),
            force=values.flag("force"),
            progress=display,
        )
    finally:
        display.close()
    from ..snapshot import inventory

    found = inventory.describe(path)
    size = _mib(found["disk_bytes"])
    print(f"ready: {config.title(found['version'])}, {found['accel']}, {size} on disk, {display.elapsed_s:.1f} s")
    return 0


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def status(argv: list[str]) -> int:
    """`dhg vm status`."""
    values = _parse(argv, STATUS, "status", "Exit code 0, also when there is no snapshot.")
    if values is None:
        return 0
    from ..snapshot import inventory

    found = inventory.survey()
    if values.flag("json"):
        print(json.dumps(found, indent=2))
        return 0
    host = found["host"]
    kvm = host["kvm"]
    print(f"home   {found['home']}")
    print(f"qemu   {host['qemu']['version'] or 'not usable: ' + host['qemu']['problem']}")
    usable = {True: "usable", False: "not usable", None: "not tried yet"}[kvm["usable"]]
    print(f"kvm    {usable}: {kvm['reason']}")
    if not found["snapshots"]:
        print("\nno snapshots; `dhg vm prepare` makes one")
        return 0
    rows = [("VERSION", "ENGINE", "ACCEL", "DISK", "AGE", "STATE")]
    for item in found["snapshots"]:
        rows.append(
            (
                item["version"],
                item["engine"],
                item["accel"] or "?",
                _mib(item["disk_bytes"]),
                _age(item["age_s"]),
                ("ok" if item["fits"] else item["problem"]) + (", in use" if item["in_use"] else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def verify(argv: list[str]) -> int:
    """`dhg vm verify`."""
    values = _parse(
        argv, VERIFY, "verify", "Exit code 1 if anything is off. Takes about half a minute under emulation."
    )
    if values is None:
        return 0
    restores, together = values.text("restores"), values.text("at_once")
    engine = values.text("engine")
    unwind_on_signals()
    from .. import verify as verifier

    checks = verifier.verify(
        values.text("version"),
        engine=config.check_engine(engine) if engine else None,
        restores=positive_integer("--restores", restores) if restores else 20,
        together=positive_integer("--at-once", together) if together else 2,
    )
    good = all(check.ok for check in checks)
    if values.flag("json"):
        print(json.dumps({"ok": good, "checks": [check._asdict() for check in checks]}, indent=2))
        return 0 if good else 1
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok ' if check.ok else 'BAD'}  {check.name:<{width}}  must {check.must}: {', '.join(check.values)}")
    print("all good" if good else "something is off")
    return 0 if good else 1


def clean(argv: list[str]) -> int:
    """`dhg vm clean`."""
    more = "Without options: what interrupted commands left, and what no snapshot needs any more. Nothing in use is removed."
    values = _parse(argv, CLEAN, "clean", more)
    if values is None:
        return 0
    version = values.text("version")
    if version is not None and values.flag("all"):
        raise UsageError("--version and --all exclude each other")
    unwind_on_signals()
    from ..snapshot import inventory

    result = inventory.clean(
        version=config.check_version(version) if version is not None else None, everything=values.flag("all")
    )
    for path in result.removed:
        print(f"removed {path}")
    for path in result.kept:
        print(f"kept {path}: in use")
    if not result.removed and not result.kept:
        print("nothing to remove")
    return 0
