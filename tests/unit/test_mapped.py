"""Weights that pass through memory are there to be read and are not held."""

import re
import time
from pathlib import Path

import numpy as np
import pytest

from runtimes.mapped import passing

SMAPS = Path("/proc/self/smaps")


def resident(path: Path) -> int:
    """Return the bytes of a mapped file that are in this process's memory."""
    parts = re.split(r"\n(?=[0-9a-f]+-)", SMAPS.read_text())
    mine = [part for part in parts if part.partition("\n")[0].endswith(str(path))]
    assert mine
    return sum(int(found) * 1024 for part in mine for found in re.findall(r"\nRss: +(\d+)", part))


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_what_was_read_is_handed_back_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    values = np.arange(1 << 22, dtype=np.uint32)
    values.tofile(path)
    with passing(path) as array:
        for _ in range(2):
            np.testing.assert_array_equal(array.view(np.uint32), values)
            deadline = time.monotonic() + 10
            while resident(path) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert resident(path) == 0
    assert resident(path) == 0
    np.testing.assert_array_equal(array.view(np.uint32), values)
