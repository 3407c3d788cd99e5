"""What runs inside the VM. Stand-alone: standard library and Deephaven only; the host merely packs these files."""
