"""The option parser."""

from __future__ import annotations

import pytest

from dhg import config
from dhg.cli import exec_
from dhg.cli.options import Option, parse, positive_integer, positive_number
from dhg.errors import UsageError

OPTIONS = [Option("-c", "CODE", ""), Option("-v, --verbose", None, ""), Option("--env", "X", "", repeat=True)]


def test_values_flags_and_the_rest() -> None:
    values = parse(["-v", "--env", "a", "--env=b", "-cx=1", "rest", "-v"], OPTIONS, verb="exec", stop_at_first=True)
    assert values.flag("verbose")
    assert values.text("c") == "x=1"
    assert values.texts("env") == ["a", "b"]
    assert values.rest == ["rest", "-v"]


def test_two_dashes_end_the_options() -> None:
    assert parse(["--", "-v"], OPTIONS, verb="exec").rest == ["-v"]
    assert parse(["-"], OPTIONS, verb="exec").rest == ["-"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--no-such"], "no such option: --no-such"),
        (["-x"], "no such option: -x"),
        (["-c"], "needs a value"),
        (["-c", "a", "-c", "b"], "given twice"),
        (["--verbose=1"], "takes no value"),
        (["--env", ""], "--env needs a value that is not empty: --env X"),
        (["--env="], "--env needs a value that is not empty"),
    ],
)
def test_nonsense_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(argv, OPTIONS, verb="exec")


def test_an_empty_value_is_no_value() -> None:
    for option in exec_.OPTIONS:
        if option.metavar is not None and option.key != "c":
            for argv in ([option.names[-1], ""], [f"{option.names[-1]}="]):
                with pytest.raises(UsageError, match=f"{option.names[-1]} needs a value that is not empty"):
                    parse(argv, exec_.OPTIONS, verb="exec")
    # An empty script is one.
    values = parse(["-c", ""], exec_.OPTIONS, verb="exec")
    assert values.text("c") == ""


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf", ""])
def test_numbers(text: str) -> None:
    with pytest.raises(UsageError):
        positive_number("--timeout", text)
    with pytest.raises(UsageError):
        positive_integer("--rows", text)


def test_a_number_of_very_many_digits() -> None:
    assert positive_integer("--rows", "9" * 100) == 10**100 - 1
    with pytest.raises(UsageError, match="--rows takes a whole number above 0"):
        positive_integer("--rows", "9" * 5000)


@pytest.mark.parametrize(("text", "size"), [("2G", 2048), ("1536M", 1536), ("512", 512), ("2g", 2048)])
def test_sizes(text: str, size: int) -> None:
    assert config.parse_size_mib(text) == size


@pytest.mark.parametrize("text", ["", "G", "2T", "-1G", "1.5G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        config.parse_size_mib(text)


@pytest.mark.parametrize("text", ["", "..", "/etc", "a/b", ".hidden", "42.7/..", "x" * 65, "4 2", "latest"])
def test_versions_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        config.check_version(text)
