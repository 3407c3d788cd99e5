"""Random numbers after a restore: every generator whose state is in the snapshot gets a new seed from the kernel's.

Guest code: standard library and Deephaven only. The kernel's own generator is seeded by the runner first.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

Reseeder = Callable[[], None]


def python() -> Reseeder:
    """For CPython's `random`."""
    import random

    generator: Any = random._inst

    def reseed() -> None:
        # The C method of the base class: Random.seed would come to the same by way of SHA-512.
        super(random.Random, generator).seed(int.from_bytes(os.urandom(32), "little"))
        generator.gauss_next = None

    reseed()
    return reseed


def numpy() -> Reseeder:
    """For NumPy's global generator."""
    from numpy.random import mtrand

    legacy = mtrand._rand

    def reseed() -> None:
        legacy.seed(int.from_bytes(os.urandom(4), "little"))

    reseed()
    return reseed


def jvm() -> Reseeder:
    """For the JVM: Reseed.java, compiled by the JVM itself. Raises `RuntimeError` if that fails."""
    import jpy

    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(os.path.dirname(__file__), "Reseed.java")
        byte_stream = jpy.get_type("java.io.ByteArrayOutputStream")()
        output = jpy.get_type("java.io.PrintStream")(byte_stream)
        javac = jpy.get_type("java.util.spi.ToolProvider").findFirst("javac").get()
        javac = jpy.cast(javac, "java.util.spi.ToolProvider")
        args = jpy.array("java.lang.String", ["-nowarn", "-Xlint:none", "-proc:none", "-d", folder, source])
        if javac.run(output, output, args) != 0:
            raise RuntimeError(f"Reseed.java does not compile: {byte_stream.toString()}")
        url = jpy.get_type("java.io.File")(folder + "/").toURI().toURL()
        loader = jpy.get_type("java.net.URLClassLoader").newInstance(jpy.array("java.net.URL", [url]))
        made = loader.loadClass("Reseed").getDeclaredConstructors()[0].newInstance(jpy.array("java.lang.Object", 0))
    reseeder = jpy.cast(made, "java.util.function.LongConsumer")

    def reseed() -> None:
        reseeder.accept(int.from_bytes(os.urandom(8), "little", signed=True))

    # Often enough to be compiled before the freeze.
    for _ in range(300):
        reseed()
    return reseed
