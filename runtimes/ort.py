"""ONNX Runtime: one session per network, inputs and outputs copied (no IO binding)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.contract import Signature
from edgedistill.errors import BundleError, ConfigError
from edgedistill.network import Session, check_graph
from edgedistill.telemetry import require_silent

from .options import accept

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "gpu": "CUDAExecutionProvider",
}
_FATAL = 4


def open(path: Path, signature: Signature, options: Mapping[str, Any]) -> Session:  # noqa: A001
    """Open an ONNX file.

    Args:
        path: The file; weights above 2 GB lie beside it.
        signature: Its inputs and outputs.
        options: ``device`` (``"cpu"``, ``"cuda"``) or ``provider`` (the name of an execution provider),
            and ``threads`` (0: one per core).

    Raises:
        BundleError: If ONNX Runtime cannot read the file, or its names are not the signature's.
        ConfigError: If an option is unknown or the provider is not there.
        MissingDependencyError: If onnxruntime is not installed.
    """
    ort = require_silent("onnxruntime", "onnx")
    chosen = _chosen(options)
    provider = _provider(ort, chosen)
    settings = ort.SessionOptions()
    settings.log_severity_level = _FATAL
    settings.intra_op_num_threads = int(chosen["threads"])
    # A plan of all memory, made in the first call, takes it once more in the second: a fifth to a third of the peak.
    settings.enable_mem_pattern = False
    state = ort.capi.onnxruntime_pybind11_state
    try:
        session = ort.InferenceSession(path, settings, providers=[provider])
    except (state.Fail, state.InvalidProtobuf, state.InvalidGraph, state.NotImplemented) as error:
        msg = f"{path}: ONNX Runtime {ort.__version__} cannot open it ({_first_line(error)}); export it anew."
        raise BundleError(msg) from error
    outputs = [item.name for item in session.get_outputs()]
    check_graph(path, signature, (item.name for item in session.get_inputs()), outputs)

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))

    return run


def describe(options: Mapping[str, Any]) -> str:
    """Say what runs a network under these options: version and execution provider."""
    ort = require_silent("onnxruntime", "onnx")
    provider = _provider(ort, _chosen(options)).removesuffix("ExecutionProvider")
    return f"ONNX Runtime {ort.__version__} ({provider})"


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    return accept("onnxruntime", options, device="cpu", provider=None, threads=0)


def _provider(ort: Any, chosen: Mapping[str, Any]) -> str:
    device = str(chosen["device"]).lower()
    provider = chosen["provider"] or PROVIDERS.get(device, device)
    available: list[str] = ort.get_available_providers()
    if provider not in available:
        msg = f"ONNX Runtime has no provider for {provider!r} here; it has: {', '.join(available)}."
        raise ConfigError(msg)
    return str(provider)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
