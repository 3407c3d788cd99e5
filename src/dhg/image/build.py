"""The build stages, each cached under a key made of all its inputs: base system and kernel, root file system, initramfs.

A stage's result is a directory `cache/<stage>/<key>`. It is made under a temporary name and renamed, so it is there whole or not
at all; a lock a stage keeps two builds of the same thing from running at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable

from .. import config, proc
from ..errors import ImageError
from ..files import locked, private_dir, remove_tree, sync_dir, sync_file
from . import classes, compilepath, java, kernel
from .tree import COMPILE, can_mount, compile_python

#: What the names of unfinished results begin with.
TEMPORARY = ".tmp-"
SUITE = "bookworm"
PACKAGES = (
    "python3-minimal",
    "libpython3.11",
    "openjdk-17-jre-headless",
    # The compiler of formulas (guest/FormulaCompiler.java).
    "libeclipse-jdt-core-java",
    "busybox-static",
    "ca-certificates",
)
KERNEL_PACKAGE = "linux-image-cloud-amd64"
#: The guest's Python, for which the wheels are chosen whatever Python the host has.
GUEST_PYTHON = "3.11"
WHEEL_PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34, 35, 36)) + (
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
    "manylinux2010_x86_64",
)
SITE = "usr/local/lib/python3.11/dist-packages"

Report = Callable[[str], None]

# What of the base system no script reads. The copyright files stay.
_SLIM = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    # Not the folder itself: the JRE's postinst puts a link into man1.
    "path-exclude=/usr/share/man/*/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
)

_FETCH_KERNEL = """set -e
cd "$1"
mkdir -p dhg-kernel
pkg=$(chroot . apt-cache depends {meta} | sed -n 's/^ *Depends: \\(linux-image-[0-9].*\\)$/\\1/p' | head -n 1)
[ -n "$pkg" ] || {{ echo "no kernel package behind {meta}" >&2; exit 1; }}
chroot . sh -c "cd /dhg-kernel && apt-get download $pkg"
chroot . dpkg-query -W -f '${{Package}}=${{Version}}\\n' > dhg-kernel/packages
"""


def stage_key(*inputs: str) -> str:
    """The name of a stage's result: 16 hexadecimal digits of a hash over all its inputs."""
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def cached(stage: str, key: str, build: Callable[[str], None]) -> str:
    """The directory of a stage's result; calls `build(tmp_dir)` if it is not there yet."""
    root = private_dir(f"{config.cache_dir()}/{stage}")
    result = f"{root}/{key}"
    if os.path.isdir(result):
        return result
    with locked(f"{root}/.lock"):
        if os.path.isdir(result):
            return result
        # Killed builds left these. Nobody else builds while we have the lock, but a program of theirs may still be at work in one:
        # hence a name of our own.
        for name in os.listdir(root):
            if name.startswith(TEMPORARY):
                remove_tree(f"{root}/{name}")
        tmp = f"{root}/{TEMPORARY}{key}-{os.urandom(6).hex()}"
        os.mkdir(tmp, 0o700)
        try:
            build(tmp)
            _sync_tree(tmp)
            os.rename(tmp, result)
        except BaseException:
            remove_tree(tmp)
            raise
        sync_dir(root)
    return result


def _sync_tree(path: str) -> None:
    for name in os.listdir(path):
        if os.path.isfile(f"{path}/{name}"):
            sync_file(f"{path}/{name}")
    sync_dir(path)


def _debian_argv(target: str, hook: str) -> list[str]:
    argv = ["mmdebstrap", "--variant=minbase", "--include=" + ",".join(PACKAGES)]
    argv += [f"--dpkgopt={option}" for option in _SLIM]
    argv += [f"--customize-hook={hook}", SUITE, target]
    mirror = os.environ.get("DHG_DEBIAN_MIRROR")
    if mirror:
        argv.append(mirror)
    return argv


def _base_key() -> str:
    return stage_key(SUITE, *PACKAGES, KERNEL_PACKAGE, *_SLIM, _FETCH_KERNEL)


def base_system(log: str) -> str:
    """Stage 1: directory with `root.tar` (Debian with Python and a JRE) and `kernel/` (the kernel package, unpacked)."""

    def build(tmp: str) -> None:
        # As text and not as a file: without root it runs as a mapped user, who cannot enter the directories here.
        hook = _FETCH_KERNEL.format(meta=KERNEL_PACKAGE)
        os.chmod(tmp, 0o755)
        env = proc.minimal_env({name: value for name, value in os.environ.items() if name.endswith("_proxy")})
        # Not under the user's umask or in a directory that a mapped user cannot enter: mmdebstrap writes to stdout's file.
        proc.run(_debian_argv(f"{tmp}/root.tar", hook), timeout_s=1800, log=log, env=env)
        os.mkdir(f"{tmp}/unpack")
        proc.run(
            ["tar", "-xf", f"{tmp}/root.tar", "-C", f"{tmp}/unpack", "./dhg-kernel", "./usr/bin/busybox", "./bin"],
            timeout_s=120,
            log=log,
        )
        packages = sorted(name for name in os.listdir(f"{tmp}/unpack/dhg-kernel") if name.endswith(".deb"))
        if len(packages) != 1:
            raise ImageError(f"expected one kernel package, got {packages}")
        proc.run(["dpkg-deb", "-x", f"{tmp}/unpack/dhg-kernel/{packages[0]}", f"{tmp}/kernel"], timeout_s=120, log=log)
        os.rename(f"{tmp}/unpack/dhg-kernel/packages", f"{tmp}/packages")
        with open(f"{tmp}/packages", "a") as file:
            name, version = packages[0].split("_")[:2]
            file.write(f"{name}={version.replace('%3a', ':')}\n")
        shutil.copy(f"{tmp}/unpack/usr/bin/busybox", f"{tmp}/busybox")
        remove_tree(f"{tmp}/unpack")
        os.chmod(tmp, 0o700)

    return cached("base", _base_key(), build)


def resolve_version(version: str) -> str:
    """A Deephaven version: itself, or what the package index has newest for `latest`."""
    if version != "latest":
        return config.check_version(version)
    text = proc.run(
        [sys.executable, "-m", "pip", "index", "versions", "deephaven-server"], timeout_s=120, env=_pip_env()
    )
    start = text.find("(")
    if start < 0:
        raise ImageError("the package index does not say which deephaven-server is the latest", detail=text)
    return config.check_version(text[start + 1 : text.index(")", start)])


def _pip_env() -> dict[str, str]:
    extra = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
    extra.update({name: os.environ[name] for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE") if name in os.environ})
    return proc.minimal_env(extra)


def pip_argv(target: str, version: str) -> list[str]:
    """The command that installs `deephaven-server` for the guest's Python, whatever the host's is."""
    argv = [sys.executable, "-m", "pip", "install", "--no-input", "--no-compile", "--target", target]
    argv += ["--python-version", GUEST_PYTHON, "--implementation", "cp", "--only-binary=:all:"]
    for platform in WHEEL_PLATFORMS:
        argv += ["--platform", platform]
    argv += ["--root-user-action=ignore", f"deephaven-server=={version}"]
    return argv


#: What of the base system a bare image leaves out: all that is there for the JVM, for Perl, and for installing packages.
_NOT_BARE = (
    "./usr/lib/jvm",
    "./usr/share/java",
    "./usr/lib/x86_64-linux-gnu/perl*",
    "./usr/share/perl*",
    "./usr/share/fonts",
    "./usr/share/doc",
    "./usr/lib/apt",
    "./var/lib/dpkg",
    "./var/cache",
)


def _image_key(base: str, version: str) -> str:
    with open(f"{base}/packages") as file:
        packages = file.read()
    deephaven = (GUEST_PYTHON, SITE, *compilepath.INPUTS, *java.inputs(), classes.sources())
    parts = _NOT_BARE if version == config.BARE else deephaven
    return stage_key(version, *parts, *COMPILE, os.path.basename(base), packages)


def root_image(base: str, version: str, log: str) -> str:
    """Stage 2: directory with `root.erofs` (base system and Deephaven), `packages.json` (every package in it).

    The bare version has a part of the base system and no Deephaven.
    """

    def build(tmp: str) -> None:
        tree = f"{tmp}/tree"
        os.mkdir(tree)
        bare = version == config.BARE
        leave_out = ("./dev/*", "./dhg-kernel", *(_NOT_BARE if bare else ()))
        unpack = ["tar", "-xf", f"{base}/root.tar", "-C", tree, "--no-same-owner"]
        proc.run(unpack + [f"--exclude={name}" for name in leave_out], timeout_s=300, log=log)
        site = f"{tree}/{SITE}"
        os.makedirs(site, exist_ok=True)
        if not bare:
            proc.run(pip_argv(site, version), timeout_s=1800, log=log, env=_pip_env())
        mounts = can_mount(tree, log)
        compile_python(tree, ["/usr/lib/python3.11", *([] if bare else [f"/{SITE}"])], mounts=mounts, log=log)
        if not bare:
            java.make(tree, log, mounts=mounts)
            compilepath.make(tree, f"/{SITE}/deephaven_server/jars")
            classes.freeze_times(tree)
            classes.make(tree, log, mounts=mounts)
        packages = _guest_packages(base, site)
        with open(f"{tmp}/packages.json", "w") as file:
            json.dump(packages, file, indent=1, sort_keys=True)
        proc.run(["mkfs.erofs", "--quiet", "-T0", "--all-root", f"{tmp}/root.erofs", tree], timeout_s=600, log=log)
        remove_tree(tree)

    return cached("image", _image_key(base, version), build)


def missing_stages(version: str) -> set[str]:
    """Which of the stages `base` and `image` of a version are not in the cache."""
    needed = needed_stages((version,))
    return {
        stage
        for stage in ("base", "image")
        if not needed or not all(os.path.isdir(f"{config.cache_dir()}/{stage}/{name}") for name in needed[stage])
    }


def room_mib(version: str, memory_mib: int) -> int:
    """How much room on the disk a prepare asks for, in MiB: for the stages that are missing, and a snapshot of so much memory."""
    stages = {"base": 1024, "image": 512 if version == config.BARE else 3072}
    return memory_mib + 256 + sum(stages[stage] for stage in missing_stages(version))


def needed_stages(versions: Iterable[str]) -> dict[str, set[str]]:
    """The names, by stage, of the results that a prepare of `versions` would take from the cache; none of a damaged base system."""
    key = _base_key()
    base = f"{config.cache_dir()}/base/{key}"
    try:
        images = {_image_key(base, version) for version in versions}
        return {"base": {key}, "image": images, "vmlinux": {_vmlinux_key(base)}}
    except (OSError, ImageError):
        return {}


def _guest_packages(base: str, site: str) -> dict[str, dict[str, str]]:
    with open(f"{base}/packages") as file:
        debian = dict(line.split("=", 1) for line in file.read().split())
    python = {}
    for name in os.listdir(site):
        if name.endswith(".dist-info"):
            package, _, version = name[: -len(".dist-info")].rpartition("-")
            python[package] = version
    return {"debian": debian, "python": python}


def kernel_image(base: str) -> str:
    """Path of the bzImage in a base stage."""
    boot = f"{base}/kernel/boot"
    names = [name for name in os.listdir(boot) if name.startswith("vmlinuz-")]
    if len(names) != 1:
        raise ImageError(f"expected one kernel in {boot}, got {names}")
    return f"{boot}/{names[0]}"


def _vmlinux_key(base: str) -> str:
    return stage_key(os.path.basename(base), os.path.basename(kernel_image(base)))


def vmlinux(base: str) -> str:
    """Path of the uncompressed kernel of a base stage, a stage of its own."""

    def build(tmp: str) -> None:
        with open(kernel_image(base), "rb") as file:
            elf = kernel.vmlinux(file.read())
        with open(f"{tmp}/vmlinux", "wb") as out:
            out.write(elf)

    return cached("vmlinux", _vmlinux_key(base), build) + "/vmlinux"


def initramfs(base: str) -> tuple[bytes, str]:
    """Stage 3, made in memory: the initramfs, and the digest of the guest's own files in it."""
    files = kernel.guest_files()
    with open(f"{base}/busybox", "rb") as file:
        busybox = file.read()
    data = kernel.base_initramfs(kernel.module_files(f"{base}/kernel"), busybox)
    digest = hashlib.sha256(b"\0".join(name.encode() + b"\0" + files[name] for name in sorted(files))).hexdigest()
    return data + kernel.guest_archive(files), digest


def probe_initramfs(base: str, word: str) -> bytes:
    """An initramfs for the KVM probe."""
    with open(f"{base}/busybox", "rb") as file:
        return kernel.probe_initramfs(file.read(), word)
