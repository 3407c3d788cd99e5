"""The class path that formulas are compiled against: few archives instead of several hundred.

Deephaven compiles each formula with javac, which asks every jar of the class path for every package, and opens all of them
anew to look for plugins: a third of what a compilation costs. So the image has one more jar, with the classes of all jars but the
largest, and a file that names it and those. The classes that run come from the jars themselves.
"""

from __future__ import annotations

import os
import re
import zipfile
from typing import NamedTuple

#: Where both are in the image; guest/jvm.py names the second, too.
JAR = "usr/local/lib/dhg/compile.jar"
LIST = "usr/local/lib/dhg/compile.path"
#: So many of the largest jars stay by themselves: of the 370 they hold two thirds of the bytes. None of Deephaven's own, which every
#: formula imports from.
APART = 40
OWN = "deephaven-"
#: The release whose classes a jar with several (JEP 238) shows to the guest's compiler.
RELEASE = 17
_VERSIONED = re.compile(r"META-INF/versions/([0-9]+)/(.+)")
#: A time of zip's, in an archive that does not depend on when it is made.
_TIME = (1980, 1, 1, 0, 0, 0)

#: What the result depends on beside the jars, for the stage's key.
INPUTS = (JAR, LIST, str(APART), OWN, str(RELEASE))


class _Jar(NamedTuple):
    path: str
    size: int
    #: By the name of the class's file: the entry that has it.
    classes: dict[str, str]


def _read(path: str) -> _Jar:
    found: dict[str, tuple[int, str]] = {}
    size = 0
    with zipfile.ZipFile(path) as jar:
        try:
            several = b"multi-release: true" in jar.read("META-INF/MANIFEST.MF").lower()
        except KeyError:
            several = False
        for entry in jar.infolist():
            name, release = entry.filename, 0
            if match := _VERSIONED.match(name):
                release, name = int(match[1]), match[2]
                if not several or release > RELEASE:
                    continue
            if (
                name.endswith(".class")
                and not name.startswith("META-INF/")
                and os.path.basename(name) != "module-info.class"
            ):
                size += entry.file_size
                found[name] = max(found.get(name, (-1, "")), (release, entry.filename))
    return _Jar(path, size, {name: entry for name, (_, entry) in found.items()})


def make(tree: str, jars: str) -> None:
    """Write both files into `tree` for the jars in its directory `jars` (a path in the guest), taken in the order of their names.

    Nothing where a release of Deephaven has its jars elsewhere.
    """
    if not os.path.isdir(tree + jars):
        return
    read = [_read(f"{tree}{jars}/{name}") for name in sorted(os.listdir(tree + jars)) if name.endswith(".jar")]
    others = [jar for jar in read if not os.path.basename(jar.path).startswith(OWN)]
    apart = {jar.path for jar in sorted(others, key=lambda jar: -jar.size)[:APART]}
    seen: set[str] = set()
    os.makedirs(os.path.dirname(f"{tree}/{JAR}"), exist_ok=True)
    # Not compressed: what is read often is inflated often.
    with zipfile.ZipFile(f"{tree}/{JAR}", "w", zipfile.ZIP_STORED) as merged:
        for jar in read:
            mine = [name for name in jar.classes if name not in seen]
            seen.update(mine)
            if jar.path not in apart:
                with zipfile.ZipFile(jar.path) as source:
                    for name in mine:
                        merged.writestr(zipfile.ZipInfo(name, _TIME), source.read(jar.classes[name]))
    path = [f"/{JAR}", *(jar.path.removeprefix(tree) for jar in read if jar.path in apart)]
    with open(f"{tree}/{LIST}", "w") as file:
        file.write("\n".join(path) + "\n")
