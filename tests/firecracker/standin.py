"""A stand-in for Firecracker: speaks its API, its vsock protocol and its userfaultfd handshake; its "guest" is the real runner in a
process of this host's. Requests are held against Firecracker's OpenAPI description (api.json), and against its life cycle.

What it cannot show is that a guest kernel runs. `standin.py VERSION LOG FAULTS ...`: the version that it claims to be; a file for
one line a request; letters of what goes wrong: r (the first two connections of a restored guest are reset), f (the first to the
port for files is), p (refuses to pause).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import socket
import socketserver
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import jsonschema

from dhg.engine.vsock import FILES
from dhg.pager import uffd

HERE = Path(__file__).resolve().parent
SPEC = json.loads((HERE / "api.json").read_text())


class Refused(Exception):
    """A request that Firecracker would answer with 400."""


def check(method: str, path: str, body: Any) -> None:
    """Hold a request against the description. Firecracker knows no unknown fields."""
    for pattern, methods in SPEC["paths"].items():
        head, brace, _ = pattern.partition("{")
        fits = path.startswith(head) and "/" not in path[len(head) :] if brace else path == pattern
        if fits and method in methods:
            definitions = {
                name: {**schema, "additionalProperties": False} if schema.get("type") == "object" else schema
                for name, schema in SPEC["definitions"].items()
            }
            try:
                jsonschema.validate(body, {**methods[method]["body"], "definitions": definitions})
            except jsonschema.ValidationError as error:
                raise Refused(error.message) from None
            return
    raise Refused(f"Invalid request method and/or path: {method} {path}.")


class Guest:
    """The runner, in a process, with a Unix socket a port; and the vsock device's socket that leads there."""

    def __init__(self, uds: str, *, boot: bool, faults: str = "") -> None:
        # Under its own folder, which the test removes.
        self.folder = tempfile.mkdtemp(dir=os.path.dirname(LOG))
        leash, self.leash = os.pipe()
        os.set_inheritable(leash, True)
        argv = [sys.executable, str(HERE / "guest.py"), self.folder, str(leash), "boot" if boot else "restored"]
        self.pid = os.spawnv(os.P_NOWAIT, sys.executable, argv)
        os.close(leash)
        #: How many connections are reset, by port; -1: by any.
        self.resets = {-1: 2 if "r" in faults else 0, FILES: "f" in faults}
        self._lock = threading.Lock()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(uds)
        self.listener.listen(16)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                host, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(host,), daemon=True).start()

    def _connect(self, host: socket.socket) -> None:
        line = b""
        while not line.endswith(b"\n"):
            part = host.recv(1)
            if not part:
                return
            line += part
        port = int(line.split()[1])
        guest = socket.socket(socket.AF_UNIX)
        try:
            guest.connect(f"{self.folder}/{port}")
        except OSError:
            host.close()
            return
        with self._lock:
            which = port if port in self.resets else -1
            self.resets[which] -= 1
            reset = self.resets[which] >= 0
        if reset:
            if which == -1:
                host.sendall(b"OK 1073741824\n")
                host.recv(1)
            host.close()
            guest.close()
            return
        host.sendall(b"OK 1073741824\n")
        threading.Thread(target=pump, args=(guest, host), daemon=True).start()
        pump(host, guest)


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on all that comes, and its end."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Machine:
    """The life cycle of one microVM."""

    def __init__(self, version: str, faults: str) -> None:
        self.version = tuple(map(int, version.split(".")[:2]))
        self.faults = faults
        self.state = "fresh"
        self.config: dict[str, Any] = {}
        self.guest: Guest | None = None
        self.loaded: dict[str, Any] = {}

    def handle(self, method: str, path: str, body: Any) -> None:
        """Do what a request wants. Raises `Refused`."""
        check(method, path, body)
        if path == "/vm":
            self._vm(body["state"])
        elif path == "/snapshot/create":
            self._create(body)
        elif path == "/snapshot/load":
            self._load(body)
        elif path == "/actions":
            self._start()
        elif self.state not in ("fresh", "configured"):
            raise Refused("The requested operation is not supported after starting the microVM.")
        else:
            self.state = "configured"
            self.config[path] = body

    def _start(self) -> None:
        for name in ("/machine-config", "/boot-source", "/drives/root", "/vsock"):
            if name not in self.config:
                raise Refused(f"no {name}")
        for name in ("kernel_image_path", "initrd_path"):
            Path(self.config["/boot-source"][name]).read_bytes()
        self.guest = Guest(self.config["/vsock"]["uds_path"], boot=True)
        self.state = "running"

    def _vm(self, wanted: str) -> None:
        before, after = ("running", "paused") if wanted == "Paused" else ("paused", "running")
        if self.state != before or "p" in self.faults:
            raise Refused(f"cannot go from {self.state} to {wanted}")
        self.state = after
        if after == "running" and self.loaded:
            override = self.loaded.get("vsock_override", {}).get("uds_path")
            uds = override or json.loads(Path(self.loaded["snapshot_path"]).read_text())["vsock"]
            self.guest = Guest(uds, boot=False, faults=self.faults)

    def _create(self, body: Any) -> None:
        if self.state != "paused":
            raise Refused("The microVM is not paused")
        Path(body["snapshot_path"]).write_text(json.dumps({"vsock": self.config["/vsock"]["uds_path"]}))
        size = self.config["/machine-config"]["mem_size_mib"] << 20
        with open(body["mem_file_path"], "wb") as file:
            file.write(os.urandom(1 << 20))
            file.truncate(size)

    def _load(self, body: Any) -> None:
        if self.state != "fresh":
            raise Refused("Loading a microVM snapshot is not allowed after configuring boot-specific resources.")
        if "vsock_override" in body and self.version < (1, 16):
            raise Refused("unknown field `vsock_override`")
        json.loads(Path(body["snapshot_path"]).read_text())
        backend = body["mem_backend"]
        if backend["backend_type"] == "Uffd":
            threading.Thread(target=touch, args=(backend["backend_path"],), daemon=True).start()
        else:
            Path(backend["backend_path"]).stat()
        self.loaded, self.state = body, "paused"


def touch(path: str) -> None:
    """Do with a userfaultfd what Firecracker does; then touch some pages: the log says what is in them."""
    size = int(os.environ.get("STANDIN_MEMORY", str(64 << 20)))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd = uffd.open_fd()
    uffd.api(fd, uffd.FEATURE_EVENT_REMOVE)
    uffd.register(fd, address, size)
    item = {"base_host_virt_addr": address, "size": size, "offset": 0, "page_size": 4096, "page_size_kib": 4096}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [json.dumps([item]).encode()], [fd])
    # A VMM does not give its memory back.
    MEMORY.append(memory)
    note(f"memory {memory[:8].hex()} {memory[1 << 20 : (1 << 20) + 8].hex()}")


def note(line: str) -> None:
    """Add a line to the log."""
    with open(LOG, "a") as file:
        file.write(line + "\n")


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 as Firecracker's server speaks it."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        note(f"{self.command} {self.path} {data.decode()}")
        try:
            MACHINE.handle(self.command, self.path, json.loads(data))
        except (Refused, OSError) as error:
            text = json.dumps({"fault_message": str(error)}).encode()
            self.send_response(400)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        self.send_response(204)
        self.send_header("Connection", "keep-alive")
        self.end_headers()

    do_PUT = do_PATCH = _answer

    def log_message(self, *_: object) -> None:
        """Not on stderr."""

    def address_string(self) -> str:
        """A Unix socket has none."""
        return "unix"


def main(argv: list[str]) -> None:
    """Serve until killed."""
    if "--version" in argv:
        print(f"Firecracker v{VERSION}\n\nSupported snapshot data format versions: 6.0.0")
        return
    path = argv[argv.index("--api-sock") + 1]
    threading.stack_size(512 << 10)
    with socketserver.ThreadingUnixStreamServer(path, Handler) as server:
        server.daemon_threads = True
        server.serve_forever()


MEMORY: list[mmap.mmap] = []
VERSION, LOG, FAULTS = sys.argv[1:4]
MACHINE = Machine(VERSION, FAULTS)

if __name__ == "__main__":
    main(sys.argv[4:])
