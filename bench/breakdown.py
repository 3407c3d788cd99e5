"""Where the milliseconds of a hello go, by phase: as text, and as a flame-like picture (bench/hello.svg)."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Sequence

#: The phases that `--verbose` shows, in order, by what they are part of.
GROUPS = {
    "client": ("interpreter start", "client", "spawn"),
    "QEMU start": ("VMM start",),
    "load": ("state load",),
    "wake-up": ("wake-up", "guest ready"),
    "script": ("script",),
    "result": ("result", "close"),
}
COLOURS = {
    "client": "#4e79a7",
    "QEMU start": "#f28e2b",
    "load": "#e15759",
    "wake-up": "#76b7b2",
    "script": "#59a14f",
    "result": "#b07aa1",
}


def phases(argv: Sequence[str], *, runs: int, timeout_s: float) -> dict[str, float]:
    """The median of each phase in ms over `runs` runs of `argv`, a `dhg exec --verbose`."""
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=True, text=True
        )
        for line in done.stderr.splitlines():
            if line.startswith("dhg: ") and line.endswith(" ms"):
                name, value = line[5:-3].rsplit(maxsplit=1)
                found.setdefault(name, []).append(float(value))
    return {name: statistics.median(values) for name, values in found.items()}


def text(found: dict[str, float]) -> str:
    """A bar for each phase."""
    total = sum(found.get(name, 0.0) for names in GROUPS.values() for name in names)
    lines = []
    for group, names in GROUPS.items():
        for name in names:
            value = found.get(name, 0.0)
            lines.append(f"{group:<11} {name:<18} {value:6.1f} ms  {'#' * round(60 * value / total)}".rstrip())
    return "\n".join([*lines, f"{'total':<30} {total:6.1f} ms"])


def svg(found: dict[str, float], *, width: int = 1000) -> str:
    """The same as a picture: the whole run, below it the groups, below those the phases, left to right in time."""
    total = sum(found.get(name, 0.0) for names in GROUPS.values() for name in names)
    parts = []

    def box(row: int, at: float, size: float, colour: str, label: str) -> None:
        x, w = at / total * width, size / total * width
        title = f"{label}: {size:.1f} ms"
        parts.append(
            f'<g><title>{title}</title><rect x="{x:.1f}" y="{row * 34}" width="{max(w - 1, 0.5):.1f}" height="32" rx="2" '
            f'fill="{colour}"/>'
        )
        if w > 6.5 * len(label):
            parts.append(f'<text x="{x + 4:.1f}" y="{row * 34 + 14}">{label}</text>')
            parts.append(f'<text x="{x + 4:.1f}" y="{row * 34 + 28}">{size:.1f} ms</text>')
        parts.append("</g>")

    box(0, 0.0, total, "#bab0ac", "dhg exec --vm -c print")
    at = 0.0
    for group, names in GROUPS.items():
        box(1, at, sum(found.get(name, 0.0) for name in names), COLOURS[group], group)
        for name in names:
            box(2, at, found.get(name, 0.0), COLOURS[group], name)
            at += found.get(name, 0.0)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 102" font-family="sans-serif" font-size="11">'
    return "\n".join([head, *parts, "</svg>"]) + "\n"
