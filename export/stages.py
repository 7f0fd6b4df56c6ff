"""What is being done now, told to whoever waits for it, also out of the process that does it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnContext
from typing import Any

Listener = Callable[[str], None]
_listeners: list[Listener] = []  # the last one is told


def stage(what: str) -> None:
    """Say what begins now, such as ``"tracing"``."""
    if _listeners:
        _listeners[-1](what)


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Have the stages of what runs inside told to a listener; from other processes they come in another thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Have a name said before each stage of what runs inside."""
    if not _listeners:
        yield
        return
    outer = _listeners[-1]
    with told_to(lambda what: outer(f"{name}: {what}")):
        yield


@contextlib.contextmanager
def from_child(context: SpawnContext) -> Iterator[Any]:
    """Give the queue that a child must `join` for its stages to be told here."""
    queue = context.SimpleQueue()
    thread = threading.Thread(target=_pass_on, args=(queue,), daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()


def join(queue: Any) -> None:
    """Tell the stages of this process to the one that made the queue."""
    _listeners.append(queue.put)


def _pass_on(queue: Any) -> None:
    for what in iter(queue.get, None):
        stage(what)
