"""An ONNX file to an OpenVINO model: weights stay mapped from the one file until they are written to the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.files import native_writer
from edgedistill.telemetry import require_silent

from .stages import stage


def convert(graph: Path, target: Path, precision: str, names: Sequence[str], title: str) -> None:
    """Write an ONNX file as OpenVINO IR.

    Args:
        graph: The ``.onnx`` file.
        target: The ``.xml`` file to write; its weights go beside it as ``.bin``.
        precision: Of the stored weights, ``"float32"`` or ``"float16"``.
        names: Of the inputs, in order.
        title: The model's name.

    Raises:
        BundleError: If the disk is full.
        MissingDependencyError: If openvino is not installed.
    """
    ov = require_silent("openvino", "openvino")
    stage("converting")
    model = ov.convert_model(graph)
    model.set_friendly_name(title)
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    del model.rt_info["conversion_parameters"]  # names the temporary file
    if precision == "float16":
        _halve_weights(ov, model)
    with native_writer("OpenVINO", target):
        ov.save_model(model, target, compress_to_fp16=False)


def _halve_weights(ov: Any, model: Any) -> None:
    """Store float32 constants as float16, but for those that the sinusoids are made of."""
    precise: set[str] = set()
    for node in model.get_ops():
        if node.get_type_name() in ("Sin", "Cos"):
            _add_sources(node, precise)
    for node in model.get_ordered_ops():
        is_weight = node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.f32
        if not is_weight or node.get_name() in precise:
            continue
        with np.errstate(over="ignore"):
            half = node.data.astype(np.float16)
        if np.isfinite(half).all():
            stored = ov.opset13.convert(ov.opset13.constant(half), "f32")
            stored.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(stored.output(0))


def _add_sources(node: Any, found: set[str]) -> None:
    for port in node.inputs():
        source = port.get_source_output().get_node()
        if source.get_name() not in found:
            found.add(source.get_name())
            _add_sources(source, found)
