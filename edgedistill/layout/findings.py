"""What a check tells, and the register of checks by loader."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from edgedistill.stock import LOADERS

FORMATS = {"ort": "onnx", "openvino": "openvino", "genai": "openvino", "swift": "coreml"}
"""The format of the graphs that a loader opens; diffusers opens safetensors."""


@dataclass(frozen=True)
class Finding:
    """One place where a folder is not what a loader expects.

    Fields:
        file: Path in the folder.
        expected: What the loader wants to find there.
        found: What is there.
        way_out: What to do about it.
        level: ``error``: it does not open, or gives wrong pictures; ``warning``: it works, with a trap.
        loader: One of `LOADERS`.
    """

    file: str
    expected: str
    found: str
    way_out: str
    level: str = "error"
    loader: str = ""

    def __str__(self) -> str:
        return (
            f"{self.level}: {self.loader}: {self.file}: expected {self.expected}, "
            f"found {self.found}; {self.way_out}."
        )


Check = Callable[[Any, str], Iterable[Finding]]  # of a `Folder` and the loader's name
CHECKS: dict[str, list[Check]] = {loader: [] for loader in LOADERS}


def check(*loaders: str) -> Callable[[Check], Check]:
    """Register a check for these loaders."""

    def register(function: Check) -> Check:
        for loader in loaders:
            CHECKS[loader].append(function)
        return function

    return register
