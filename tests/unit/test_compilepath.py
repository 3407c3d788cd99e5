"""The index of the class path that formulas are compiled against, made of real jars."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from dhg.image import compilepath

JARS = "/jars"


def jar(tree: Path, name: str, entries: list[str], *, manifest: str = "") -> None:
    with zipfile.ZipFile(tree / "jars" / name, "w", zipfile.ZIP_DEFLATED) as file:
        if manifest:
            file.writestr("META-INF/MANIFEST.MF", manifest)
        for path in entries:
            file.writestr(path, b"bytes")


def made(tree: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The jars that the index names, and by package the classes, each with its jar's name before it."""
    compilepath.make(str(tree), JARS)
    head, _, rest = (tree / compilepath.INDEX).read_text().partition("\n\n")
    jars = head.split("\n")
    found: dict[str, list[str]] = {}
    for line in rest.splitlines():
        package, *fields = line.split("\t")
        for field in fields:
            if field.startswith("#"):
                current = jars[int(field[1:])]
            else:
                found.setdefault(package, []).append(f"{current.removeprefix(JARS + '/')} {field}")
    return jars, found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "jars").mkdir()
    return tmp_path


def test_classes_by_package_and_nothing_else(tree: Path) -> None:
    jar(
        tree,
        "b.jar",
        ["p/q/B.class", "p/B.class", "p/B$Inner.class", "p/notes.txt", "META-INF/services/S", "module-info.class"],
    )
    jar(tree, "a.jar", ["p/A.class", "A.class", "p/package-info.class", "META-INF/A.class"])
    (tree / "jars" / "directives.txt").write_text("no jar")
    jars, found = made(tree)
    assert jars == [f"{JARS}/a.jar", f"{JARS}/b.jar"]
    assert found == {
        "": ["a.jar A"],
        "p": ["a.jar A", "a.jar package-info", "b.jar B", "b.jar B$Inner"],
        "p.q": ["b.jar B"],
    }


def test_of_two_classes_the_first_jars_counts(tree: Path) -> None:
    jar(tree, "a.jar", ["p/X.class", "X.class"])
    jar(tree, "b.jar", ["p/X.class", "p/Y.class", "Y.class", "X.class"])
    jar(tree, "c.jar", ["p/X.class", "p/Y.class", "p/V.class"])
    assert made(tree)[1] == {"": ["a.jar X", "b.jar Y"], "p": ["a.jar X", "b.jar Y", "c.jar V"]}


def test_of_several_releases_what_the_guests_java_has(tree: Path) -> None:
    versions = ["q/X.class", "META-INF/versions/9/q/X.class", "META-INF/versions/11/q/New.class"]
    versions += ["META-INF/versions/21/q/Later.class", "META-INF/versions/9/module-info.class"]
    jar(tree, "many.jar", versions, manifest="Manifest-Version: 1.0\r\nMulti-Release: true\r\n")
    jar(tree, "one.jar", ["r/X.class", "META-INF/versions/9/r/New.class"])
    assert made(tree)[1] == {"q": ["many.jar New", "many.jar X"], "r": ["one.jar X"]}


def test_no_jars_no_index(tmp_path: Path) -> None:
    compilepath.make(str(tmp_path), JARS)
    assert not (tmp_path / compilepath.INDEX).exists()
