"""Group normalization of many values, whose sums runtimes would round too often.

ONNX Runtime and OpenVINO add the values of a group one after another: of 2**20 they keep 100 and 109 dB (PyTorch: 145),
and 30 such layers, as a decoder of large images has, lose 20 more. Here rows are summed first and their sums then.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MANY = 2**17  # values of a group; runtimes keep 120 dB and more of fewer


class SummedByRows(TorchFunctionMode):
    """Have group normalizations of more than `MANY` values recorded so that their sums are precise.

    Args:
        free: Whether height and width of the graph are free: how many values there will be is not known, and the
            normalizations stay as they are.
    """

    def __init__(self, *, free: bool) -> None:
        super().__init__()
        self._free = free

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call one function."""
        kwargs = kwargs or {}
        if self._free or func is not torch.nn.functional.group_norm:
            return func(*args, **kwargs)
        x, groups = args[:2]
        many = math.prod(map(int, x.shape[1:])) // groups > MANY
        return (_group_norm if many else func)(*args, **kwargs)


def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Return what PyTorch's function does."""
    channels, *sides = map(int, x.shape[1:])
    values = channels // groups * math.prod(sides[:-1])
    wide = (-1, channels, *(1 for _ in sides))
    middle = x.mean(-1, keepdim=True).reshape(-1, groups, values).mean(-1, keepdim=True)
    centred = x - (middle + torch.zeros(channels // groups)).reshape(wide)
    # One operation, where squares would be as large as all of x.
    length = torch.ops.aten.norm.ScalarOpt_dim(centred, 2, [-1], keepdim=True)
    squares = (length * length / sides[-1]).reshape(-1, groups, values)
    deviation = (squares.mean(-1, keepdim=True) + eps).sqrt()
    scale = weight.reshape(1, groups, -1) / deviation
    return centred * scale.reshape(wide) + bias.reshape(wide)
