"""Completion scripts: each shell that is here reads its own and completes with it."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from tests.conftest import run_dhg

from dhg.cli import completion


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_command_and_option_is_in_it(shell: str) -> None:
    done = run_dhg("completion", shell)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    for command, options in completion.COMMANDS.items():
        assert all(word in text for word in command.split())
        for option in options:
            assert all((name.lstrip("-") if shell == "fish" else name) in text for name in option.names)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dhg", "e"], {"exec"}),
        (["dhg", "vm", "st"], {"status"}),
        (["dhg", "vm", "clean", "--a"], {"--all"}),
        (["dhg", "exec", "--time"], {"--timeout"}),
        (["dhg", "completion", "f"], {"fish"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    array = " ".join(f"'{word}'" for word in words)
    code = f"{completion.bash()}\nCOMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _dhg; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run([bash, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_shell_finds_no_fault_with_it(shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} on this machine")
    text = subprocess.run(
        [program, "-n", "/dev/stdin"], input=run_dhg("completion", shell).stdout, capture_output=True, timeout=30
    )
    assert (text.returncode, text.stderr) == (0, b"")


def test_no_such_shell() -> None:
    done = run_dhg("completion", "tcsh")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"hint: dhg completion bash|zsh|fish" in done.stderr
