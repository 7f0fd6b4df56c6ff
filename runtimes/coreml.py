"""Core ML: Apple's own on macOS, and everywhere else the reference evaluator of the saved program."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.contract import Signature
from edgedistill.errors import ConfigError, require
from edgedistill.mlpackage import quiet_coremltools, read_package
from edgedistill.network import Session, check_graph

from .options import accept

REFERENCE = "reference"
COMPUTE_UNITS = {"all": "ALL", "ane": "CPU_AND_NE", "gpu": "CPU_AND_GPU", "cpu": "CPU_ONLY"}


def open(path: Path, signature: Signature, options: Mapping[str, Any]) -> Session:  # noqa: A001
    """Open an ``.mlpackage``.

    Args:
        path: The package.
        signature: Its inputs and outputs.
        options: ``device``: ``"all"``, ``"ane"`` (the Neural Engine), ``"gpu"`` or ``"cpu"`` of a Mac, or
            ``"reference"``, the evaluator, which is all there is elsewhere; and ``threads`` of the
            evaluator (1, the fastest for small networks; 0: torch's choice).

    Raises:
        BundleError: If the package is damaged, or its names are not the signature's.
        ConfigError: If an option is unknown, or asks for Core ML where there is none.
        ContractError: If the program uses an op that the evaluator does not know.
        MissingDependencyError: If coremltools or torch is not installed.
    """
    device, threads = _chosen(options)
    if device == REFERENCE:
        return _open_reference(path, signature, threads)
    return _open_core_ml(path, signature, COMPUTE_UNITS[device])


def describe(options: Mapping[str, Any]) -> str:
    """Say what runs a network under these options: Core ML on which units, or the evaluator."""
    device, _ = _chosen(options)
    if device == REFERENCE:
        return "Core ML reference evaluator (not the Neural Engine)"
    return f"Core ML (macOS {platform.mac_ver()[0]}, {COMPUTE_UNITS[device]})"


def _chosen(options: Mapping[str, Any]) -> tuple[str, int]:
    """Return device and threads."""
    devices = [*COMPUTE_UNITS, REFERENCE] if _on_macos() else [REFERENCE]
    chosen = accept("coreml", options, device=devices[0], threads=1)
    device = str(chosen["device"]).lower()
    if device not in devices:
        why = "" if _on_macos() else ", for Core ML itself is on macOS only"
        msg = f"Runtime 'coreml' has no device {device!r} here; choose one of {', '.join(devices)}{why}."
        raise ConfigError(msg)
    return device, int(chosen["threads"])


def _on_macos() -> bool:
    return sys.platform == "darwin"


def _open_reference(path: Path, signature: Signature, threads: int) -> Session:
    torch = require("torch", "coreml")
    from .mil import MilProgram

    program = MilProgram.load(path)
    inputs = (port.name for port in program.inputs)
    check_graph(path, signature, inputs, (port.name for port in program.outputs))

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            return program.run(feeds)
        finally:
            torch.set_num_threads(before)  # others in this process use torch too

    return run


def _open_core_ml(path: Path, signature: Signature, units: str) -> Session:
    description = read_package(path).get_spec().description
    outputs = [item.name for item in description.output]
    check_graph(path, signature, (item.name for item in description.input), outputs)
    with quiet_coremltools() as coremltools:
        compute_unit = coremltools.ComputeUnit[units]
        model = coremltools.models.MLModel(str(path), compute_units=compute_unit)

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = model.predict(dict(feeds))
        return {name: np.asarray(made[name]) for name in outputs}

    return run
