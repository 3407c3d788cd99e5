"""The guest kernel: Debian's cloud kernel, its modules in load order, and the initramfs made of them."""

from __future__ import annotations

import lzma
import os
import struct
import zlib

from ..errors import ImageError
from . import lz4
from .cpio import Archive

#: What the guest needs beyond what is built in. fuse: the host's files; vsock: the channel under Firecracker.
MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "overlay",
    "erofs",
    "fuse",
)


def stub(bzimage: bytes) -> bytes:
    """The head of a bzImage: boot sector and setup code, which is all that a VMM looks at before it runs the kernel.

    Documentation/arch/x86/boot.rst: at 0x1f1 the number of setup sectors after the first (0 means 4), at 0x202 "HdrS".
    Raises `ImageError` for anything else.
    """
    if bzimage[0x202:0x206] != b"HdrS":
        raise ImageError("the kernel is no bzImage")
    return bzimage[: ((bzimage[0x1F1] or 4) + 1) * 512 + 4096]


def module_files(tree: str) -> dict[str, str]:
    """Path of every module in an unpacked kernel package, by its name with underscores."""
    found = {}
    for folder, _, names in os.walk(tree):
        for name in names:
            if name.endswith(".ko"):
                found[name[:-3].replace("-", "_")] = os.path.join(folder, name)
    return found


def dependencies(path: str) -> list[str]:
    """The modules that a module names in its .modinfo section (what depmod reads, too)."""
    with open(path, "rb") as file:
        data = file.read()
    at = data.find(b"\0depends=")
    if at < 0:
        at = data.find(b"depends=") - 1
    if at < -1:
        return []
    value = data[at + 9 : data.index(b"\0", at + 9)].decode()
    return [name.replace("-", "_") for name in value.split(",") if name]


def load_order(files: dict[str, str], wanted: tuple[str, ...] = MODULES) -> list[str]:
    """`wanted` and all they depend on, each after what it needs. Raises `ImageError` for a module that is not there.

    A wanted module that the kernel has built in (and so has no file) is left out; a dependency must be there.
    """
    order: list[str] = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in order:
            return
        if name in trail:
            raise ImageError(f"kernel modules depend on each other in a circle: {' > '.join((*trail, name))}")
        path = files.get(name)
        if path is None:
            raise ImageError(f"the kernel package has no module {name}, which {trail[-1]} needs")
        for needed in dependencies(path):
            visit(needed, (*trail, name))
        order.append(name)

    for name in wanted:
        if name in files:
            visit(name, ())
    return order


def base_initramfs(files: dict[str, str], busybox: bytes) -> bytes:
    """The archive with busybox and the modules; the runner's files are a second archive, `guest_archive`."""
    archive = Archive()
    archive.file("bin/busybox", busybox, mode=0o755)
    order = load_order(files)
    for name in order:
        with open(files[name], "rb") as file:
            archive.file(f"modules/{name}.ko", file.read())
    archive.file("modules/order", "".join(f"{name}.ko\n" for name in order).encode())
    return archive.whole()


def guest_files() -> dict[str, bytes]:
    """The guest's own files by name in the initramfs: its inits, and the part of this package that runs there."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    names = {"init": "guest/initramfs-init", "dhg/init": "guest/init"}
    modules = ["__init__.py", "wire/__init__.py", "wire/frames.py"]
    modules += sorted(f"guest/{name}" for name in os.listdir(f"{package}/guest") if name.endswith(".py"))
    names |= {f"dhg/lib/dhg/{name}": name for name in modules}
    files = {}
    for target, name in names.items():
        with open(f"{package}/{name}", "rb") as file:
            files[target] = file.read()
    return files


def put_library(folder: str) -> None:
    """Write the part of this package that runs in the guest to `folder`, for what runs natively in the guest's tree."""
    for name, data in guest_files().items():
        if name.startswith("dhg/lib/"):
            path = f"{folder}/{name.removeprefix('dhg/lib/')}"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)


def guest_archive(files: dict[str, bytes]) -> bytes:
    """The second archive of the initramfs."""
    archive = Archive()
    for name, data in files.items():
        archive.file(name, data, mode=0o755 if name == "init" else 0o644)
    return archive.whole()


def vmlinux(image: bytes) -> bytes:
    """The uncompressed ELF kernel inside a bzImage, which is what Firecracker boots. Raises `ImageError`.

    The setup header says where the compressed kernel is (Documentation/arch/x86/boot.rst: setup_sects, payload_offset and
    payload_length, the latter two relative to the protected-mode code, from protocol 2.08 on).
    """
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS" or image[0x206:0x208] < b"\x08\x02":
        raise ImageError("the kernel is no bzImage of boot protocol 2.08 or newer")
    code = ((image[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[code + offset : code + offset + length]
    try:
        if payload.startswith(b"\xfd7zXZ\0"):
            # The kernel's build appends the size to what xz wrote; the decompressor stops before it.
            xz = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elf = xz.decompress(payload)
            whole = xz.eof
        elif payload.startswith(lz4.MAGIC):
            elf, whole = lz4.decompress(payload), True
        elif payload.startswith(b"\x1f\x8b"):
            gzip = zlib.decompressobj(wbits=31)
            elf = gzip.decompress(payload)
            whole = gzip.eof
        else:
            raise ImageError(f"the kernel is compressed in a way that is not known: {payload[:6].hex()}")
    except (lzma.LZMAError, zlib.error) as error:
        raise ImageError(f"the kernel inside the bzImage is damaged: {error}") from error
    if not whole:
        raise ImageError("the kernel inside the bzImage is damaged: it ends early")
    if not elf.startswith(b"\x7fELF"):
        raise ImageError("what is inside the bzImage is no ELF file")
    return elf


def probe_initramfs(busybox: bytes, word: str) -> bytes:
    """An initramfs whose init prints `word` on the console and resets the machine."""
    archive = Archive()
    archive.file("bin/busybox", busybox, mode=0o755)
    archive.device("dev/console", 5, 1)
    script = f"#!/bin/busybox sh\n/bin/busybox echo {word}\n/bin/busybox reboot -f\n"
    archive.file("init", script.encode(), mode=0o755)
    return archive.whole()
