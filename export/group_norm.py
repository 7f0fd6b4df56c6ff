"""Group normalization of many values, whose sums runtimes would round too often.

ONNX Runtime and OpenVINO add the values of a group one after another: of 2**20 they keep 100 and 109 dB (PyTorch: 145),
and 30 such layers, as a decoder of large images has, lose 20 more. Here rows are summed first and their sums then.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.onnx import symbolic_helper, symbolic_opset9, utils

MANY = 2**17  # values of a group; runtimes keep 120 dB and more of fewer
_NAME = "aten::group_norm"


@contextlib.contextmanager
def summed_by_rows(opset: int) -> Iterator[None]:
    """Let PyTorch's older exporter write group normalizations of `MANY` values so that their sums are precise."""
    utils.register_custom_op_symbolic(_NAME, _group_norm, opset)
    try:
        yield
    finally:
        utils.unregister_custom_op_symbolic(_NAME, opset)


@symbolic_helper.parse_args("v", "i", "v", "v", "f", "i")
def _group_norm(
    graph: Any, x: Any, groups: int, weight: Any, bias: Any, eps: float, cudnn: int
) -> Any:
    """Return the nodes; what is of free size, or small, is left to the runtime's own operation."""
    sizes = symbolic_helper._get_tensor_sizes(x)
    if not sizes or None in sizes[1:] or math.prod(sizes[1:]) // groups <= MANY:
        return symbolic_opset9.group_norm(graph, x, groups, weight, bias, eps, cudnn)
    by_group, by_channel = [1, groups, sizes[1] // groups], [-1, sizes[1]] + [1] * (len(sizes) - 2)

    def shaped(value: Any, shape: list[int]) -> Any:
        return graph.op("Reshape", value, _constant(graph, shape))

    def mean(rows: Any) -> Any:
        return _reduced(graph, "ReduceMean", shaped(rows, [0, groups, -1]))

    middle = graph.op("Expand", mean(_reduced(graph, "ReduceMean", x)), _constant(graph, by_group))
    centred = graph.op("Sub", x, shaped(middle, by_channel))
    length = _reduced(graph, "ReduceL2", centred)
    squares = mean(graph.op("Mul", length, length))
    variance = graph.op("Div", squares, _constant(graph, float(sizes[-1])))
    deviation = graph.op("Sqrt", graph.op("Add", variance, _constant(graph, eps)))
    scale = graph.op("Div", shaped(weight, by_group), deviation)
    scaled = graph.op("Mul", centred, shaped(scale, by_channel))
    return graph.op("Add", scaled, shaped(bias, by_channel))


def _reduced(graph: Any, operation: str, value: Any) -> Any:
    """Return an operation over the last axis, which newer operator sets take as an input."""
    if graph.opset < 18:
        return graph.op(operation, value, axes_i=[-1])
    return graph.op(operation, value, _constant(graph, [-1]))


def _constant(graph: Any, value: Any) -> Any:
    return graph.op("Constant", value_t=torch.tensor(value))
