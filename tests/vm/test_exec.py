"""`dhg exec --vm` from outside, against a real VM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.conftest import DEADLINE_S, DHG, Dhg, qemus_of

from dhg import config


def test_hello(dhg: Dhg) -> None:
    done = dhg("exec", "--vm", "-c", "print('hello')")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n", b"")


def test_a_million_rows(dhg: Dhg) -> None:
    code = "from deephaven import empty_table; t = empty_table(1_000_000).update('x = i'); print(t.size)"
    done = dhg("exec", "--vm", "--no-show-tables", "-c", code)
    assert (done.returncode, done.stdout) == (0, b"1000000\n"), done.stderr


def test_the_queries_people_write_work_after_a_restore(dhg: Dhg) -> None:
    code = """
from deephaven import agg, empty_table, read_csv, time_table
from deephaven.pandas import to_pandas
t = empty_table(100).update(['g = i % 3', 'v = i * 2.0'])
print(to_pandas(t.agg_by([agg.sum_('v')], by=['g']).sort('g'))['v'].tolist())
open('/tmp/x.csv', 'w').write('a,b\\n1,2\\n3,4\\n')
print(to_pandas(read_csv('/tmp/x.csv'))['b'].tolist())
import time
tick = time_table('PT0.05s')
until = time.monotonic() + 60
while tick.size < 2 and time.monotonic() < until:
    time.sleep(0.05)
print(tick.size >= 2)
"""
    done = dhg("exec", "--vm", "--no-show-tables", "-c", code)
    assert done.stdout == b"[3366.0, 3234.0, 3300.0]\n[2, 4]\nTrue\n", done.stderr
    assert done.returncode == 0


def test_script_from_a_file_and_from_stdin(dhg: Dhg, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:], __name__)\n")
    done = dhg("exec", "--vm", str(script), "a", "--vm", "-c")
    assert (done.returncode, done.stdout) == (0, b"['a', '--vm', '-c'] __main__\n"), done.stderr
    done = dhg("exec", "--vm", "-", "b", stdin=script.read_bytes())
    assert (done.returncode, done.stdout) == (0, b"['b'] __main__\n"), done.stderr


def test_exit_codes_and_traceback(dhg: Dhg, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("print('before')\ndef f():\n    raise KeyError('k')\nf()\n")
    done = dhg("exec", "--vm", str(script))
    assert (done.returncode, done.stdout) == (1, b"before\n")
    assert done.stderr.decode() == (
        "Traceback (most recent call last):\n"
        f'  File "{script}", line 4, in <module>\n    f()\n'
        f"  File \"{script}\", line 3, in f\n    raise KeyError('k')\n"
        "KeyError: 'k'\n"
    )
    assert dhg("exec", "--vm", "-c", "import sys; sys.exit(7)").returncode == 7
    done = dhg("exec", "--vm", "-c", "raise SystemExit('sorry')")
    assert (done.returncode, done.stderr) == (1, b"sorry\n")


def test_output_streams_as_it_is_printed() -> None:
    code = "import time; print('first'); time.sleep(60)"
    with subprocess.Popen([DHG, "exec", "--vm", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"first\n"
        assert process.poll() is None
        process.kill()


def test_stdin_reaches_the_script(dhg: Dhg) -> None:
    done = dhg(
        "exec",
        "--vm",
        "-c",
        "import sys; print(input()); print(len(sys.stdin.read()))",
        stdin=b"one\n" + b"x" * 300_000,
    )
    assert (done.returncode, done.stdout) == (0, b"one\n300000\n"), done.stderr


def test_eight_at_once(dhg: Dhg) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(dhg, "exec", "--vm", "-c", f"print({n} * 11)") for n in range(8)]
        assert [run.result().stdout for run in runs] == [b"%d\n" % (n * 11) for n in range(8)]


def test_nothing_survives_a_run(dhg: Dhg) -> None:
    leave = """
import builtins, threading, time, os
builtins.left = 1
open('/root/left', 'w').write('x')
threading.Thread(target=time.sleep, args=(1000,), daemon=True, name='left').start()
os.environ['LEFT'] = '1'
print(os.path.exists('/root/left'))
"""
    assert dhg("exec", "--vm", "-c", leave).stdout == b"True\n"
    look = """
import builtins, threading, os
print(hasattr(builtins, 'left'), os.path.exists('/root/left'), 'LEFT' in os.environ)
print('left' in [t.name for t in threading.enumerate()])
"""
    assert dhg("exec", "--vm", "-c", look).stdout == b"False False False\nFalse\n"


def test_the_guest_clock_resolves_below_a_microsecond(dhg: Dhg) -> None:
    code = """
import time
steps = set()
for _ in range(2000):
    a = b = time.perf_counter_ns()
    while b == a:
        b = time.perf_counter_ns()
    steps.add(b - a)
import time as t
print(t.get_clock_info('perf_counter').resolution, all(s % 1000 == 0 for s in steps))
"""
    resolution, coarse = dhg("exec", "--vm", "-c", code).stdout.split()
    assert float(resolution) < 1e-6
    # A jiffies clock or one of microseconds would make every step a whole number of them.
    assert coarse == b"False"


def _wait(condition: object, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def _running(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([DHG, "exec", "--vm", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.mark.parametrize("delay_s", [None, 0.0, 0.005, 0.02, 0.05])
def test_kill_9_of_the_client_leaves_no_vm(delay_s: float | None) -> None:
    home = Path(config.home())
    before = set(qemus_of(home))
    if delay_s is None:
        process = _running("print('up'); import time; time.sleep(60)")
        assert set(qemus_of(home)) - before
    else:
        # At any moment of the start, too.
        process = subprocess.Popen([DHG, "exec", "--vm", "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
        _wait(lambda: _children(process.pid), 10)
        time.sleep(delay_s)
    process.kill()
    process.communicate()
    assert _wait(lambda: not set(qemus_of(home)) - before, 1.0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_run_and_the_vm(number: signal.Signals, code: int) -> None:
    process = _running("print('up'); import time; time.sleep(60)")
    qemus = _children(process.pid)
    assert len(qemus) == 1
    process.send_signal(number)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, err
    assert not os.path.exists(f"/proc/{qemus[0]}")


def test_timeout(dhg: Dhg) -> None:
    done = dhg("exec", "--vm", "--timeout", "2", "-c", "print('so far'); import time; time.sleep(60)")
    assert (done.returncode, done.stdout) == (3, b"so far\n")
    assert done.stderr == b"error: timed out after 2 s\nhint: the script was running\n"


def test_verbose_shows_the_phases(dhg: Dhg) -> None:
    # Several times: what is left for the result may be next to nothing, and is never less.
    for _ in range(5):
        done = dhg("exec", "--vm", "--verbose", "-c", "pass")
        names = re.findall(r"^dhg: (.*?)  +[\d.]+ ms$", done.stderr.decode(), re.M)
        assert names == [
            "interpreter start",
            "client",
            "spawn",
            "VMM start",
            "state load",
            "wake-up",
            "guest ready",
            "script",
            "result",
            "close",
            "total",
        ]
        values = [float(value) for value in re.findall(r"([\d.]+) ms$", done.stderr.decode(), re.M)]
        assert sum(values[:-1]) == pytest.approx(values[-1], abs=1.0)


def test_a_script_that_kills_its_interpreter_is_told_apart(dhg: Dhg) -> None:
    done = dhg("exec", "--vm", "-c", "print('before'); import os; os._exit(5)")
    assert (done.returncode, done.stdout) == (2, b"before\n")
    assert b"exit status 5" in done.stderr


def test_no_snapshot_says_what_to_run(dhg: Dhg, tmp_path: Path) -> None:
    done = dhg("exec", "--vm", "-c", "print(1)", env={"DHG_HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (4, b"")
    assert b"hint: run `dhg vm prepare`" in done.stderr
    done = dhg("exec", "--vm", "--version", "1.2.3", "-c", "print(1)")
    assert done.returncode == 4
    assert b"dhg vm prepare --version 1.2.3" in done.stderr
