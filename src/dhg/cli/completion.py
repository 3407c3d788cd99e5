"""`dhg completion SHELL`: prints a completion script, made of the same option tables that the verbs read."""

from __future__ import annotations

import sys

from ..errors import UsageError
from . import doctor, exec_, vm
from .options import Option, help_text, parse

HELP = [Option("-h, --help", None, "show this help")]

MORE = """\
bash:  dhg completion bash > ~/.local/share/bash-completion/completions/dhg
zsh:   dhg completion zsh > "${fpath[1]}/_dhg"
fish:  dhg completion fish > ~/.config/fish/completions/dhg.fish
"""

#: Every command with its options; a command of two words is a verb of `dhg vm`.
COMMANDS: dict[str, list[Option]] = {
    "exec": exec_.OPTIONS,
    "vm prepare": vm.PREPARE,
    "vm status": vm.STATUS,
    "vm verify": vm.VERIFY,
    "vm clean": vm.CLEAN,
    "doctor": doctor.OPTIONS,
    "completion": HELP,
}
SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# bash completion for dhg; made by `dhg completion bash`
_dhg() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} verb=${{COMP_WORDS[1]}} words
  [[ $verb == vm && $COMP_CWORD -gt 2 ]] && verb="vm ${{COMP_WORDS[2]}}"
  case "$COMP_CWORD:$verb" in
    1:*) words="{verbs}" ;;
    2:vm) words="{vm_verbs}" ;;
    2:completion) words="{shells}" ;;
{cases}
  esac
  if [[ $verb == exec && $cur != -* ]]; then
    COMPREPLY=($(compgen -f -- "$cur"))
  else
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
  fi
}}
complete -o filenames -F _dhg dhg
"""

_ZSH = """\
#compdef dhg
# zsh completion for dhg; made by `dhg completion zsh`
_dhg() {{
  local verb=$words[2]
  if (( CURRENT == 2 )); then compadd -- {verbs}; return; fi
  if [[ $verb == vm ]]; then
    if (( CURRENT == 3 )); then compadd -- {vm_verbs}; return; fi
    verb="vm $words[3]"
  fi
  case $verb in
{cases}
    completion) compadd -- {shells} ;;
  esac
  [[ $verb == exec && $PREFIX != -* ]] && _files
}}
_dhg "$@"
"""


def main(argv: list[str]) -> int:
    """Run `dhg completion SHELL`; the exit code. Raises `UsageError`."""
    values = parse(argv, HELP, verb="completion")
    if values.flag("help"):
        sys.stdout.write(help_text(f"usage: dhg completion {'|'.join(SHELLS)}", HELP, MORE))
        return 0
    if len(values.rest) != 1 or values.rest[0] not in SHELLS:
        raise UsageError("which shell?", hint=f"dhg completion {'|'.join(SHELLS)}")
    sys.stdout.write({"bash": bash, "zsh": zsh, "fish": fish}[values.rest[0]]())
    return 0


def _names(options: list[Option]) -> str:
    return " ".join(name for option in options for name in option.names)


def _verbs() -> dict[str, str]:
    return {
        "verbs": " ".join(dict.fromkeys(name.split()[0] for name in COMMANDS)),
        "vm_verbs": " ".join(name.split()[1] for name in COMMANDS if " " in name),
        "shells": " ".join(SHELLS),
    }


def bash() -> str:
    """The script for bash."""
    cases = "\n".join(f'    *:"{name}") words="{_names(options)}" ;;' for name, options in COMMANDS.items())
    return _BASH.format(cases=cases, **_verbs())


def zsh() -> str:
    """The script for zsh."""
    cases = "\n".join(f'    "{name}") compadd -- {_names(options)} ;;' for name, options in COMMANDS.items())
    return _ZSH.format(cases=cases, **_verbs())


def fish() -> str:
    """The script for fish."""
    words = _verbs()
    top = "__fish_use_subcommand"
    lines = ["# fish completion for dhg; made by `dhg completion fish`"]
    lines.append(f"complete -c dhg -f -n {top} -a '{words['verbs']}'")
    lines.append(f"complete -c dhg -f -n '__fish_seen_subcommand_from vm' -a '{words['vm_verbs']}'")
    lines.append(f"complete -c dhg -f -n '__fish_seen_subcommand_from completion' -a '{words['shells']}'")
    for command, options in COMMANDS.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.split())
        for option in options:
            line = f"complete -c dhg -n '{seen}'"
            for name in option.names:
                line += f" -l {name[2:]}" if name[:2] == "--" else f" -s {name[1:]}"
            line += " -r" if option.metavar else ""
            text = option.help.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(line + (f" -d '{text}'" if text else ""))
    return "\n".join(lines) + "\n"
