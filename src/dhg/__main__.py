"""`python -m dhg`."""

from .cli import run

run()
