"""The jar that formulas are compiled against, made of real jars."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from dhg.image import compilepath

JARS = "/jars"


def jar(tree: Path, name: str, entries: dict[str, bytes], *, manifest: str = "") -> None:
    with zipfile.ZipFile(tree / "jars" / name, "w", zipfile.ZIP_DEFLATED) as file:
        if manifest:
            file.writestr("META-INF/MANIFEST.MF", manifest)
        for path, data in entries.items():
            file.writestr(path, data)


def made(tree: Path) -> tuple[list[str], dict[str, bytes]]:
    """The names in the list, and the merged jar's entries."""
    compilepath.make(str(tree), JARS)
    with zipfile.ZipFile(tree / compilepath.JAR) as file:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())
        found = {entry.filename: file.read(entry) for entry in file.infolist()}
    return (tree / compilepath.LIST).read_text().split(), found


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "jars").mkdir()
    monkeypatch.setattr(compilepath, "APART", 1)
    return tmp_path


def test_the_largest_stay_apart_and_the_rest_is_one(tree: Path) -> None:
    jar(tree, "big.jar", {"big/A.class": b"x" * 5000})
    jar(tree, "deephaven-engine.jar", {"engine/B.class": b"y" * 9000})
    jar(tree, "small.jar", {"small/C.class": b"c", "small/notes.txt": b"no class", "META-INF/services/S": b"s"})
    (tree / "jars" / "directives.txt").write_text("no jar")
    path, found = made(tree)
    assert path == [f"/{compilepath.JAR}", f"{JARS}/big.jar"]
    assert found == {"engine/B.class": b"y" * 9000, "small/C.class": b"c"}


def test_of_two_classes_the_first_jars_counts(tree: Path) -> None:
    jar(tree, "a.jar", {"p/X.class": b"of a"})
    jar(tree, "b-big.jar", {"p/X.class": b"of b", "p/Y.class": b"of b", "p/Z.class": b"z" * 5000})
    jar(tree, "c.jar", {"p/X.class": b"of c", "p/Y.class": b"of c", "p/V.class": b"of c"})
    path, found = made(tree)
    assert path[1:] == [f"{JARS}/b-big.jar"]
    # Y is b's, which stands after the merged one: so c's must not be in that.
    assert found == {"p/X.class": b"of a", "p/V.class": b"of c"}


def test_of_several_releases_the_newest_that_fits(tree: Path) -> None:
    versions = {"q/X.class": b"base", "META-INF/versions/9/q/X.class": b"9", "META-INF/versions/11/q/X.class": b"11"}
    versions |= {"META-INF/versions/21/q/X.class": b"21", "module-info.class": b"m"}
    versions |= {"META-INF/versions/9/module-info.class": b"m"}
    jar(tree, "big.jar", {"big/A.class": b"x" * 5000})
    jar(tree, "many.jar", versions, manifest="Manifest-Version: 1.0\r\nMulti-Release: true\r\n")
    jar(tree, "one.jar", {"r/X.class": b"base", "META-INF/versions/9/r/X.class": b"9"})
    assert made(tree)[1] == {"q/X.class": b"11", "r/X.class": b"base"}
