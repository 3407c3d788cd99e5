"""`dhg doctor`."""

from __future__ import annotations

import json
import sys

from ..errors import UsageError
from .options import Option, help_text, parse

OPTIONS = [
    Option("--fix", None, "remove leftovers, as `dhg vm clean` does"),
    Option("--json", None, "one JSON object"),
    Option("--debug", None, "show Python tracebacks of dhg's own errors"),
    Option("-h, --help", None, "show this help"),
]

MORE = """\
Exit code 1 if `dhg exec --vm` cannot work with the snapshot that it takes by itself, or that DHG_VERSION and DHG_ENGINE name.
A `note` is something that it can do without."""


def main(argv: list[str]) -> int:
    """Run `dhg doctor`; the exit code."""
    values = parse(argv, OPTIONS, verb="doctor")
    if values.flag("help"):
        sys.stdout.write(help_text("usage: dhg doctor [options]", OPTIONS, MORE))
        return 0
    if values.rest:
        raise UsageError(f"unexpected argument: {values.rest[0]}", hint="see `dhg doctor --help`")
    from .. import doctor

    removed = doctor.fix() if values.flag("fix") else []
    findings = doctor.examine()
    good = all(finding.level != "bad" for finding in findings)
    if values.flag("json"):
        print(
            json.dumps(
                {"ok": good, "removed": removed, "findings": [finding._asdict() for finding in findings]}, indent=2
            )
        )
        return 0 if good else 1
    for path in removed:
        print(f"removed {path}")
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.level:<4}  {finding.name:<{width}}  {finding.text}")
        if finding.remedy and finding.level != "ok":
            print(f"{'':<4}  {'':<{width}}  -> {finding.remedy}")
    print("`dhg exec --vm` can work" if good else "`dhg exec --vm` cannot work")
    return 0 if good else 1
