"""Makes the archive of classes of an image (class data sharing): runs natively in the image's tree, when the image is made.

Loading and checking classes is most of what a JVM's start and a query's first run are, and dear under emulation. A JVM that finds a
class in an archive maps it. What was loaded in this process when it ends is in the archive, so it does much, each once.

Guest code: standard library and Deephaven only. Usage: training.py ARCHIVE HEAP_MIB; prints a line for whatever did not work.
"""

from __future__ import annotations

import ast
import os
import sys
from typing import Any

from . import jvm, preview, queries


def run(source: str, names: dict[str, Any]) -> list[str]:
    """Run each statement of a script by itself, and preview what tables it leaves; what did not work."""
    failed = []
    for node in ast.parse(source).body:
        try:
            exec(compile(ast.Module([node], []), "<training>", "exec"), names)
        except Exception as error:
            text = " ".join(str(error).split())
            failed.append(f"line {node.lineno}: {type(error).__name__}: {text[:200]}")
    return failed


def main(archive: str, heap_mib: str) -> None:
    """Train, and end the JVM, which writes the archive."""
    args = [f"-Xmx{heap_mib}m", *jvm.JVM_ARGS, *jvm.JVM_ARGS_VM, f"-XX:ArchiveClassesAtExit={archive}"]
    # It names each of a thousand classes that it leaves out, generated ones and those of a time before Java 6.
    jvm.start_server(lambda text: None, [*args, "-Xlog:cds=off", "-Xlog:cds+dynamic=off"], image=True)
    finder = preview.Finder()
    for name, source in (*queries.WARM_UP.items(), ("training", queries.TRAINING)):
        names: dict[str, Any] = {"__name__": "__main__", "turn": 1}
        for line in run(source, names):
            print(f"{name}: {line}", file=sys.stderr)
        for _ in finder.texts_and_data(names, 10, True, True):
            pass
    sys.stderr.flush()
    import jpy

    # A regular end, unlike os._exit: only at that the archive is written.
    jpy.get_type("java.lang.System").exit(0)


if __name__ == "__main__":
    os.chdir("/tmp")
    main(*sys.argv[1:])
