"""What was freed is not held on to."""

import ctypes
import subprocess
import sys

import pytest

from edgedistill import free_memory

# A heap of its own: blocks too small for a mapping of their own, of which the last keeps it from shrinking by itself.
GIVES_BACK = """
import ctypes, re
from pathlib import Path
from edgedistill import free_memory

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = resident()
blocks = [c.malloc(65536) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 65536)
for block in blocks[:-1]:
    c.free(block)
held = resident()
free_memory.give_back()
print(held - before, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_blocks_are_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVES_BACK], capture_output=True, text=True, check=True
    )
    held, given = map(int, done.stdout.split())
    assert held > 0.9 * 65536 * 1000
    assert given < 0.1 * 65536 * 1000


def test_where_there_is_nothing_to_call_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    free_memory.give_back()
    monkeypatch.setattr(ctypes, "CDLL", None)
    monkeypatch.setattr(sys, "platform", "win32")
    free_memory.give_back()
