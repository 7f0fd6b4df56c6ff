"""ONNX files before and after NNCF: read, put right, count, write."""

import math
from pathlib import Path
from typing import Any

from edgedistill.errors import require

_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}


def read(path: Path) -> Any:
    """Read a model with its weights."""
    return require("onnx", "onnx").load(path)


def write(model: Any, path: Path) -> tuple[int, int]:
    """Write a model; return how many weights are integers and how many are not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _flatten_scales(model)
    # NNCF infers shapes for itself; runtimes infer them anyway, and they outweigh a small network's weights.
    del model.graph.value_info[:]
    require("onnx", "onnx").save(model, path)
    return _count(model)


def _flatten_scales(model: Any) -> None:
    """Give the scales and zero points of weights the one dimension that ONNX asks for.

    NNCF 3.4 writes (O, 1, 1) for the weights of a convolution, which ONNX Runtime refuses when it runs.
    """
    held = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held:
            for name in node.input[1:]:
                dims = held[name].dims
                if len(dims) > 1:
                    dims[:] = [math.prod(dims)]


def _count(model: Any) -> tuple[int, int]:
    held = {item.name: len(item.dims) for item in model.graph.initializer}
    dequantized = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in held
    }
    names = [
        node.input[_WEIGHTED[node.op_type]]
        for node in model.graph.node
        if node.op_type in _WEIGHTED
    ]
    compressed = sum(name in dequantized for name in names)
    return compressed, sum(held.get(name, 0) > 1 for name in names)
