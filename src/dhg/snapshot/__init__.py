"""Snapshots: where they are, what is in them, how they are made."""
