"""What an export will take, said before it begins: from the sizes of networks, by factors that were measured."""

import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.errors import ConfigError

from .worker import ALWAYS, AUTO

if TYPE_CHECKING:
    from .calls import Size

# Of Stable Diffusion 1.5, each network in a process of its own, two cores: such that no peak of docs/export.md is
# above the estimate. Peak memory in bytes per byte of weights, of the largest tensor of a layer and of the largest
# attention matrix, beside what the imports take; processor seconds per GB of weights and per 10**12 operations.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_STORED = {"float32": 1.0, "float16": 0.5}
LARGE = 1_000_000_000  # bytes of memory; what takes less needs no estimate


@dataclass(frozen=True)
class _Factors:
    weights: float
    layer: float
    attention: float
    per_gb: float
    per_tflop: float
    imports_bytes: int = 550_000_000
    imports_seconds: float = 6.0


_FACTORS = {
    "onnx": _Factors(1.1, 6.5, 2.0, 5.0, 26.0),
    "openvino": _Factors(1.3, 5.5, 2.0, 6.0, 27.0),
    "coreml": _Factors(1.1, 4.5, 2.0, 15.0, 32.0, 900_000_000, 8.0),
    "torch": _Factors(1.0, 5.5, 0.0, 1.0, 13.0),
}
# Copies of what is written, while it is: the graph that OpenVINO's is made from is of float32, whatever that is;
# coremltools has its weights in a file, in its own folder and in a package before they are in place.
_GRAPHS_ASIDE = {"openvino": 1}
_COPIES_ASIDE = {"coreml": 2}


@dataclass(frozen=True)
class Task:
    """One network that is written, with estimates of what it takes.

    Fields:
        name: Of the network, or of several that are called in one process.
        artifact: It is written for.
        memory: Bytes at the peak.
        disk: Bytes that stay on the disk.
        aside: Bytes on the disk beside these, while it is written.
        seconds: Of one processor.
    """

    name: str
    artifact: str
    memory: int
    disk: int
    aside: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """Say what it takes."""
        return (
            f"{self.name}, {self.artifact}: about {self.memory / 1e9:.1f} GB of memory, {self.disk / 1e9:.1f} GB of "
            f"disk and {self.seconds:.0f} s of one processor (estimates)"
        )


def memory(form: str, size: "Size", batch: int = 1) -> int:
    """Estimate the bytes of memory that writing a network and checking it with a batch take at the peak.

    Args:
        form: A format; ``torch``: just calling it.
        size: Of the network.
        batch: Samples per call.
    """
    by = _FACTORS[form]
    of_sample = by.layer * size.layer + by.attention * size.attention
    return by.imports_bytes + round(by.weights * size.weights + batch * of_sample)


def seconds(form: str, size: "Size", batch: int = 1) -> float:
    """Estimate the processor seconds of the same."""
    by = _FACTORS[form]
    of_calls = by.per_tflop * batch * size.flops / 1e12
    return by.imports_seconds + by.per_gb * size.weights / 1e9 + of_calls


def task(name: str, artifact: str, kind: tuple[str, str], size: "Size", batch: int) -> Task:
    """Estimate what a network takes.

    Args:
        name: Of the network.
        artifact: That it belongs to.
        kind: Format, and precision of the stored weights.
        size: Of the network.
        batch: Samples of the call that checks it.
    """
    form, precision = kind
    stored = round(size.weights * _STORED[precision])
    aside = size.weights * _GRAPHS_ASIDE.get(form, 0) + stored * _COPIES_ASIDE.get(form, 0)
    needs = memory(form, size, batch), stored, aside, seconds(form, size, batch)
    return Task(name, artifact, *needs)


def disk(tasks: Collection[Task]) -> int:
    """Return the bytes on the disk that tasks take, done one after another."""
    return sum(item.disk for item in tasks) + max((item.aside for item in tasks), default=0)


def isolation(
    isolate: str, weights: Mapping[str, int], tasks: Iterable[Task], limit: int | None
) -> str:
    """Return whether networks are written in processes of their own where memory is limited.

    Args:
        isolate: What was asked for, of `export.worker.ISOLATE`; only `AUTO` is decided here.
        weights: Bytes of float32 weights of each network, by name; one process holds all of them.
        tasks: What is written.
        limit: Bytes of memory; None: whatever there is.
    """
    if isolate != AUTO or limit is None:
        return isolate
    held = sum(weights.values())
    together = max((item.memory + held - weights.get(item.name, held) for item in tasks), default=0)
    return ALWAYS if together > limit else isolate


def size_of(text: str) -> int:
    """Read an amount of memory such as ``8GB``, in bytes.

    Raises:
        ConfigError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        msg = f"`{text}` is no amount of memory; write it like 8GB."
        raise ConfigError(msg)
    unit = _UNITS[found[2].upper()]
    return round(
        float(found[1]) * (unit if not found[3] else 1024 ** list(_UNITS.values()).index(unit))
    )


def check(tasks: Collection[Task], target: Path, limit: int | None) -> None:
    """Refuse an export that will not fit, before any work.

    Args:
        tasks: What is written.
        target: Where it is written; the folder or one above it is there.
        limit: Bytes of memory that may be used; None: whatever there is.

    Raises:
        ConfigError: If a task needs more memory than `limit`, or the disk has not the room for all of them.
    """
    for item in tasks:
        if limit is not None and item.memory > limit:
            msg = f"{item.name}, {item.artifact}: takes about {item.memory / 1e9:.1f} GB of memory (an estimate), more than the {limit / 1e9:.1f} GB allowed; allow more with --max-memory, or write less: another format, fewer --networks, smaller images."
            raise ConfigError(msg)
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free, needed = shutil.disk_usage(place).free, disk(tasks)
    if needed > free:
        msg = f"{target}: what is to be written takes about {needed / 1e9:.1f} GB of disk (an estimate), and {free / 1e9:.1f} GB are free; make room, choose another place, or write fewer formats or networks at a time."
        raise ConfigError(msg)


def lines(tasks: Collection[Task]) -> list[str]:
    """Return what is said before large work: a line for each task that is large, and the disk that all take."""
    large = [str(item) for item in tasks if item.memory > LARGE]
    if not large:
        return []
    return [*large, f"in all: about {disk(tasks) / 1e9:.1f} GB of disk (an estimate)"]
