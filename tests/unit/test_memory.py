"""What the guest does with mapped files before the freeze, on this host's kernel (guest/memory.py)."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

PAGES = 256
# In a process of its own, or the tests' own pages would have to be read again.
CODE = """
import json, mmap, os, sys
from dhg.guest import memory

def mapped(ending, mode):
    found = []
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in maps:
            words = line.split()
            if line.rstrip().endswith(ending) and words[1] == mode:
                begin, end = (int(word, 16) // mmap.PAGESIZE for word in words[0].split("-"))
                entries = memoryview(os.pread(pagemap.fileno(), (end - begin) * 8, begin * 8)).cast("Q")
                found += [entry >> 63 for entry in entries]
    return found

# As a guest has it: what another CPU has just read it holds on to for a while.
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
path = sys.argv[1]
with open(path, "rb") as file:
    area = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
told = []
def tell():
    told.append(sum(mapped(path, "r--p")))
for page in range(len(area) // mmap.PAGESIZE):
    area[page * mmap.PAGESIZE]
tell()
memory.release_files()
tell()
area[5 * mmap.PAGESIZE]
tell()
code = mapped(os.path.realpath(sys.executable), "r-xp")
memory.read_around()
area[100 * mmap.PAGESIZE]
tell()
print(json.dumps([told, len(code) > 0 and all(code)]))
"""


def test_only_what_is_used_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * mmap.PAGESIZE))
    # What is not on the disk yet cannot be given back.
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, timeout=60, check=True)
    (all_of_it, released, single, around), whole = json.loads(done.stdout)
    assert (all_of_it, released, single) == (PAGES, 0, 1)
    assert around > 2
    assert whole
