"""What was freed is not held on to."""

import ctypes
import re
import sys
from pathlib import Path

import pytest

from edgedistill import free_memory

BLOCK, BLOCKS = 65536, 1000  # bytes, each too small for a mapping of its own


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_are_given_back() -> None:
    c = ctypes.CDLL(None)
    if not hasattr(c, "malloc_trim"):
        pytest.skip("not glibc")
    c.malloc.restype, c.malloc.argtypes, c.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    before = resident()
    blocks = [c.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        c.free(block)
    held = resident()
    free_memory.give_back()
    given = resident()
    c.free(blocks[-1])
    assert held - before > 0.9 * BLOCK * BLOCKS
    assert given - before < 0.1 * BLOCK * BLOCKS


def test_where_there_is_nothing_to_call_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    free_memory.give_back()
    monkeypatch.setattr(ctypes, "CDLL", None)
    monkeypatch.setattr(sys, "platform", "win32")
    free_memory.give_back()
