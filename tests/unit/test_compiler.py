"""Compiling beside a VM's start: what comes out of it, and that nothing in a source can hurt whoever asked for it."""

from __future__ import annotations

import errno
import importlib.util
import marshal
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dhg import compiler, proc
from dhg.errors import UsageError
from dhg.guest import exchange, runner, script
from dhg.wire import client, frames
from dhg.wire.compiling import compiled

MAGIC = importlib.util.MAGIC_NUMBER.hex()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    # A loaded machine must not make the difference here between code and none.
    monkeypatch.setattr(compiler, "PATIENCE_MS", 20_000.0)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def code_of(source: bytes, filename: str = "<string>") -> bytes:
    found = compiler.start(source, filename, MAGIC)
    assert found is not None
    try:
        return found.code()
    finally:
        found.close()


@pytest.mark.parametrize(
    "source",
    [
        b"print('hello')",
        b"1 + 1  \n\n",
        b"import os\nx = os.sep\n",
        b"def f():\n    return 1\nx = f()",
        "s = 'größe'\nprint(s)".encode(),
        b"# coding: latin-1\nx = '\xe4'",
        b"x = '''" + b"a" * 100_000 + b"'''",  # more than a pipe holds
    ],
)
def test_the_code_is_what_the_guest_would_make_of_it(source: bytes) -> None:
    found = marshal.loads(code_of(source, "some/file.py"))
    assert found == compiled(source, "some/file.py")
    assert found.co_filename == "some/file.py"


@pytest.mark.parametrize(
    "source",
    [
        b"1 +",
        b"a\0b",
        b"x = '\xff'",
        # Warnings are the guest's to print.
        b"1 is 1",
        b"'\\d'",
        b"assert (1, 2)",
        # Too much for the compiler.
        b"-" * 50_000 + b"1",
        b"(" * 300,
        b"a." * 100_000 + b"b",
        b"# coding: no-such-coding\n1",
    ],
)
def test_whatever_the_compiler_has_to_say_it_says_in_the_guest(
    source: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert code_of(source) == b""
    assert capfd.readouterr() == ("", "")


def test_it_is_left_to_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.start(b"1", "x", "") is None
    assert compiler.start(b"1", "x", "00000000") is None
    assert compiler.start(b" \n", "x", MAGIC) is None
    assert compiler.start(b"#" * compiler.MAX_SOURCE + b"1", "x", MAGIC) is None
    monkeypatch.setenv("DHG_VM_COMPILE", "guest")
    assert compiler.start(b"1", "x", MAGIC) is None
    monkeypatch.setenv("DHG_VM_COMPILE", "elsewhere")
    with pytest.raises(UsageError, match="'elsewhere'") as raised:
        compiler.start(b"1", "x", MAGIC)
    assert raised.value.hint == "there are guest and host"
    monkeypatch.delenv("DHG_VM_COMPILE")
    monkeypatch.setenv("PYTHONNODEBUGRANGES", "1")
    assert compiler.start(b"1", "x", MAGIC) is None


def test_code_that_comes_too_late_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "PATIENCE_MS", 0.0)
    monkeypatch.setattr(compiler, "PATIENCE_US_BYTE", 0.0)
    found = compiler.start(b"x = [" + b"1," * 400_000 + b"]", "x", MAGIC)
    assert found is not None
    child = found._child
    assert child is not None
    assert found.code() == b""
    # In the middle of it.
    assert child.status == -proc.SIGKILL


def test_a_child_that_dies_has_no_code() -> None:
    found = compiler.start(b"x = [" + b"1," * 400_000 + b"]", "x", MAGIC)
    assert found is not None
    assert found._child is not None
    os.kill(found._child.pid, proc.SIGKILL)
    assert found.code() == b""
    found.close()
    found.close()  # once more does nothing


def test_half_of_the_code_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(source: bytes, filename: str, pipe: int) -> None:
        os.write(pipe, (1000).to_bytes(4, "little") + bytes(999))

    monkeypatch.setattr(compiler, "_work", half)
    assert code_of(b"1") == b""


def test_the_child_can_do_nothing_but_compute_and_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")

    def work(source: bytes, filename: str, pipe: int) -> None:
        import socket

        opened = os.open(secret, os.O_RDONLY)
        compiler._confine()
        errors = []
        for attempt in (
            lambda: os.open(secret, os.O_RDONLY),
            lambda: os.read(opened, 1),
            lambda: os.unlink(secret),
            lambda: os.kill(os.getppid(), proc.SIGKILL),
            os.fork,
            lambda: os.execv("/bin/true", ["true"]),
            lambda: socket.socket(),
            lambda: os.fchmod(opened, 0o777),
            lambda: os.memfd_create("x"),
        ):
            try:
                attempt()
                errors.append(0)
            except OSError as error:
                errors.append(error.errno or -1)
        data = marshal.dumps((errors, bytes(1 << 20)))
        data = len(data).to_bytes(4, "little") + data
        while data:
            data = data[os.write(pipe, data) :]

    monkeypatch.setattr(compiler, "_work", work)
    errors, _ = marshal.loads(code_of(b"1"))
    assert errors == [errno.EPERM] * 9
    assert secret.read_text() == "secret"


def test_the_child_has_none_of_our_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(source: bytes, filename: str, pipe: int) -> None:
        # The directory that is being listed is among them, and then closed.
        names = [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]
        data = marshal.dumps((names, pipe))
        os.write(pipe, len(data).to_bytes(4, "little") + data)

    monkeypatch.setattr(compiler, "_work", work)
    with open("/proc/self/status"):
        names, pipe = marshal.loads(code_of(b"1"))
    assert names == [str(pipe)]


def test_the_request_brings_the_code_and_the_guest_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    # Another program, so that it shows which one was run.
    code = marshal.dumps(compile("print('code')\nresult = 1", "<string>", "exec"))
    request = client.Request(b"print('source')", code=lambda: code)
    payload = client.encode(request, end_mark=bytes(16))[frames.HEAD_SIZE :]
    found = exchange.Request()
    found.decode(payload)
    assert (found.source, found.filename, found.code) == (b"print('source')", "<string>", code)
    names: dict[str, object] = {}
    outcome = script.Script(found.source, found.filename, [], names, code=found.code).run(end=False)
    assert (outcome.exit_code, outcome.result_repr, names["result"]) == (0, None, 1)
    assert capsys.readouterr().out == "code\n"


def test_an_error_in_code_shows_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    source = b"def f():\n    return 1 / 0\n\nf()\n"
    outcomes = [
        script.Script(source, "a.py", [], {"__name__": "__main__"}, code=code).run(end=False)
        for code in (b"", code_of(source, "a.py"))
    ]
    assert outcomes[0].error == outcomes[1].error
    assert outcomes[0].error is not None
    assert '  File "a.py", line 2, in f\n    return 1 / 0\n           ~~^~~\n' in outcomes[0].error[2]
    capsys.readouterr()


def test_a_syntax_error_has_no_frame_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = script.Script(b"x =\n", "a.py", [], {}).run(end=False)
    assert outcome.error is not None
    assert outcome.error[2] == '  File "a.py", line 1\n    x =\n       ^\nSyntaxError: invalid syntax\n'
    capsys.readouterr()


def test_the_rehearsals_requests_are_of_both_kinds() -> None:
    request = exchange.Request()
    request.decode(runner.rehearsal(with_code=False))
    assert request.code == b""
    request.decode(runner.rehearsal(with_code=True))
    assert marshal.loads(request.code) == compiled(request.source, request.filename)
