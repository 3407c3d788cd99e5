"""Reads a verb's options. Instead of argparse because that alone costs a fifth of what `dhg exec --vm` may take in all."""

from __future__ import annotations

from ..errors import UsageError


class Option:
    """One option: its names, how its value is called in the help (None for a flag), what it does.

    `repeat` collects the values in a list, `empty` says that a value may be empty. One without a text is told of elsewhere in the
    help.
    """

    __slots__ = ("empty", "help", "key", "metavar", "names", "repeat")

    def __init__(
        self, names: str, metavar: str | None, text: str, *, repeat: bool = False, empty: bool = False
    ) -> None:
        self.names = names.split(", ")
        self.metavar = metavar
        self.help = text
        self.repeat = repeat
        self.empty = empty
        self.key = self.names[-1].lstrip("-").replace("-", "_")


class Values:
    """What was given: `text` and `flag` by option, `texts` for options that repeat, `rest` are the positional arguments."""

    __slots__ = ("_found", "rest")

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self.rest: list[str] = []

    def add(self, option: Option, value: str) -> None:
        """Record one occurrence. Raises `UsageError` for a second one of an option that does not repeat."""
        values = self._found.setdefault(option.key, [])
        if values and option.metavar is not None and not option.repeat:
            raise UsageError(f"{option.names[-1]} is given twice")
        values.append(value)

    def flag(self, key: str) -> bool:
        """Whether the option was given."""
        return key in self._found

    def text(self, key: str) -> str | None:
        """The option's value, or None."""
        values = self._found.get(key)
        return values[0] if values else None

    def texts(self, key: str) -> list[str]:
        """All values of the option."""
        return self._found.get(key, [])


def parse(argv: list[str], options: list[Option], *, verb: str, stop_at_first: bool = False) -> Values:
    """Read `argv`. With `stop_at_first`, everything after the first positional argument (or `--`) is positional, too.

    Raises `UsageError` for an option that is not known, lacks its value, or has one that it does not take.
    """
    by_name = {name: option for option in options for name in option.names}
    values = Values()
    at = 0
    while at < len(argv):
        arg = argv[at]
        at += 1
        if arg == "--":
            values.rest += argv[at:]
            break
        if arg[:1] != "-" or arg == "-":
            if stop_at_first:
                values.rest += argv[at - 1 :]
                break
            values.rest.append(arg)
            continue
        name, equals, value = arg.partition("=") if arg[:2] == "--" else (arg[:2], arg[2:], arg[2:])
        option = by_name.get(name)
        if option is None:
            raise UsageError(f"no such option: {name}", hint=f"`dhg {verb} --help` lists them")
        if option.metavar is None:
            if equals:
                raise UsageError(f"{name} takes no value")
            value = ""
        elif not equals:
            if at == len(argv):
                raise UsageError(f"{name} needs a value: {name} {option.metavar}")
            value = argv[at]
            at += 1
        if not value and option.metavar is not None and not option.empty:
            # A variable of a shell's that is not set. As if the option were not there, `--host ""` would run the script here.
            raise UsageError(f"{name} needs a value that is not empty: {name} {option.metavar}")
        values.add(option, value)
    return values


def help_text(usage: str, options: list[Option], more: str) -> str:
    """A verb's help: usage, the options in two columns, and `more`."""
    lines = [usage.rstrip(), "", "options:"]
    for option in options:
        if not option.help:
            continue
        left = ", ".join(option.names) + (f" {option.metavar}" if option.metavar else "")
        lines.append(f"  {left:<22} {option.help}" if len(left) <= 22 else f"  {left}\n{'':25}{option.help}")
    return "\n".join([*lines, "", more.strip()]) + "\n"


def positive_number(name: str, text: str) -> float:
    """A number above zero. Raises `UsageError`."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise UsageError(f"{name} takes a number above 0, not {text!r}")
    return number


def positive_integer(name: str, text: str) -> int:
    """A whole number above zero. Raises `UsageError`."""
    # Not more digits than Python is willing to convert.
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 1000 else 0
    if number == 0:
        raise UsageError(f"{name} takes a whole number above 0, not {text!r}")
    return number
