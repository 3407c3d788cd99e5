"""How a script's source becomes code in the guest, and what its errors look like."""

from __future__ import annotations

import pytest

from dhg.guest import exchange, runner, script
from dhg.wire import frames


def run(source: bytes) -> script.Outcome:
    return script.Script(source, "a.py", [], {"__name__": "__main__"}).run(end=False)


def test_the_value_of_one_expression_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [run(source).result_repr for source in (b"6 * 7\n", b"x = 1", b"1; 2", b" \n", b"None")]
    assert shown == ["42", None, None, None, None]
    assert capsys.readouterr() == ("42\n", "")


def test_an_error_has_no_frame_of_ours_and_no_context(capsys: pytest.CaptureFixture[str]) -> None:
    # The first is tried as an expression before.
    error = run(b"x = 1 / 0\n").error
    assert error is not None
    assert error[2].splitlines()[:2] == ["Traceback (most recent call last):", '  File "a.py", line 1, in <module>']
    assert "SyntaxError" not in error[2]
    error = run(b"x =\n").error
    assert error is not None
    assert error[2] == '  File "a.py", line 1\n    x =\n       ^\nSyntaxError: invalid syntax\n'
    capsys.readouterr()


def test_the_rehearsals_request_is_one() -> None:
    request = exchange.Request()
    request.decode(runner.rehearsal())
    assert (request.source, request.filename, request.file) == (b"print('rehearsal')", frames.STRING, None)
    assert (request.folder, request.args, request.environ) == (None, (), ())
