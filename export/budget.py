"""What an export will take, said before it begins: from the sizes of weights and factors that were measured."""

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from edgedistill.errors import ConfigError

from .worker import ALWAYS, AUTO

# Of the Stable Diffusion 1.5 UNet, 3.44 GB of float32 weights, one network in a process of its own, two cores:
# peak memory in bytes per byte of weights, and processor seconds per GB, beside what the imports take.
_MEMORY = {"onnx": 1.3, "openvino": 1.35, "coreml": 1.35}
_SECONDS = {"onnx": 13.0, "openvino": 14.0, "coreml": 26.0}
_IMPORTS_BYTES = 500_000_000
_IMPORTS_SECONDS = 6.0
_STORED = {"float32": 1.0, "float16": 0.5}
_COPIES = {"onnx": 1, "openvino": 1, "coreml": 3}  # of the written weights, while they are written
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def memory(form: str, size: int) -> int:
    """Estimate the bytes of memory that writing and checking `size` bytes of weights takes at its peak."""
    return _IMPORTS_BYTES + round(_MEMORY[form] * size)


def seconds(form: str, size: int) -> float:
    """Estimate the processor seconds of the same."""
    return _IMPORTS_SECONDS + _SECONDS[form] * size / 1e9


def disk(form: str, precision: str, size: int) -> int:
    """Estimate the bytes on disk while it is written, and the graph that OpenVINO's is made from."""
    return round(size * (_COPIES[form] * _STORED[precision] + (form == "openvino")))


def isolation(isolate: str, sizes: Mapping[str, int], forms: Collection[str], limit: int) -> str:
    """Return whether networks are written in processes of their own where memory is limited.

    Args:
        isolate: What was asked for, of `export.worker.ISOLATE`; only `AUTO` is decided here.
        sizes: Bytes of float32 weights of each network, by name; one process holds all of them.
        forms: The formats.
        limit: Bytes of memory.
    """
    together = max(memory(form, max(sizes.values())) for form in forms)
    together += sum(sizes.values()) - max(sizes.values())
    return ALWAYS if isolate == AUTO and together > limit else isolate


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


def check(
    sizes: Mapping[str, int], form: str, precision: str, target: Path, limit: int | None
) -> None:
    """Refuse an export that will not fit, before any work.

    Args:
        sizes: Bytes of float32 weights of each network, by name.
        form: The format.
        precision: Of the stored weights.
        target: Where it is written; the folder or one above it is there.
        limit: Bytes of memory that may be used; None: whatever there is.

    Raises:
        ConfigError: If a network needs more memory than `limit`, or the disk has not the room.
    """
    for name, size in sizes.items():
        if limit is not None and memory(form, size) > limit:
            msg = f"{name} as {form} takes about {memory(form, size) / 1e9:.1f} GB of memory (an estimate), more than the {limit / 1e9:.1f} GB allowed; allow more, or leave this format out."
            raise ConfigError(msg)
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free, needed = (
        shutil.disk_usage(place).free,
        sum(disk(form, precision, v) for v in sizes.values()),
    )
    if needed > free:
        msg = f"{target}: {form} takes about {needed / 1e9:.1f} GB of disk (an estimate), and {free / 1e9:.1f} GB are free; make room or choose another place."
        raise ConfigError(msg)
