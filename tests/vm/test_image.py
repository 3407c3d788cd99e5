"""What image and warm-up bring along so that a script need not do it: bytecode, classes, a compiler that has read them."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

from tests.conftest import run_dhg

from dhg.image import build, java


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
    # Of another project's jar, of one of Deephaven's own, of the JDK; and one that is not there.
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


COMPILE = """
import jpy
reusing = jpy.get_type("ReusingCompiler")
context = jpy.get_type("io.deephaven.engine.context.ExecutionContext").getContext()
compiler = context.getQueryCompiler()

def value(body):
    request = jpy.get_type("io.deephaven.engine.context.QueryCompilerRequest").builder().description("a test").className("Made")
    request = request.classBody("public class Made { %s }" % body).packageNameRoot("io.deephaven.temp").build()
    return compiler.compile(request)

before = list(reusing.counts())
def since():
    return [now - then for now, then in zip(reusing.counts(), before)]
"""


def test_formulas_are_compiled_by_one_compiler() -> None:
    code = """
from deephaven import empty_table
for number in range(3):
    t = empty_table(10).update(f"x = i * {number} + 41")
    assert t.j_table.getColumnSource("x").getInt(1) == number + 41
print(since())
"""
    assert output(COMPILE + code) == b"[3, 3, 0]\n"


def test_the_compiler_goes_on_after_an_error() -> None:
    # The classes have one name, and other bodies; each error is in the source, and none is left to another compiler.
    code = """
print(value("public static int n = 1;").getSimpleName())
for body in "int n = nothing;", "int n = ;", "java.util.NoSuchThing n;", "int f() { }":
    try:
        value(body)
    except Exception as error:
        print("error:" in str(error) or "cannot find" in str(error) or "missing" in str(error) or "illegal" in str(error))
print(value("public static java.util.List<String> n = java.util.List.of();").getSimpleName())
print(value("class Inner { Made outer = Made.this; } public static int n = 2;").getSimpleName())
print(since())
"""
    assert output(COMPILE + code) == b"Made\n" + b"True\n" * 4 + b"Made\nMade\n[7, 7, 0]\n"


def test_many_formulas_at_once() -> None:
    # More than one task's worth (32), in one call.
    code = """
from deephaven import empty_table
t = empty_table(2).update([f"c{n} = i + {n}" for n in range(40)])
print(t.j_table.getColumnSource("c39").getInt(1), since()[2])
"""
    assert output(COMPILE + code) == b"40 0\n"


def test_methods_are_compiled_late_under_emulation() -> None:
    code = """
import jpy
with open("/proc/cmdline") as file:
    emulated = "dhg.accel=tcg" in file.read().split()
kind = jpy.get_type("com.sun.management.HotSpotDiagnosticMXBean")
options = jpy.get_type("java.lang.management.ManagementFactory").getPlatformMXBean(kind.jclass)
found = jpy.cast(options, kind).getVMOption("Tier3InvocationThreshold").getValue()
print(found == ("2000" if emulated else "200"))
"""
    assert output(code) == b"True\n"


def test_our_java_compiles_where_nothing_can_be_mounted(tmp_path: Path) -> None:
    tree, log = tmp_path / "tree", str(tmp_path / "log")
    tree.mkdir()
    root = f"{build.base_system(log)}/root.tar"
    unpack = ["tar", "-xf", root, "-C", str(tree), "--no-same-owner", "--exclude=./dev/*"]
    subprocess.run(unpack, check=True, timeout=120)
    java.make(str(tree), log, mounts=False)
    with zipfile.ZipFile(tree / java.JAR) as jar:
        assert {"Cells.class", "ClassIndex.class", "FormulaFiles.class", "ReusingCompiler.class"} <= set(jar.namelist())
