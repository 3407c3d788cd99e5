"""How a script's source becomes code. Host and guest share this file: standard library only."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import types

#: What no expression begins with. A look at it spares most scripts of several lines being compiled twice.
_STATEMENTS = frozenset(b"import from def class for while with try async if".split())


def compiled(source: bytes, filename: str) -> types.CodeType:
    """The code of a script: where it is one expression and nothing else, that of the expression, whose value is then shown.

    Nothing of it is run. Raises what `compile` does: `SyntaxError`, `ValueError` (NUL bytes), `RecursionError`, `MemoryError`.
    """
    if source.split(None, 1)[0] not in _STATEMENTS:
        # On its own, so that another error is not raised while this SyntaxError is handled and becomes its context.
        code = _expression(source, filename)
        if code is not None:
            return code
    return compile(source, filename, "exec", dont_inherit=True, optimize=0)


def _expression(source: bytes, filename: str) -> types.CodeType | None:
    try:
        return compile(source, filename, "eval", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        return None
