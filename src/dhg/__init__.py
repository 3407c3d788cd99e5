"""dhg: runs a Deephaven script in a microVM of its own, restored from a warm snapshot."""

__all__ = ["__version__"]

__version__ = "0.1.0"
