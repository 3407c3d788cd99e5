"""What --mount, --rw, --no-workspace and --output mean, and how outputs come about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dhg.cli.exec_ import OPTIONS
from dhg.cli.options import parse
from dhg.cli.sharing import Mount, Plan
from dhg.errors import DhgError, HostError, UsageError
from dhg.output import Outputs
from dhg.wire import frames


def plan(*argv: str, filename: str = "<string>") -> Plan:
    return Plan(parse(list(argv), OPTIONS, verb="exec"), filename)


def test_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "c:d").mkdir()
    a = str(tmp_path / "a")
    for text, wanted in {
        a: (a, a, False),
        "a": ("a", a, False),
        "a:rw": ("a", a, True),
        "a:ro": ("a", a, False),
        "a:/x": ("a", "/x", False),
        "a/:/x/../y//z:rw": ("a/", "/y/z", True),
        "c:d": ("c:d", str(tmp_path / "c:d"), False),
        "c:d:/x:rw": ("c:d", "/x", True),
        "a:/workspace/a": ("a", "/workspace/a", False),
    }.items():
        mount = Mount(text)
        assert (mount.host, mount.guest, mount.writable) == wanted, text
    for text in ("", ":rw", "none", "a:x", "a:/", "a:/usr/share", "a:/run/dhg", "a:/workspace", "a:/proc/1", "a:/b:/c"):
        with pytest.raises(UsageError):
            Mount(text)
    with pytest.raises(UsageError):
        plan("--vm", *["--mount=a:/x"] * 33)


def test_shares_and_where_the_script_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("work/sub", "lib"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "work" / "sub" / "s.py").touch()
    (tmp_path / "lib" / "l.py").touch()
    os.symlink("sub/s.py", tmp_path / "work" / "link.py")
    os.symlink(tmp_path / "work", tmp_path / "alias")
    monkeypatch.chdir(tmp_path / "work")
    found = plan("--vm", "--rw", "--mount=../lib:/lib2:rw", "--mount=sub:/x", filename="sub/s.py")
    assert found.shares == ((".", "w"), ("../lib", "w"), ("sub", "r"))
    assert found.mounts == ("/lib2", "/x")
    # The innermost share that holds it.
    assert (found.file, found.folder) == ("/x/s.py", "/x")
    assert found.flags == frames.FLAG_WRITABLE
    for filename, file, folder in (
        ("sub/s.py", "/workspace/sub/s.py", "/workspace/sub"),
        ("link.py", "/workspace/link.py", "/workspace/sub"),
        (str(tmp_path / "alias" / "link.py"), "/workspace/sub/s.py", "/workspace/sub"),
        ("../lib/l.py", None, "/workspace"),
        ("<string>", None, None),
    ):
        found = plan("--vm", filename=filename)
        assert (found.file, found.folder) == (file, folder), filename
    found = plan("--vm", "--no-workspace", filename="sub/s.py")
    assert (found.shares, found.file, found.flags) == ((("", "r"),), None, frames.FLAG_NO_WORKSPACE)
    found = plan(filename="sub/s.py")
    assert (found.file, found.folder) == (None, str(tmp_path / "work" / "sub"))


def test_outputs_are_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("old")
    (tmp_path / "old.csv").chmod(0o640)
    items = [f"t={tmp_path}/old.csv", f"u={tmp_path}/new.CSV"]

    def write(outputs: Outputs, text: str = "new") -> None:
        for one in outputs.all:
            assert os.stat(one.folder).st_mode & 0o777 == 0o700
            Path(one.folder, one.file).write_text(text)

    outputs = Outputs(items)
    with outputs:
        outputs.open()
        write(outputs)
        with pytest.raises(DhgError, match="u: no such table"):
            outputs.deliver("u: no such table")
    assert os.listdir(tmp_path) == ["old.csv"]
    with outputs:
        outputs.open()
        write(outputs)
        os.unlink(f"{outputs.all[1].folder}/{outputs.all[1].file}")
        os.symlink("/etc/passwd", f"{outputs.all[1].folder}/{outputs.all[1].file}")
        with pytest.raises(DhgError, match="no regular file"):
            outputs.deliver(None)
    assert (tmp_path / "old.csv").read_text() == "old"
    with outputs:
        outputs.open()
        os.mkdir(f"{outputs.all[0].folder}/more")
        write(outputs)
        outputs.deliver(None)
    assert sorted(os.listdir(tmp_path)) == ["new.CSV", "old.csv"]
    assert (tmp_path / "old.csv").read_text() == "new"
    assert (tmp_path / "old.csv").stat().st_mode & 0o777 == 0o640
    with pytest.raises(HostError, match="cannot write"), Outputs([f"t={tmp_path}/none/t.csv"]) as nowhere:
        nowhere.open()


@pytest.mark.parametrize("item", ["t", "t=", "=t.csv", "a-b=t.csv", "t=t", "t=t.txt", "t=.csv", "t=csv"])
def test_an_output_that_makes_no_sense(item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        Outputs([item])
