"""The prepared Deephaven snapshot under QEMU, with the guest's RAM served by the pager (shim.c)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from typing import Any

from dhg import machine, proc
from dhg.engine import qmp
from dhg.pager import handshake
from dhg.pager.process import PagerProcess
from dhg.snapshot import store

FD_VMM_LEASH = 220
#: QEMU's own start included; under emulation on a machine that does other things, too.
TIMEOUT_S = 60.0


class ServedVm(qmp.Vm):
    """A QEMU whose memory a pager serves. `counts` are the pager's, once it is closed."""

    __slots__ = ("counts", "folder", "pager", "ready_ns")

    def __init__(self, snapshot: store.Snapshot, shim: str, *, mode: str, chunk: int | None, working_set: str) -> None:
        self.counts: dict[str, Any] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="served-")
        path, memory = f"{self.folder.name}/s", f"{snapshot.path}/ram"
        with closing(handshake.listen(path)) as listener:
            self.pager = PagerProcess(listener, memory, mode=mode, chunk=chunk, working_set=working_set)
        preload = ["/usr/bin/env", f"LD_PRELOAD={shim}", f"DHG_SHIM_MEMORY={memory}", f"DHG_SHIM_SOCKET={path}"]
        log = os.memfd_create("qemu-log")
        state = os.open(snapshot.state, os.O_RDONLY | os.O_CLOEXEC)
        fds = {qmp.FD_STATE: state, qmp.FD_LOCK: snapshot.lock, FD_VMM_LEASH: self.pager.vmm_leash, 1: log, 2: log}
        try:
            super().__init__([*preload, *snapshot.argv], extra=fds, log=log)
        except BaseException:
            self.pager.close()
            self.folder.cleanup()
            raise
        finally:
            os.close(state)
        self.pager.tie(self.process.pid)

    def wait_resumed(self, *, deadline: proc.Deadline) -> tuple[int, int, int]:
        """As Firecracker: what is to be there before the guest goes on is there first."""
        self.pager.wait_ready(deadline)
        qmp.load(self)
        return super().wait_resumed(deadline=deadline)

    def said(self) -> str | None:
        """What QEMU and the pager said."""
        return f"{super().said()}\n{self.pager.said()}"

    def close(self) -> None:
        """Kill QEMU, which ends the pager."""
        super().close()
        self.counts = json.loads(self.pager.counts() or b"{}")
        self.pager.process.wait(TIMEOUT_S)
        self.pager.close()
        self.folder.cleanup()


def starter(
    shim: str, *, mode: str, chunk: int | None = None, working_set: str = ""
) -> Callable[[store.Snapshot], ServedVm]:
    """What `machine.Machine` starts its VM with."""
    return lambda snapshot: ServedVm(snapshot, shim, mode=mode, chunk=chunk, working_set=working_set)


def restore(shim: str, **how: Any) -> tuple[machine.Machine, ServedVm]:
    """The newest snapshot, being restored; the VM beside it."""
    snapshot = store.open_snapshot()
    try:
        restored = machine.Machine(snapshot, starter(shim, **how))
    finally:
        os.close(snapshot.lock)
    vm = restored.vm
    assert isinstance(vm, ServedVm)
    return restored, vm
