"""`dhg exec --host`: against a Deephaven server that somebody else has started on this host."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import Completed, run_dhg
from tests.vm.test_contract import TABLES, TABLES_TEXT, report

from dhg import embedded

PSK = "io.deephaven.authentication.psk.PskAuthenticationHandler"
SERVER = """
import sys
from deephaven_server import Server
server = Server(port=int(sys.argv[1]), jvm_args=['-Xmx512m', '-XX:+UseSerialGC', '-Dauthentication.psk=secret'],
                default_jvm_args=['-XX:+OmitStackTraceInFastThrow'])
server.start()
print('the server is up', flush=True)
sys.stdin.read()
import os
os._exit(0)
"""
Remote = Callable[..., Completed]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    argv = [sys.executable, "-c", SERVER, str(number)]
    env = {**os.environ, "JAVA_HOME": embedded.find_java()}
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env) as server:
        assert server.stdout is not None
        until, said = time.monotonic() + 100, b""
        while b"the server is up" not in said:
            assert select.select([server.stdout], [], [], max(0, until - time.monotonic()))[0], said
            said += os.read(server.stdout.fileno(), 65536)
        # What it logs from now on must not fill the pipe.
        drain = subprocess.Popen(["cat"], stdin=server.stdout, stdout=subprocess.DEVNULL)
        yield number
        server.kill()
        server.wait()
        drain.wait(10)


@pytest.fixture
def run(port: int) -> Remote:
    def call(*args: str, **options: object) -> Completed:
        env = {"DHG_AUTH_TOKEN": "secret"}
        where = ["--host", "127.0.0.1", "--port", str(port), "--auth-type", PSK]
        return run_dhg("exec", *where, *args, env=env, **options)  # type: ignore[arg-type]

    return call


def test_output_exit_codes_and_tracebacks(run: Remote, tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import sys\nprint(sys.argv[1:], __name__)\nprint('e', file=sys.stderr)\nsys.exit(7)\n")
    done = run(str(script), "a", "--vm-not")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"['a', '--vm-not'] __main__\n", b"e\n")
    done = run("-c", "print('before')\ndef f(): return 1 / 0\nf()")
    assert (done.returncode, done.stdout) == (1, b"before\n")
    assert done.stderr.startswith(b'Traceback (most recent call last):\n  File "<string>", line 3, in <module>\n')
    assert done.stderr.endswith(b"ZeroDivisionError: division by zero\n")
    assert b"_dhg" not in done.stderr
    assert run("-c", "1 + 1").stdout == b"2\n"


def test_previews_are_those_of_this_script_only(run: Remote) -> None:
    done = run("--rows", "3", "-c", TABLES)
    assert (done.returncode, done.stdout.decode()) == (0, TABLES_TEXT), done.stderr
    # It is in the server for others to see, but was not left by this script.
    done = run("-c", "print(t.size)")
    assert done.stdout == b"2\n"


def test_nothing_of_ours_stays_in_the_server(run: Remote) -> None:
    assert run("--env", "LEFT=1", "-c", "print(__import__('os').environ['LEFT'])").stdout == b"1\n"
    # What is there while it runs is this run's own, and of one name.
    look = "import sys\nprint(len({n.partition('.')[0] for n in [*globals(), *sys.modules] if n[:5] == '_dhg_'}))"
    assert run("-c", look).stdout == b"1\n"
    assert run("-c", "print('__file__' in globals())").stdout == b"False\n"
    assert run("-c", "import os; print('LEFT' in os.environ)").stdout == b"False\n"


def test_json(run: Remote) -> None:
    found = report(run("--json", "-c", "print('so far'); {}['k']"))
    assert (found["outcome"], found["exit_code"], found["stdout"], found["engine"]) == (
        "failed",
        1,
        "so far\n",
        "remote",
    )
    assert isinstance(found["version"], str)
    assert json.dumps(found["error"]).count("KeyError") >= 1


def test_a_timeout_and_the_wrong_key(run: Remote, port: int) -> None:
    done = run("--timeout", "3", "-c", "import time; time.sleep(6)")
    assert done.returncode == 3
    assert b"error: timed out after 3 s" in done.stderr
    done = run_dhg("exec", "--host", "127.0.0.1", "--port", str(port), "-c", "print(1)")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"error: no Deephaven session with 127.0.0.1" in done.stderr
    assert b"hint: " in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--host", "h", "--vm"], b"exclude each other"),
        (["--port", "1"], b"--port needs --host"),
        (["--host", "h", "--tls-cert", "f"], b"go together"),
        (["--host", "h", "--tls-ca", "/no/such/file"], b"cannot read /no/such/file"),
        (["--host", "h", "--version", "1.0"], b"--version needs --vm"),
    ],
)
def test_options_that_make_no_sense(args: list[str], message: bytes) -> None:
    done = run_dhg("exec", *args, "-c", "print(1)")
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr
