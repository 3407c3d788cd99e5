""".dhgignore: which paths of a shared directory a guest does not get to see.

A line is a pattern, as in gitignore(5):

- blank lines and lines that begin with `#` are skipped; spaces at the end of a line do not count
- `\\` takes the next character as it is
- `*` is any number of characters but `/`, `?` is one, `[a-z]` and `[!a-z]` one of (not of) a set; `**` between slashes, or at
  either end, is any number of directories
- a pattern with a `/` at its beginning or in its middle is a path from the shared directory; any other matches a name at every depth
- a `/` at the end: directories only
- `!` before a pattern takes back what an earlier one hid; the last pattern that matches decides
- what is in a hidden directory is hidden, whatever follows

Only the `.dhgignore` in the shared directory itself counts. Unlike git, patterns match bytes, and case counts always.
The file is text in UTF-8, or in another encoding in which ASCII is itself; the mark of UTF-8 that some editors put first
does not count.
"""

from __future__ import annotations

import re

MAX_SIZE = 1 << 20
MAX_PATTERNS = 10_000


BOM_UTF8, BOMS_UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


class Patterns:
    """The patterns of one file. Raises `ValueError` for one that is too large or no such text, and for a pattern that is none."""

    def __init__(self, text: bytes) -> None:
        if len(text) > MAX_SIZE:
            raise ValueError(f"larger than {MAX_SIZE} bytes")
        # Windows PowerShell's `echo .env > .dhgignore` writes UTF-16: patterns that match nothing, so that nothing would be hidden.
        if text.startswith(BOMS_UTF16) or b"\0" in text:
            raise ValueError("it is no text in UTF-8")
        text = text.removeprefix(BOM_UTF8)
        self._rules: list[tuple[re.Pattern[bytes], bool, bool]] = []
        #: Whether a pattern depends on more than the name: a directory that is renamed would escape it.
        self.by_path = False
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                self._add(line)
            except re.error:
                raise ValueError(f"line {number} is no pattern: {line.decode('utf-8', 'replace')}") from None
            if len(self._rules) > MAX_PATTERNS:
                raise ValueError(f"more than {MAX_PATTERNS} patterns")

    def _add(self, line: bytes) -> None:
        line = _strip(line)
        if not line or line.startswith(b"#"):
            return
        hides = not line.startswith(b"!")
        line = line if hides else line[1:]
        only_directories = line.endswith(b"/")
        line = line.rstrip(b"/") if only_directories else line
        anchored = b"/" in line
        line = line.removeprefix(b"/")
        if line:
            self.by_path = self.by_path or anchored
            prefix = b"" if anchored else b"(?:.*/)?"
            self._rules.append((re.compile(prefix + translate(line), re.DOTALL), hides, only_directories))

    def hide(self, path: bytes, *, directory: bool) -> bool:
        """Whether `path`, relative to the shared directory and in no hidden directory, is hidden."""
        for pattern, hides, only_directories in reversed(self._rules):
            if (directory or not only_directories) and pattern.fullmatch(path):
                return hides
        return False


def _strip(line: bytes) -> bytes:
    # A space that is quoted stays.
    bare = line.rstrip(b" \t\r")
    quoted = (len(bare) - len(bare.rstrip(b"\\"))) % 2
    return line[: len(bare) + 1] if quoted and len(bare) < len(line) else bare


def translate(pattern: bytes) -> bytes:
    """A regular expression that matches the same paths as `pattern`, without slashes at its ends."""
    out, at = b"", 0
    while at < len(pattern):
        char = pattern[at : at + 1]
        starts = at == 0 or pattern[at - 1 : at] == b"/"
        if starts and pattern[at : at + 3] == b"**/":
            out += b"(?:.*/)?"
            at += 3
        elif starts and pattern[at:] == b"**":
            out += b".+"
            at += 2
        elif char == b"*":
            while pattern[at : at + 1] == b"*":
                at += 1
            out += b"[^/]*"
        elif char == b"?":
            out += b"[^/]"
            at += 1
        elif (
            char == b"["
            and (end := pattern.find(b"]", at + (3 if pattern[at + 1 : at + 2] in (b"!", b"^") else 2))) > 0
        ):
            inner = pattern[at + 1 : end]
            negated = inner[:1] in (b"!", b"^")
            inner = inner[1:] if negated else inner
            inner = inner.replace(b"\\", b"\\\\").replace(b"[", b"\\[").replace(b"^", b"\\^")
            inner = b"\\]" + inner[1:] if inner.startswith(b"]") else inner
            out += b"(?!/)[" + (b"^" if negated else b"") + inner + b"]"
            at = end + 1
        else:
            if char == b"\\" and at + 1 < len(pattern):
                at += 1
                char = pattern[at : at + 1]
            out += re.escape(char)
            at += 1
    return out
