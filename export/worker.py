"""One piece of work in a process of its own, whose memory is gone when it is done."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from edgedistill.errors import BundleError

from .stages import from_child, join

AUTO, ALWAYS, NEVER = "auto", "always", "never"
ISOLATE = (AUTO, ALWAYS, NEVER)
ALONE_ABOVE = 400_000_000  # bytes of weights; below, a process costs more than it saves


@dataclass(frozen=True)
class Used:
    """What a process took.

    Fields:
        peak_gb: Of memory, its own or that of a process it started, in 10**9 bytes; 0 where the system does not tell.
        seconds: Of wall time.
    """

    peak_gb: float
    seconds: float


def works_alone(isolate: str, size: int) -> bool:
    """Say whether a network of `size` bytes of weights gets a process of its own."""
    return isolate == ALWAYS or (isolate == AUTO and size > ALONE_ABOVE)


def in_child(
    function: Callable[..., Any], *arguments: Any, what: str = "a network"
) -> tuple[Any, Used]:
    """Call a function of a module in a fresh process.

    Args:
        function: Found by its name there; what it raises is raised here.
        arguments: They and the answer are pickled between the two.
        what: Is worked on, for the message.

    Returns:
        The answer, and what the process took.

    Raises:
        BundleError: If the process is killed, as systems do when memory runs out.
    """
    context = get_context("spawn")
    with (
        from_child(context) as queue,
        ProcessPoolExecutor(1, context, initializer=join, initargs=(queue,)) as pool,
    ):
        try:
            return pool.submit(_measured, function, arguments).result()
        except BrokenProcessPool as error:
            msg = f"{what}: the process that worked on it was killed, most likely for want of memory; close other programs, export one format or one network (--networks) at a time, or give --max-memory to be told before what will not fit."
            raise BundleError(msg) from error


def called(function: Callable[..., Any], *arguments: Any, alone: bool, what: str) -> Any:
    """Call a function here, or in a process of its own where it is to work `alone`; `what` as of `in_child`."""
    return in_child(function, *arguments, what=what)[0] if alone else function(*arguments)


def _measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Used]:
    start = time.perf_counter()
    answer = function(*arguments)
    return answer, Used(_peak_gb(), time.perf_counter() - start)


def _peak_gb() -> float:
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    # On Linux a process begins with the peak of the one that started it: true of children, for whom
    # that is this one, but of this one itself only the system's own note is.
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(_own_peak(), children) * unit / 1e9


def _own_peak() -> int:
    """Return the largest resident memory of this process, in the unit of ``ru_maxrss``."""
    note = Path("/proc/self/status")
    if note.is_file():
        lines = dict(line.split(":", 1) for line in note.read_text().splitlines())
        return int(lines["VmHWM"].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
