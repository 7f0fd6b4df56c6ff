"""Weights mapped into memory, whose pages are handed back while a runtime packs them into its own form."""

import contextlib
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_PAUSE = 0.02  # seconds


@contextlib.contextmanager
def passing(path: Path) -> Iterator[np.ndarray]:
    """Give the bytes of a file as an array, of which little is ever resident.

    What was read is handed back every few milliseconds, and is read again from the system's cache where it is
    asked for once more. So the process does not hold the weights twice: as they are stored and as they are packed.
    The array stays valid behind the context.

    Args:
        path: A file that is not empty.

    Yields:
        uint8 (bytes,), private to this process.
    """
    with path.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    array = np.frombuffer(mapping, np.uint8)
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        yield array
        return
    done = threading.Event()

    def hand_back() -> None:
        # The last time when all is done.
        while not done.wait(_PAUSE):
            mapping.madvise(mmap.MADV_DONTNEED)
        mapping.madvise(mmap.MADV_DONTNEED)

    worker = threading.Thread(target=hand_back, daemon=True)
    worker.start()
    try:
        yield array
    finally:
        done.set()
        worker.join()
