"""ONNX files before and after NNCF: read, put right, count, write."""

import math
from pathlib import Path
from typing import Any

from edgedistill.errors import require

EXTERNAL_ABOVE = (
    400_000_000  # bytes of weights; one protobuf message is held whole, and ends at 2 GiB
)
_INLINE_BELOW = 1024  # bytes; shapes stay readable in the graph
_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}


def read(path: Path) -> Any:
    """Read a model; weights that lie beside it stay there, for NNCF refuses a model of over 2 GB that holds them."""
    return require("onnx", "onnx").load(path, load_external_data=False)


def backend_params(path: Path) -> dict[str, Any]:
    """Return what NNCF must be told to find the weights beside a model, and loads them into what it makes."""
    return {"external_data_dir": str(path.parent.resolve())}


def write(model: Any, path: Path) -> tuple[int, int]:
    """Write a model, large weights to one file beside it; return how many are integers and how many are not.

    Args:
        model: Holds its weights; it is of no use afterwards.
        path: The ``.onnx`` file; above `EXTERNAL_ABOVE` the weights go to ``.onnx_data`` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _flatten_scales(model)
    # NNCF infers shapes for itself; runtimes infer them anyway, and they outweigh a small network's weights.
    del model.graph.value_info[:]
    counted = _count(model)
    size = sum(len(item.raw_data) for item in model.graph.initializer)
    require("onnx", "onnx").save(
        model,
        path,
        save_as_external_data=size > EXTERNAL_ABOVE,
        location=f"{path.name}_data",
        size_threshold=_INLINE_BELOW,
    )
    return counted


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
