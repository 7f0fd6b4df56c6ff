"""One network to one OpenVINO model: through ONNX, run once beside PyTorch, then put in place.

The way through ONNX was measured against conversion from PyTorch: half the time, the same dB, the names as declared,
and a Stable Diffusion UNet converts in seconds where the direct way took minutes.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgedistill.contract import Signature
from edgedistill.errors import ConfigError
from edgedistill.files import written_beside
from edgedistill.parity import floor_of
from edgedistill.telemetry import require_silent

from .checking import Check, check_file, named
from .frozen import Frozen, expected_of
from .onnx_to_openvino import convert
from .to_onnx import trace_onnx
from .worker import called

PRECISIONS = ("float32", "float16")


def write_openvino(
    network: nn.Module,
    signature: Signature,
    path: Path,
    *,
    precision: str = "float32",
    consume: bool = False,
) -> dict[str, Any]:
    """Write a network as OpenVINO IR.

    Args:
        network: In eval mode, without gradients.
        signature: Declared names, dtypes and shapes; the batch is fixed or free.
        path: The ``.xml`` file to write; its weights go beside it as ``.bin``.
        precision: Of the stored weights; inputs and outputs stay as declared. What a sinusoidal
            embedding is made of stays float32: its frequencies, rounded and then multiplied by a
            timestep of 999, cost 20 dB.
        consume: Give the network's memory back before it is converted; it is of no use afterwards. A large one
            is converted and checked in processes that never import torch.

    Returns:
        What made it: versions, and ``snr_db`` against PyTorch.

    Raises:
        BundleError: If the disk is full.
        CheckFailedError: If it leaves the floor of its precision.
        ConfigError: If the precision is not one of `PRECISIONS`.
        MissingDependencyError: If openvino or onnx is not installed.
    """
    if precision not in PRECISIONS:
        msg = f"OpenVINO models are written in {' or '.join(PRECISIONS)}, got {precision!r}."
        raise ConfigError(msg)
    ov = require_silent("openvino", "openvino")
    frozen = Frozen(network, signature)
    expected = expected_of(frozen)
    alone = consume and frozen.is_large
    with written_beside(path) as made:
        convert_openvino(frozen, made, precision=precision, consume=consume)
        check = Check("openvino", signature, expected, floor_of(precision).raw, {})
        snr_db = called(check_file, check, made, named(path), alone=alone, what=named(path))
    return {
        "converter": "openvino.convert_model from ONNX",
        "torch": torch.__version__,
        "openvino": ov.__version__.split("-", maxsplit=1)[0],
        "snr_db": snr_db,
    }


def convert_openvino(
    frozen: Frozen, path: Path, *, precision: str = "float32", consume: bool = False
) -> None:
    """Trace and convert, unchecked; arguments as of `write_openvino`."""
    alone = consume and frozen.is_large
    names = [spec.name for spec in frozen.signature.inputs]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        graph = Path(folder) / "network.onnx"
        # OpenVINO multiplies by transposed weights: those that ONNX's would cost it a copy each.
        trace_onnx(frozen, graph, transposed=False)
        if consume:
            frozen.release()
        title = type(frozen.network).__name__
        called(convert, graph, path, precision, names, title, alone=alone, what=named(path))
