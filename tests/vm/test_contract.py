"""The contract of `dhg exec`, the same for a VM and for the embedded server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import DEADLINE_S, DHG, Completed, run_dhg

Exec = Callable[..., Completed]
MODES = {"vm": ["--vm"], "embedded": []}


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> list[str]:
    return MODES[str(request.param)]


@pytest.fixture
def run(mode: list[str]) -> Exec:
    def call(*args: str, **options: object) -> Completed:
        return run_dhg("exec", *mode, *args, **options)  # type: ignore[arg-type]

    return call


def ok(done: Completed, out: str) -> None:
    assert (done.stdout.decode(), done.returncode) == (out, 0), done.stderr.decode()


def test_nothing_is_added_and_nothing_is_lost(run: Exec) -> None:
    done = run(
        "-c",
        "import sys; print('x', end='', flush=True); sys.stdout.buffer.write(bytes(range(256))); print('é', file=sys.stderr)",
    )
    assert done.stdout == b"x" + bytes(range(256))
    assert done.stderr == "é\n".encode()


def test_sources(run: Exec, tmp_path: Path) -> None:
    ok(run("-c", " \n\t \n"), "")
    both = run("-c", "1", "-c", "2")
    assert both.returncode == 2
    assert b"-c is given twice" in both.stderr
    none = run()
    assert none.returncode == 2
    assert b"nothing to run" in none.stderr
    missing = run(str(tmp_path / "no.py"))
    assert missing.returncode == 2
    assert b"no.py: No such file" in missing.stderr
    script = tmp_path / "s.py"
    script.write_bytes(
        b"\xef\xbb\xbfimport sys\nprint(sys.argv[1:], __name__, __file__ == sys.argv[0], 'caf\xc3\xa9')\n"
    )
    ok(run(str(script), "-x", "--rows", "é"), "['-x', '--rows', 'é'] __main__ True café\n")
    script.write_bytes(b"# -*- coding: latin-1 -*-\nprint('caf\xe9', len('\xe9'))\n")
    ok(run(str(script)), "café 1\n")


def test_a_script_of_several_megabytes(run: Exec, tmp_path: Path) -> None:
    script = tmp_path / "big.py"
    script.write_text("x = '''" + "a" * 4_000_000 + "'''\nprint(len(x))\n")
    ok(run(str(script)), "4000000\n")


def test_a_single_expression_is_shown_and_run_once(run: Exec) -> None:
    ok(run("-c", "1+1"), "2\n")
    ok(run("-c", "print('once')"), "once\n")
    done = run("-c", "[print('once'), 1 / 0]")
    assert (done.returncode, done.stdout) == (1, b"once\n")
    ok(run("-c", "1+1; 2+2"), "")


def test_stdin_and_input(run: Exec) -> None:
    done = run(
        "-c",
        "import sys; a = input(); print(a, len(sys.stdin.read()))",
        stdin=b"first\n" + b"y" * 100_000,
    )
    ok(done, "first 100000\n")
    ok(run("-", "arg", stdin=b"import sys\nprint(sys.argv, sys.stdin.read() == '')\n"), "['-', 'arg'] True\n")


def test_output_of_children_and_of_the_jvm(run: Exec) -> None:
    code = """
import os, subprocess, jpy
print('a', flush=True)
subprocess.run(['sh', '-c', 'echo b; echo c >&2'])
jpy.get_type('java.lang.System').out.println('d')
jpy.get_type('java.lang.System').out.flush()
os.write(1, b'e\\n')
print('f')
"""
    done = run("-c", code)
    ok(done, "a\nb\nd\ne\nf\n")
    assert done.stderr == b"c\n"


def test_much_output_arrives_whole(run: Exec) -> None:
    done = run("-c", "import sys\nfor i in range(100): sys.stdout.buffer.write(bytes([i]) * 200_000)\nprint('end')")
    assert len(done.stdout) == 20_000_004
    assert all(done.stdout[i * 200_000 : (i + 1) * 200_000] == bytes([i]) * 200_000 for i in range(100))
    done = run("-c", "for i in range(50_000): print(i)")
    assert done.stdout == b"".join(b"%d\n" % i for i in range(50_000))


def _peak_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))


def test_a_slow_reader_holds_the_script_back_and_memory_does_not_grow(mode: list[str]) -> None:
    code = "import sys\nfor i in range(100): sys.stdout.buffer.write(bytes(1_000_000))"
    with subprocess.Popen(
        [DHG, "exec", *mode, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        total = len(process.stdout.read(1000))
        time.sleep(1)
        assert process.poll() is None
        while part := process.stdout.read(1 << 20):
            total += len(part)
            if total < 99_000_000:
                assert _peak_kib(process.pid) < 60_000
        assert process.wait(DEADLINE_S) == 0
    assert total == 100_000_000


def test_a_reader_that_leaves_ends_the_run_quietly(mode: list[str]) -> None:
    argv = [DHG, "exec", *mode, "-c", "while True: print('y')"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 141
        assert process.stderr.read() == b""


def test_tracebacks_are_the_users_own(run: Exec, tmp_path: Path) -> None:
    script = tmp_path / "t.py"
    script.write_text("def f(x):\n    return 1 / x\n\nprint('before')\nf(0)\n")
    here = run(str(script))
    python = subprocess.run([sys.executable, str(script)], capture_output=True, check=False)
    assert here.returncode == 1
    # Python 3.11 to 3.14 mark columns differently; the guest has its own Python.
    strip = re.compile(rb"^[ ~^]+\n", re.M)
    assert strip.sub(b"", here.stderr) == strip.sub(b"", python.stderr)
    assert here.stdout == b"before\n"
    script.write_text("x = 1\nif x\n    pass\n")
    done = run(str(script))
    assert done.returncode == 1
    assert f'File "{script}", line 2'.encode() in done.stderr
    assert b"SyntaxError: expected ':'" in done.stderr
    assert b"dhg" not in done.stderr.replace(str(script).encode(), b"")


def test_java_causes_are_shown(run: Exec) -> None:
    done = run("-c", "from deephaven import empty_table\nempty_table(3).update('x = nope + 1')")
    assert done.returncode == 1
    assert done.stderr.startswith(b"Traceback (most recent call last):\n")
    assert b"Cannot find variable or class nope" in done.stderr


def test_exits(run: Exec) -> None:
    done = run("-c", "print('kept'); import sys; sys.exit(7)")
    assert (done.returncode, done.stdout) == (7, b"kept\n")
    done = run("-c", "import sys; sys.exit('sorry')")
    assert (done.returncode, done.stderr) == (1, b"sorry\n")
    done = run("-c", "print('kept', flush=True); import os; os._exit(9)")
    assert (done.returncode, done.stdout) == (2, b"kept\n")
    assert b"error: the script ended its interpreter (exit status 9)" in done.stderr
    done = run("-c", "print('kept', flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (done.returncode, done.stdout) == (2, b"kept\n")
    assert b"killed by signal 9" in done.stderr


def test_threads_and_exit_handlers_run_to_their_end(run: Exec) -> None:
    code = """
import atexit, threading, time
atexit.register(print, 'exit handler')
threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()
print('main')
"""
    ok(run("-c", code), "main\nthread\nexit handler\n")


def test_environment(run: Exec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "from here")
    done = run("--env", "OURS", "--env", "A=b=c", "-c", "import os; print(os.environ['OURS'], os.environ['A'])")
    ok(done, "from here b=c\n")
    done = run("--env", "NOT_THERE_AT_ALL", "-c", "1")
    assert done.returncode == 2
    assert b"NOT_THERE_AT_ALL" in done.stderr


TABLES = """
from deephaven import empty_table, new_table, time_table
from deephaven.column import int_col, string_col
t = new_table([int_col('x', [1, 22]), string_col('s', ['a', 'bb'])])
many = empty_table(1234).update(['a_long_name_of_a_column = i', 'another_quite_long_name = ii', 'third_name_to_fill_it = i * 0.5'])
empty = empty_table(0).update('x = i')
parts = t.partition_by('s')
for inner in [t]:
    pass
not_a_table = 5
print('output')
"""

TABLES_TEXT = """output

=== Table: t (2 rows, static) ===
Columns: x (int32), s (string)

 x  s
 1  a
22 bb

=== Table: many (1,234 rows, static) ===
Columns:
  a_long_name_of_a_column (int32)
  another_quite_long_name (int64)
  third_name_to_fill_it (float64)

 a_long_name_of_a_column  another_quite_long_name  third_name_to_fill_it
                       0                        0                    0.0
                       1                        1                    0.5
                       2                        2                    1.0

=== Table: empty (0 rows, static) ===
Columns: x (int32)

(empty table)

=== Partitioned table: parts (by s) ===

=== Table: inner (2 rows, static) ===
Columns: x (int32), s (string)

 x  s
 1  a
22 bb
"""


def test_table_previews(run: Exec) -> None:
    ok(run("--rows", "3", "-c", TABLES), TABLES_TEXT)
    ok(run("--no-show-tables", "-c", TABLES), "output\n")
    without_meta = re.sub(r"Columns:.*\n(  \w+ \(\w+\)\n)*", "", TABLES_TEXT)
    ok(run("--no-table-meta", "--rows", "3", "-c", TABLES), without_meta)


NUMBERS = """
from deephaven import new_table
from deephaven.column import bool_col, double_col, float_col
from deephaven.pandas import to_pandas
null, low = -1.7976931348623157e308, -3.4028234663852886e38
values = [0.0, -0.0, 1 / 3, -2.5e-7, 5e-324, 1e17, -123456.789, 1e300, null, OTHER]
floats = [low if value == null else value if abs(value) < 1e38 else 1.5 for value in values]
t = new_table([double_col('d', values), float_col('f', floats), bool_col('b', [True, False] * 5)])
t = t.update('n = d > 1 ? b : NULL_BOOLEAN')
print(to_pandas(t).to_string(index=False))
"""


@pytest.mark.parametrize("other", ["99.9999995", "float('nan')", "float('-inf')"])
def test_numbers_are_shown_as_pandas_shows_them(run: Exec, other: str) -> None:
    done = run("--no-table-meta", "-c", NUMBERS.replace("OTHER", other))
    assert done.returncode == 0, done.stderr.decode()
    wanted, head, shown = done.stdout.decode().partition("\n\n=== Table: t (10 rows, static) ===\n\n")
    assert head and shown == f"{wanted}\n"
    assert "<NA>" in shown and "-0.0" in shown


def test_a_ticking_table_is_refreshing(run: Exec) -> None:
    done = run("-c", "from deephaven import time_table\nt = time_table('PT1s')")
    assert re.search(rb"=== Table: t \(\d+ rows?, refreshing\) ===", done.stdout), done.stdout


def report(done: Completed) -> dict[str, object]:
    assert done.stdout.count(b"\n") == 1, done
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    assert found["exit_code"] == done.returncode
    validate(found)
    return found


def validate(found: object) -> None:
    import jsonschema

    schema = json.loads((Path(__file__).parents[2] / "docs" / "exec.schema.json").read_text())
    jsonschema.validate(found, schema, cls=jsonschema.Draft202012Validator)


def test_json(run: Exec) -> None:
    found = report(run("--json", "--rows", "1", "-c", TABLES))
    assert (found["outcome"], found["stdout"]) == ("completed", "output\n")
    tables = found["tables"]
    assert isinstance(tables, list)
    assert [table["name"] for table in tables] == ["t", "many", "empty", "inner"]
    assert tables[0] == {
        "name": "t",
        "row_count": 2,
        "is_refreshing": False,
        "columns": [{"name": "x", "type": "int32"}, {"name": "s", "type": "string"}],
        "rows": [{"x": 1, "s": "a"}],
        "preview": " x s\n 1 a",
    }
    assert report(run("--json", "-c", "6 * 7"))["result_repr"] == "42"
    found = report(run("--json", "-c", "print('so far'); {}['k']"))
    assert (found["outcome"], found["exit_code"], found["stdout"]) == ("failed", 1, "so far\n")
    error = found["error"]
    assert isinstance(error, dict)
    assert (error["type"], error["message"]) == ("KeyError", "'k'")
    assert error["traceback"] == found["stderr"]
    found = report(run("--json", "-c", "import os; os._exit(3)"))
    assert (found["outcome"], found["exit_code"]) == ("unknown", 2)
    found = report(run("--json", "--timeout", "nonsense", "-c", "1"))
    assert (found["outcome"], found["exit_code"]) == ("not_started", 2)
    found = report(run("--json", "--no-such-option", "-c", "1"))
    assert (found["outcome"], found["exit_code"]) == ("not_started", 2)


def test_json_timeout(run: Exec) -> None:
    found = report(run("--json", "--timeout", "12", "-c", "print('so far', flush=True)\nimport time; time.sleep(100)"))
    assert (found["outcome"], found["exit_code"], found["stdout"]) == ("timeout", 3, "so far\n")


def test_timeout_ends_a_run_whose_script_does_not_come(mode: list[str]) -> None:
    argv = [DHG, "exec", *mode, "--timeout", "1", "-"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.wait(DEADLINE_S) == 3
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read() == b""
        assert process.stderr.read() == b"error: timed out after 1 s\nhint: the script did not run\n"


def test_timeout_ends_a_run_whose_reader_does_not_read(mode: list[str]) -> None:
    argv = [DHG, "exec", *mode, "--timeout", "12", "-c", "while True: print('y' * 1000)"]
    begin = time.monotonic()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.wait(DEADLINE_S) == 3
        assert process.stderr is not None
        assert b"error: timed out after 12 s" in process.stderr.read()
    assert time.monotonic() - begin >= 12


def _interrupt(mode: list[str], code: str, *, times: int = 1) -> tuple[int, bytes, bytes, float]:
    argv = [DHG, "exec", *mode, "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        begin = time.monotonic()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err, time.monotonic() - begin


def test_ctrl_c_is_a_keyboard_interrupt_in_the_script(mode: list[str]) -> None:
    code = "import time\ntry:\n    print('up')\n    time.sleep(100)\nfinally:\n    print('finally')\n"
    status, out, err, _ = _interrupt(mode, code)
    assert (status, out) == (130, b"finally\n"), err
    assert err.endswith(b"KeyboardInterrupt\n")
    assert b"in <module>" in err
    assert b"dhg" not in err


def test_ctrl_c_that_the_script_ignores_ends_it_all_the_same(mode: list[str]) -> None:
    code = """
import time, signal
signal.signal(signal.SIGINT, lambda *_: None)
print('up')
while True:
    time.sleep(100)
"""
    status, _, err, took = _interrupt(mode, code)
    assert status == 130, err
    assert took >= 1.9
    status, _, err, took = _interrupt(mode, code, times=2)
    assert status == 130, err
    assert took < 1.9


def test_help_version_and_module(mode: list[str]) -> None:
    for args in (
        ["--help"],
        ["exec", "--help"],
        ["vm", "--help"],
        ["vm", "prepare", "--help"],
        ["vm", "status", "--help"],
    ):
        done = run_dhg(*args)
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) <= 30
    assert run_dhg("--version").stdout.startswith(b"dhg ")
    argv = [sys.executable, "-m", "dhg", "exec", *mode, "-c", "print(1)"]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=DEADLINE_S)
    assert done.stdout == b"1\n"


def test_vm_after_the_script_is_no_silent_run_on_the_host(tmp_path: Path) -> None:
    done = run_dhg("exec", "-c", "print(1)", "--", "--vm")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"put --vm before" in done.stderr
    assert os.listdir(tmp_path) == []


def _below(shell: str, *argv: str) -> Completed:
    """A command whose caller, a shell, does something before and with its descriptors; `"$@"` is the command."""
    return subprocess.run(
        ["/bin/sh", "-c", shell, "sh", *argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_a_caller_that_ignores_sigchld(mode: list[str]) -> None:
    ok(_below("trap '' CHLD; exec \"$@\"", DHG, "exec", *mode, "-c", "print('x')"), "x\n")


@pytest.mark.parametrize("closed", ["0<&-", "2>&-", "0<&- 2>&-"])
def test_standard_descriptors_that_are_closed(mode: list[str], closed: str) -> None:
    code = "import sys; print(repr(sys.stdin.read())); print('y', file=sys.stderr)"
    done = _below(f'exec "$@" {closed}', DHG, "exec", *mode, "-c", code)
    ok(done, "''\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"y\n")


def test_a_timeout_of_months(run: Exec) -> None:
    ok(run("--timeout", "9999999", "-c", "print('x')"), "x\n")
    ok(run("--timeout", "1e12", "-c", "print('x')"), "x\n")


def test_an_empty_value_is_no_silent_default(run: Exec) -> None:
    done = run("--timeout", "", "-c", "print('x')")
    assert (done.stdout, done.returncode) == (b"", 2)
    assert b"error: --timeout needs a value that is not empty" in done.stderr


def test_output_goes_on_where_stdout_does_not_block(mode: list[str]) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    argv = [DHG, "exec", *mode, "-c", "import sys; sys.stdout.write('z' * 1_000_000)"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=write) as process:
        os.close(write)
        with open(read, "rb") as file:
            first = file.read(1)
            time.sleep(1.0)
            assert first + file.read() == b"z" * 1_000_000
        assert process.wait(DEADLINE_S) == 0
