"""Core ML: Apple's own on macOS, and everywhere else the reference evaluator of the saved program."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.contract import Signature
from edgedistill.errors import BundleError, ConfigError, require
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
            evaluator (1, the fastest for small networks; 0: torch's choice); and ``compiled``: run the
            ``.mlmodelc`` beside the package, as an app would, where Core ML would compile the package anew.

    Raises:
        BundleError: If the package is damaged, its names are not the signature's, or it was not compiled.
        ConfigError: If an option is unknown, or asks for Core ML where there is none.
        ContractError: If the program uses an op that the evaluator does not know.
        MissingDependencyError: If coremltools or torch is not installed.
    """
    device, threads, compiled = _chosen(options)
    if device == REFERENCE:
        return _open_reference(path, signature, threads)
    return _open_core_ml(path, signature, COMPUTE_UNITS[device], compiled=compiled)


def describe(options: Mapping[str, Any]) -> str:
    """Say what runs a network under these options: Core ML on which units, or the evaluator."""
    device, _, compiled = _chosen(options)
    if device == REFERENCE:
        return "Core ML reference evaluator (not the Neural Engine)"
    what = ", compiled models" if compiled else ""
    return f"Core ML (macOS {platform.mac_ver()[0]}, {COMPUTE_UNITS[device]}{what})"


def _chosen(options: Mapping[str, Any]) -> tuple[str, int, bool]:
    """Return device, threads, and whether what was compiled is run."""
    devices = [*COMPUTE_UNITS, REFERENCE] if _on_macos() else [REFERENCE]
    chosen = accept("coreml", options, device=devices[0], threads=1, compiled=False)
    device = str(chosen["device"]).lower()
    if device not in devices:
        why = "" if _on_macos() else ", for Core ML itself is on macOS only"
        msg = f"Runtime 'coreml' has no device {device!r} here; choose one of {', '.join(devices)}{why}."
        raise ConfigError(msg)
    compiled = bool(chosen["compiled"])
    if compiled and device == REFERENCE:
        msg = "A compiled model is run by Core ML itself, on macOS only; leave --compiled out, or choose another --device there."
        raise ConfigError(msg)
    return device, int(chosen["threads"]), compiled


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


def _open_core_ml(path: Path, signature: Signature, units: str, *, compiled: bool) -> Session:
    description = read_package(path).get_spec().description
    outputs = [item.name for item in description.output]
    check_graph(path, signature, (item.name for item in description.input), outputs)
    place = path.with_suffix(".mlmodelc") if compiled else path
    if not place.is_dir():
        msg = f"{place}: no such compiled model; make it with `sh coreml/compile_on_mac.sh` in the bundle, name what was compiled with --artifact, or leave --compiled out."
        raise BundleError(msg)
    with quiet_coremltools() as coremltools:
        models = coremltools.models
        opened = models.CompiledMLModel if compiled else models.MLModel
        model = opened(str(place), compute_units=coremltools.ComputeUnit[units])

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = model.predict(dict(feeds))
        return {name: np.asarray(made[name]) for name in outputs}

    return run
