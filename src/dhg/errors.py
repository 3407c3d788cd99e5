"""The error hierarchy. Everything that dhg raises on purpose is a `DhgError`.

DhgError
├── UsageError            the request makes no sense: nothing was started
├── HostError             the host lacks something: a program, a permission, room
├── ImageError            kernel, initramfs or root file system could not be built
├── SnapshotError         a snapshot could not be made, or does not fit this host
│   └── SnapshotMissing   there is no such snapshot
├── MachineError          the VM could not be started, or died
│   └── OutcomeUnknown    ... after the script was released: it may or may not have run
├── ProtocolError         the other side sent bytes that are no valid frame
└── DeadlineExceeded      a wait ended without its event
"""

from __future__ import annotations


class DhgError(Exception):
    """Root of all errors; `hint` is the next step to take, `exit_code` what the command line ends with."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        #: Longer material, such as the tail of a log, shown below the message.
        self.detail = detail


class UsageError(DhgError):
    """The request makes no sense; nothing was started."""


class HostError(DhgError):
    """The host lacks something: a program, a permission, memory or disk."""


class ImageError(DhgError):
    """Kernel, initramfs or root file system could not be built."""


class SnapshotError(DhgError):
    """A snapshot could not be made, is damaged, or does not fit this host."""


class SnapshotMissing(SnapshotError):
    """There is no snapshot of the asked version."""

    exit_code = 4


class MachineError(DhgError):
    """The VM could not be started, or died before the script was released."""


class OutcomeUnknown(MachineError):
    """The VM died after the script was released: it may or may not have run."""


class ProtocolError(DhgError):
    """The other side sent bytes that are no valid frame."""


class DeadlineExceeded(DhgError):
    """A wait ended without the event it waited for."""

    exit_code = 3
