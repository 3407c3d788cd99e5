"""Counts what reaches the server of the host's files."""

from __future__ import annotations

import json
from pathlib import Path

from dhg.share import protocol

#: In place of `dhg.share.start.CODE`.
CODE = """
import sys; sys.path.insert(0, sys.argv[1])
import collections, json, struct
from dhg.share import main, server
count, message = collections.Counter(), server.Server._message
def counted(self, data):
    count[struct.unpack_from('<I', data, 4)[0]] += 1
    message(self, data)
server.Server._message = counted
status = main.main(sys.argv[2:])
with open({path!r}, 'w') as file:
    json.dump(count, file)
sys.exit(status)
"""


class Counts:
    """Requests by opcode; those that were answered, and so waited for, in all. To be read when the server has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = CODE.format(path=str(path))

    def read(self) -> dict[int, int]:
        """How many of each."""
        return {int(opcode): count for opcode, count in json.loads(self.path.read_text()).items()}

    def answered(self) -> int:
        """How many had a reply."""
        return sum(count for opcode, count in self.read().items() if opcode not in protocol.ONE_WAY)
