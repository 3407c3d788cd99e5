"""What the image brings along so that a script need not do it: bytecode, an archive of classes, few archives to compile against."""

from __future__ import annotations

from tests.conftest import run_dhg


def output(code: str) -> bytes:
    done = run_dhg("exec", "--vm", "--no-show-tables", "-c", code)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_modules_are_compiled_beforehand() -> None:
    code = """
import importlib, os
for name in "colorsys", "wave", "pandas.io.sas", "pyarrow.benchmark", "deephaven.plot":
    module = importlib.import_module(name)
    with open(module.__cached__, "rb") as file:
        assert file.read(8)[4:] == bytes([1, 0, 0, 0]), name
new = [place for place, _, names in os.walk("/usr") for name in names
       if name.endswith(".pyc") and os.stat(os.path.join(place, name)).st_mtime]
print(len(new))
"""
    assert output(code) == b"0\n"


def test_classes_come_out_of_the_archive() -> None:
    code = """
with open("/proc/self/maps") as file:
    print(sum("/usr/local/lib/dhg/classes.jsa" in line for line in file) > 0)
"""
    assert output(code) == b"True\n"


def test_formulas_may_use_any_class_of_the_class_path() -> None:
    # One of a jar that stays apart, one of those that were merged, one of the JDK, one that is not there.
    code = """
from deephaven import DHError, empty_table
t = empty_table(3).update([
    "a = it.unimi.dsi.fastutil.HashCommon.nextPowerOfTwo(i + 5)",
    "b = io.deephaven.base.MathUtil.ceilLog2(i + 5)",
    "c = java.util.Objects.hash(i)",
])
print(t.size, t.sum_by().j_table.getColumnSource("a").getLong(0))
try:
    t.update("d = org.example.Missing.of(i)")
except DHError:
    print("missing")
"""
    assert output(code) == b"3 24\nmissing\n"
