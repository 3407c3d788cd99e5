"""What image and warm-up bring along so that a script need not do it: bytecode, classes, a compiler that has read them."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from tests.conftest import run_dhg

from dhg import machine, proc
from dhg.engine import qmp
from dhg.guest import tlb
from dhg.image import build, java
from dhg.wire import client


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
formulas = jpy.get_type("FormulaCompiler")
context = jpy.get_type("io.deephaven.engine.context.ExecutionContext").getContext()
compiler = context.getQueryCompiler()

def value(body):
    request = jpy.get_type("io.deephaven.engine.context.QueryCompilerRequest").builder().description("a test").className("Made")
    request = request.classBody("public class Made { %s }" % body).packageNameRoot("io.deephaven.temp").build()
    return compiler.compile(request)

before = list(formulas.counts())
def since():
    # What was compiled, what of it by a compiler that was there, and what by javac.
    return [now - then for now, then in zip(formulas.counts(), before)]
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


def test_what_does_not_compile_is_javacs_to_tell() -> None:
    # The classes have one name, and other bodies. A compiler that has met an error is not used again.
    code = """
print(value("public static int n = 1;").getSimpleName())
for body in "int n = nothing;", "int n = ;", "java.util.NoSuchThing n;", "int f() { }":
    try:
        value(body)
    except Exception as error:
        # In javac's words: ECJ says "cannot be resolved", and "Syntax error".
        words = "cannot find symbol", "illegal start of expression", "class NoSuchThing", "missing return statement"
        print(any(word in str(error) for word in words))
print(value("public static java.util.List<String> n = java.util.List.of();").getSimpleName())
print(value("class Inner { Made outer = Made.this; } public static int n = 2;").getSimpleName())
print(since())
"""
    assert output(COMPILE + code) == b"Made\n" + b"True\n" * 4 + b"Made\nMade\n[3, 2, 4]\n"


def test_classes_are_what_javac_would_have_made() -> None:
    # Lambdas, inner classes with access to what is private, strings, and the lines that stack traces name.
    code = """
made = value('''
    public static int line() { return new Throwable().getStackTrace()[0].getLineNumber(); }
    private int hidden = 3;
    class Inner { int get() { return hidden; } }
    public static String all() {
        StringBuilder text = new StringBuilder();
        java.util.List.of(1, 2, 3).stream().map(n -> n * 2).filter(n -> n > 2).forEach(n -> text.append(n).append(' '));
        switch (text.length()) { case 4: text.append("four"); break; default: text.append("other"); }
        return text + "" + new Made().new Inner().get();
    }
''')
def call(name):
    return made.getMethod(name, jpy.array("java.lang.Class", 0)).invoke(None, jpy.array("java.lang.Object", 0))
print(int(str(call("line"))) > 1, call("all"), since()[2])
"""
    assert output(COMPILE + code) == b"True 4 6 four3 0\n"


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
for name, late, usual in ("Tier3InvocationThreshold", "10000", "200"), ("TieredStopAtLevel", "1", "4"):
    print(jpy.cast(options, kind).getVMOption(name).getValue() == (late if emulated else usual))
"""
    assert output(code) == b"True\nTrue\n"


def test_rows_go_through_code_of_c2() -> None:
    # Under emulation, where C2 does not run in a clone: what it has compiled is there, and whatever goes through it later, it
    # guessed nothing that is wrong then. That would be a deoptimization a row, which takes hundreds of times as long.
    code = """
import jpy, time
from deephaven import empty_table
with open("/proc/cmdline") as file:
    emulated = "dhg.accel=tcg" in file.read().split()
server = jpy.get_type("java.lang.management.ManagementFactory").getPlatformMBeanServer()
name = jpy.get_type("javax.management.ObjectName")("com.sun.management:type=DiagnosticCommand")
# "ID LEVEL STATE CLASS.METHOD(...)": level 4 is C2.
lines = [line.split() for line in str(server.invoke(name, "compilerCodelist", None, None)).splitlines()]
print(not emulated or any(line[1:3] == ["4", "0"] and "forEachRowKey" in line[3] for line in lines))

def took(formula):
    # Compiled before.
    empty_table(5).update(formula)
    begin = time.monotonic()
    empty_table(100_000).update(formula)
    return time.monotonic() - begin

usual = took("x = i")
for formula in "y = i * 3 + 1", "y = ii * 0.25", "y = `a` + i", "y = i % 2 == 0":
    print(took(formula) < 30 * usual, end=" ")
"""
    assert output(code) == b"True\nTrue True True True "


def tlb_flushes(code: str) -> int | None:
    """How often QEMU's TLB was flushed whole while a script ran; None where there is none, without emulation."""
    where = b"print('dhg.accel=tcg' in open('/proc/cmdline').read().split())\n"
    out: list[bytes] = []
    ask = {"execute": "human-monitor-command", "arguments": {"command-line": "info jit"}, "id": "jit"}
    with machine.restore(engine="qemu") as vm:
        outcome = vm.run(
            client.Request(where + code.encode(), flags=0), stdout=out.append, stderr=out.append, shares=()
        )
        assert outcome.exit_code == 0, out
        assert isinstance(vm.vm, qmp.Vm)
        vm.vm.qmp.send(json.dumps(ask).encode() + b"\n")
        told = json.loads(vm.vm.qmp.wait_for(b'"id": "jit"', deadline=proc.Deadline(20)))["return"]
    return sum(map(int, re.findall(r"TLB (?:full|partial) flushes +(\d+)", told))) if out[0] == b"True\n" else None


def test_qemus_tlb_grows_at_the_first_query() -> None:
    query = "from deephaven import empty_table\nempty_table(1).update('x = i')\n"
    # Taking away the pages flushes once, too.
    off = "import sys\nsys.modules['dhg.guest.warmup']._Frames.first = None\n"
    # The fewest of three: other threads have flushes of their own, now and then.
    counts = [[tlb_flushes(code) for _ in range(3)] for code in (off + query, query, query * 2)]
    without, one, two = (min((count for count in row if count is not None), default=None) for row in counts)
    if without is None or one is None or two is None:
        pytest.skip("the snapshot is a KVM one: QEMU translates nothing")
    assert one - without >= tlb.TIMES - 1
    # Only once.
    assert two - one < tlb.TIMES - 1


def test_the_kernel_keeps_no_files_for_tracing() -> None:
    code = """
with open("/proc/slabinfo") as file:
    print(next(line.split()[1] for line in file if line.startswith("inode_cache ")))
"""
    # With them there were 10,000.
    assert int(output(code)) < 5_000


def test_what_the_rehearsal_left_in_eden_is_not_in_the_snapshot() -> None:
    code = """
import json, re
import jpy
java = jpy.get_type
server = java("java.lang.management.ManagementFactory").getPlatformMBeanServer()
name = java("javax.management.ObjectName")("com.sun.management:type=DiagnosticCommand")
text = str(server.invoke(name, "gcHeapInfo", None, None))
begin, end = (int(at, 16) for at in re.search(r"eden space .*?\\[(0x\\w+), *0x\\w+, *(0x\\w+)\\)", text).groups())
with open("/proc/self/mem", "rb", buffering=0) as memory:
    memory.seek(begin)
    data = memory.read(end - begin)
print(json.dumps([len(data), sum(any(data[at : at + 4096]) for at in range(0, len(data), 4096)) * 4096]))
"""
    size, used = json.loads(output(code))
    # Without it there were 37 of 101 MB. This script uses some, too.
    assert used < size / 8


def test_our_java_compiles_where_nothing_can_be_mounted(tmp_path: Path) -> None:
    tree, log = tmp_path / "tree", str(tmp_path / "log")
    tree.mkdir()
    root = f"{build.base_system(log)}/root.tar"
    unpack = ["tar", "-xf", root, "-C", str(tree), "--no-same-owner", "--exclude=./dev/*"]
    subprocess.run(unpack, check=True, timeout=120)
    java.make(str(tree), log, mounts=False)
    with zipfile.ZipFile(tree / java.JAR) as jar:
        assert {"Cells.class", "ClassIndex.class", "FormulaCompiler.class", "FormulaNames.class"} <= set(jar.namelist())
