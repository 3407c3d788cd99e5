"""`--output` and the removal of trees beside somebody who means harm: nothing outside is changed, whatever is renamed or linked."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dhg import files
from dhg.errors import DhgError
from dhg.output import Outputs

NOBODY = 65534


class Place:
    """A directory for an output beside one whose files are to stay as they are."""

    def __init__(self, root: Path) -> None:
        self.work, self.outside = root / "work", root / "outside"
        self.work.mkdir(mode=0o755)
        self.outside.mkdir()
        for name in ("t.csv", "sub/deep/precious", "sub/deep/more"):
            path = self.outside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("precious")
            path.chmod(0o600)
        (self.outside / "sub").chmod(0o711)
        self.before = self.state()

    def state(self) -> list[tuple[str, int, int, str]]:
        found = []
        for folder, _, names in os.walk(self.outside):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                status = path.lstat()
                text = path.read_text() if stat.S_ISREG(status.st_mode) else ""
                found.append((str(path), status.st_mode, status.st_nlink, text))
        return sorted(found)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    descriptors = set(os.listdir("/proc/self/fd"))
    yield made
    assert made.state() == made.before
    assert stat.S_IMODE(made.work.stat().st_mode) == 0o755
    assert set(os.listdir("/proc/self/fd")) == descriptors


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory of the user's that `as_user` takes; pytest's own is below one of root's."""
    path = Path(tempfile.mkdtemp(prefix="output-test-"))
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    yield path
    subprocess.run(["chmod", "-R", "u+rwx", str(path)], check=True)
    shutil.rmtree(path)


def as_user(work: Callable[[], None]) -> None:
    """Do it in a child that is not root."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            work()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def attack(script: str, *args: object) -> None:
    subprocess.run(["/bin/sh", "-euc", script, "sh", *map(str, args)], check=True)


def opened(place: Place, name: str = "t.csv") -> tuple[Outputs, str]:
    outputs = Outputs([f"t={place.work}/{name}"])
    outputs.open()
    return outputs, outputs.all[0].folder


SWAP = 'mv "$1" "$2/moved"; ln -s "$3" "$1"'


def test_a_symlink_in_place_of_the_directory_is_not_followed(place: Place) -> None:
    outputs, folder = opened(place)
    with outputs:
        Path(folder, "t.csv").write_text("new")
        attack(SWAP, folder, place.work, place.outside)
        outputs.deliver(None)
        assert (place.work / "t.csv").read_text() == "new"
    # What is left has another name than it had, and nothing in it.
    assert sorted(os.listdir(place.work)) == sorted([os.path.basename(folder), "moved", "t.csv"])
    assert os.listdir(place.work / "moved") == []


def test_a_symlink_before_the_end_is_not_followed(place: Place) -> None:
    outputs, folder = opened(place)
    with outputs:
        Path(folder, "sub").mkdir()
        Path(folder, "sub", "file").touch()
        attack(SWAP, folder, place.work, place.outside)
    assert Path(folder).is_symlink()
    assert os.listdir(place.work / "moved") == []


def test_another_directory_in_place_of_ours_stays(place: Place) -> None:
    outputs, folder = opened(place)
    with outputs:
        attack('mv "$1" "$2/moved"; mkdir "$1" "$1/mine"; rmdir "$1/mine"', folder, place.work)
    assert sorted(os.listdir(place.work)) == sorted([os.path.basename(folder), "moved"])


def test_symlinks_below_are_removed_and_not_followed(place: Place) -> None:
    outputs, folder = opened(place)
    with outputs:
        attack(
            'mkdir "$1/a"; ln -s "$2" "$1/a/link"; ln -s "$2/t.csv" "$1/file"; ln -s / "$1/root"', folder, place.outside
        )
    assert os.listdir(place.work) == []


def test_the_directory_of_the_target_is_the_one_that_it_was(place: Place) -> None:
    (place.work / "out").mkdir()
    outputs, folder = opened(place, "out/t.csv")
    with outputs:
        Path(folder, "t.csv").write_text("new")
        attack(SWAP, place.work / "out", place.work, place.outside)
        outputs.deliver(None)
    assert os.listdir(place.work / "moved") == ["t.csv"]


@pytest.mark.parametrize(
    "script",
    ['ln -s "$2/t.csv" "$1/t.csv"', 'ln "$2/t.csv" "$1/t.csv"', 'mkfifo "$1/t.csv"', 'mkdir "$1/t.csv"'],
    ids=["symlink", "hard link", "pipe", "directory"],
)
def test_what_is_no_file_of_its_own_is_refused(place: Place, script: str) -> None:
    (place.work / "t.csv").write_text("old")
    outputs, folder = opened(place)
    with outputs:
        attack(script, folder, place.outside)
        with pytest.raises(DhgError, match="what was written is no regular file"):
            outputs.deliver(None)
    assert os.listdir(place.work) == ["t.csv"]
    assert (place.work / "t.csv").read_text() == "old"


def test_what_is_replaced_between_look_and_rename_is_refused(place: Place) -> None:
    outputs, folder = opened(place)
    with outputs:
        Path(folder, "t.csv").write_text("new")
        outputs.all[0].check(0o022)
        attack('ln -sf "$2/t.csv" "$1/t.csv"', folder, place.outside)
        with pytest.raises(DhgError, match="replaced meanwhile"):
            outputs.all[0].put()
    assert os.listdir(place.work) == []


def test_a_symlink_where_the_file_is_to_be_is_replaced(place: Place) -> None:
    outputs, folder = opened(place)
    with outputs:
        Path(folder, "t.csv").write_text("new")
        attack('ln -s "$2/t.csv" "$1/t.csv"', place.work, place.outside)
        outputs.deliver(None)
    assert not (place.work / "t.csv").is_symlink()
    assert (place.work / "t.csv").read_text() == "new"


def test_modes_are_no_obstacle_to_a_user(open_to_all: Path) -> None:
    def work() -> None:
        outputs = Outputs([f"t={open_to_all}/t.csv"])
        with outputs:
            outputs.open()
            folder = Path(outputs.all[0].folder)
            (folder / "a" / "b").mkdir(parents=True)
            for path in (folder / "t.csv", folder / "a" / "file", folder / "a" / "b" / "file"):
                path.write_text("new")
                path.chmod(0)
            for path in (folder / "a" / "b", folder / "a"):
                path.chmod(0)
            outputs.deliver(None)
            folder.chmod(0)
        assert os.listdir(open_to_all) == ["t.csv"]
        assert (open_to_all / "t.csv").read_text() == "new"
        tree = open_to_all / "tree"
        (tree / "sub").mkdir(parents=True)
        (tree / "sub").chmod(0)
        tree.chmod(0)
        files.remove_tree(str(tree))
        assert os.listdir(open_to_all) == ["t.csv"]

    as_user(work)


def test_no_mode_above_the_tree_is_changed(open_to_all: Path) -> None:
    def work() -> None:
        project = open_to_all / "project"
        (project / "tree" / "sub").mkdir(parents=True)
        (project / "tree" / "sub" / "file").touch()
        project.chmod(0o555)
        files.remove_tree(f"{project}/tree")
        assert stat.S_IMODE(project.stat().st_mode) == 0o555
        assert os.listdir(project) == ["tree"]
        assert os.listdir(project / "tree") == []

    as_user(work)


def test_what_is_no_directory_is_left(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").touch()
    (tmp_path / "link").symlink_to("tree")
    for name in ("link", "link/", "tree/file", "none", "none/none"):
        files.remove_tree(f"{tmp_path}/{name}")
        assert sorted(os.listdir(tmp_path)) == ["link", "tree"]
    files.remove_tree(f"{tmp_path}/tree/")
    assert os.listdir(tmp_path) == ["link"]


def test_no_tree_is_too_deep(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        # More than there may be descriptors, or calls within calls, or bytes in a path.
        for _ in range(1200):
            os.mkdir("d" * 100, dir_fd=here)
            here, above = os.open("d" * 100, os.O_RDONLY, dir_fd=here), here
            os.close(above)
    finally:
        os.close(here)
    try:
        files.remove_tree(f"{tmp_path}/{'d' * 100}")
        assert os.listdir(tmp_path) == []
    finally:
        # Of pytest itself it would be too much.
        subprocess.run(["rm", "-rf", f"{tmp_path}/{'d' * 100}"], check=True)


def test_a_removal_ends_in_time(tmp_path: Path) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    above = os.open(tmp_path, os.O_RDONLY)
    top = os.open(tmp_path / "tree", os.O_RDONLY)
    try:
        files.remove_open(top, above, "tree", timeout_s=0)
        assert os.listdir(tmp_path / "tree") == ["sub"]
        files.remove_open(top, above, "tree", timeout_s=60)
        assert os.listdir(tmp_path) == []
    finally:
        os.close(top)
        os.close(above)


# Swaps each directory of a tree for a symlink that leads outside and back, and moves directories to and fro, as fast as it goes.
RENAMER = """
import os, sys
work, outside = sys.argv[1:]
def do(function, *args):
    try:
        function(*args)
    except OSError:
        pass
print(flush=True)
while True:
    for name in ("tree", "tree/sub", "tree/sub/deep"):
        do(os.rename, f"{work}/{name}", f"{work}/away")
        do(os.symlink, f"{outside}/sub" if name.endswith("deep") else outside, f"{work}/{name}")
        do(os.unlink, f"{work}/{name}")
        do(os.rename, f"{work}/away", f"{work}/{name}")
        do(os.rename, f"{work}/{name}/deep", f"{work}/other")
        do(os.rename, f"{work}/other", f"{work}/tree/sub/deep")
"""


def test_who_renames_at_the_same_time_has_nothing_outside_removed(place: Place) -> None:
    rounds = 0
    with subprocess.Popen(
        [sys.executable, "-c", RENAMER, str(place.work), str(place.outside)], stdout=subprocess.PIPE
    ) as renamer:
        try:
            assert renamer.stdout is not None
            renamer.stdout.readline()
            until = time.monotonic() + 2
            while time.monotonic() < until:
                built = place.work / "built"
                for name in ("sub/deep/precious", "sub/deep/more", "sub/deep/sub/deep/precious", "t.csv"):
                    (built / name).mkdir(parents=True, exist_ok=True)
                try:
                    built.rename(place.work / "tree")
                except OSError:
                    pass
                files.remove_tree(f"{place.work}/tree")
                rounds += 1
        finally:
            renamer.kill()
    assert rounds > 10
    files.remove_tree(str(place.work / "tree"))


def test_outputs_beside_who_renames_at_the_same_time(place: Place) -> None:
    script = """while :; do for d in "$1"/.t.csv.dhg-*; do
        mv "$d" "$1/away" && ln -s "$2" "$d"; rm -f "$d"; mv -T "$1/away" "$d"
    done; done"""
    with subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", place.work, place.outside], stderr=subprocess.DEVNULL
    ) as renamer:
        try:
            delivered = 0
            until = time.monotonic() + 2
            while time.monotonic() < until:
                with Outputs([f"t={place.work}/t.csv"]) as outputs:
                    try:
                        outputs.open()
                        fd = outputs.all[0].fd
                        os.mkdir("sub", dir_fd=fd)
                        with open(os.open("t.csv", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "w") as file:
                            file.write("new")
                        outputs.deliver(None)
                        delivered += 1
                    except DhgError:
                        # The directory was away when it was to be opened.
                        continue
                assert (place.work / "t.csv").read_text() == "new"
        finally:
            renamer.kill()
    assert delivered > 10
