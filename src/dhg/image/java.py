"""Our own Java classes in a root image: one jar, compiled by the image's own JVM, natively, in its tree.

In the guest, prepare would compile them under emulation.
"""

from __future__ import annotations

import os
import zipfile

from ..files import remove_tree
from .tree import run

#: Where the jar is in the image; guest/jvm.py names it, too.
JAR = "usr/local/lib/dhg/guest.jar"
_WORK = "dhg-java"
_JAVA_HOME = "/usr/lib/jvm/java-17-openjdk-amd64"
_JAVAC = (
    # Without /proc the loader does not know where the program is, beside which its libraries are.
    "/usr/bin/env",
    f"LD_LIBRARY_PATH={_JAVA_HOME}/lib",
    f"{_JAVA_HOME}/bin/java",
    "-XX:TieredStopAtLevel=1",
    "-m",
    "jdk.compiler/com.sun.tools.javac.Main",
    # Unsafe, which Cells.java needs, is not to be used, and javac cannot be told that we know.
    "-nowarn",
    "-XDignore.symbol.file",
    "-proc:none",
    # What FormulaCompiler.java is made of; guest/jvm.py names it, too.
    "-cp",
    "/usr/share/java/eclipse-jdt-core.jar",
)


def _sources() -> dict[str, bytes]:
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "guest")
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".java"):
            with open(f"{folder}/{name}", "rb") as file:
                found[name] = file.read()
    return found


def inputs() -> tuple[str, ...]:
    """What the jar is made of, for the stage's key."""
    return (JAR, *_JAVAC, *(f"{name}\n{data.decode()}" for name, data in _sources().items()))


def make(tree: str, log: str, *, mounts: bool) -> None:
    """Write the jar into `tree`. Raises `proc.CommandFailed` if a source does not compile. For `mounts` see `tree.run`."""
    work = f"{tree}/{_WORK}"
    os.makedirs(f"{work}/classes")
    try:
        sources = _sources()
        for name, data in sources.items():
            with open(f"{work}/{name}", "wb") as file:
                file.write(data)
        argv = [*_JAVAC, "-d", f"/{_WORK}/classes", *(f"/{_WORK}/{name}" for name in sources)]
        run(tree, argv, mounts=mounts, timeout_s=300, log=log)
        os.makedirs(os.path.dirname(f"{tree}/{JAR}"), exist_ok=True)
        with zipfile.ZipFile(f"{tree}/{JAR}", "w") as jar:
            for name in sorted(os.listdir(f"{work}/classes")):
                with open(f"{work}/classes/{name}", "rb") as file:
                    # A time of zip's: the archive does not depend on when it is made.
                    jar.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), file.read())
    finally:
        remove_tree(work)
