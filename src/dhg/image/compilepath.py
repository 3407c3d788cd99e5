"""The index of the class path that formulas are compiled against.

Deephaven compiles each formula with javac, which opens every jar of the class path, several hundred, and keeps an object for each
of a hundred thousand entries. So the image has a file that says which package has which classes, and in which jar
(guest/ClassIndex.java, where its format is).
"""

from __future__ import annotations

import os
import re
import zipfile

#: Where it is in the image; guest/jvm.py names it, too.
INDEX = "usr/local/lib/dhg/classes.index"
#: The release whose classes a jar with several (JEP 238) shows to the guest's compiler.
RELEASE = 17
_VERSIONED = re.compile(r"META-INF/versions/([0-9]+)/(.+)")

#: What the result depends on beside the jars, for the stage's key. The number is the format's.
INPUTS = (INDEX, str(RELEASE), "1")


def _classes(path: str) -> list[str]:
    """The class files in a jar, by the names that its JVM knows them by."""
    found: set[str] = set()
    with zipfile.ZipFile(path) as jar:
        try:
            several = b"multi-release: true" in jar.read("META-INF/MANIFEST.MF").lower()
        except KeyError:
            several = False
        for entry in jar.infolist():
            name = entry.filename
            if match := _VERSIONED.match(name):
                name = match[2]
                if not several or int(match[1]) > RELEASE:
                    continue
            base = os.path.basename(name)
            # A name that the format has another meaning for is no Java class's.
            odd = base.startswith("#") or any(char in name for char in "\t\n")
            if base.endswith(".class") and not name.startswith("META-INF/") and base != "module-info.class" and not odd:
                found.add(name.removesuffix(".class"))
    return sorted(found)


def make(tree: str, jars: str) -> None:
    """Write the index into `tree` for the jars in its directory `jars` (a path in the guest), taken in the order of their names.

    Nothing where a release of Deephaven has its jars elsewhere.
    """
    if not os.path.isdir(tree + jars):
        return
    paths = [f"{jars}/{name}" for name in sorted(os.listdir(tree + jars)) if name.endswith(".jar")]
    packages: dict[str, list[str]] = {}
    seen: set[str] = set()
    for number, path in enumerate(paths):
        last = None
        for name in _classes(tree + path):
            if name not in seen:
                seen.add(name)
                folder, base = os.path.split(name)
                fields = packages.setdefault(folder.replace("/", "."), [])
                if folder != last:
                    fields.append(f"#{number}")
                fields.append(base)
                last = folder
    os.makedirs(os.path.dirname(f"{tree}/{INDEX}"), exist_ok=True)
    with open(f"{tree}/{INDEX}", "w", encoding="utf-8") as file:
        file.writelines(f"{path}\n" for path in paths)
        file.write("\n")
        file.writelines("\t".join([name, *fields]) + "\n" for name, fields in sorted(packages.items()))
