"""Ops that mix elements: convolution, linear maps, attention, normalization, pooling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.errors import ContractError

from .registry import op

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_MAX_POOLS: dict[int, Callable[..., Any]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVG_POOLS: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


@op("conv")
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    rank = weight.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    pairs = _padding(pad_type, pad, x.shape[2:], reach, strides)
    if all(before == after for before, after in pairs):
        padding = [before for before, _ in pairs]
    else:
        x, padding = functional.pad(x, _flat(pairs)), [0] * rank
    return _CONVOLUTIONS[rank](x, weight, bias, strides, padding, dilations, groups)


@op("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


@op("matmul")
def _matmul(
    x: Tensor,
    y: Tensor,
    transpose_x: bool = False,  # noqa: FBT001, FBT002 a MIL input
    transpose_y: bool = False,  # noqa: FBT001, FBT002 a MIL input
) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


@op("einsum")
def _einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, values)


@op("softmax")
def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


@op("scaled_dot_product_attention")
def _scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask)


@op("layer_norm")
def _layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    chosen = sorted(axis % x.dim() for axis in (range(x.dim()) if axes is None else axes))
    centred = x - x.mean(chosen, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(chosen, keepdim=True) + epsilon)
    shape = [size if axis in chosen else 1 for axis, size in enumerate(x.shape)]
    return _affine(y, gamma, beta, shape)


@op("instance_norm")
def _instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    return functional.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


@op("batch_norm")
def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return functional.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


@op("max_pool")
def _max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,  # noqa: FBT001, FBT002 a MIL input
) -> Tensor:
    _refuse_ceil("max_pool", ceil_mode=ceil_mode)
    strides = strides or [1] * len(kernel_sizes)
    pairs = _padding(pad_type, pad, x.shape[2:], kernel_sizes, strides)
    padded = functional.pad(x, _flat(pairs), value=-torch.inf)
    return _MAX_POOLS[len(kernel_sizes)](padded, kernel_sizes, strides)


@op("avg_pool")
def _avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,  # noqa: FBT001, FBT002 a MIL input
    ceil_mode: bool = False,  # noqa: FBT001, FBT002 a MIL input
) -> Tensor:
    _refuse_ceil("avg_pool", ceil_mode=ceil_mode)
    strides = strides or [1] * len(kernel_sizes)
    flat = _flat(_padding(pad_type, pad, x.shape[2:], kernel_sizes, strides))
    pool = _AVG_POOLS[len(kernel_sizes)]
    means = pool(functional.pad(x, flat), kernel_sizes, strides)
    if not exclude_padding_from_average:
        return means
    return means / pool(functional.pad(torch.ones_like(x), flat), kernel_sizes, strides)


def _padding(
    pad_type: str,
    pad: list[int] | None,
    sizes: torch.Size,
    reach: list[int],
    strides: list[int],
) -> list[tuple[int, int]]:
    """Return the zeros before and after each spatial axis."""
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        given = pad or [0] * (2 * len(sizes))
        return [(given[i], given[i + 1]) for i in range(0, len(given), 2)]
    pairs = []
    for size, window, stride in zip(sizes, reach, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        small, large = total // 2, total - total // 2
        pairs.append((large, small) if pad_type == "same_lower" else (small, large))
    return pairs


def _flat(pairs: list[tuple[int, int]]) -> list[int]:
    """Return padding in PyTorch's order: last axis first."""
    return [size for pair in reversed(pairs) for size in pair]


def _affine(y: Tensor, gamma: Tensor | None, beta: Tensor | None, shape: list[int]) -> Tensor:
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _refuse_ceil(name: str, *, ceil_mode: bool) -> None:
    if ceil_mode:
        msg = f"The evaluator's `{name}` rounds sizes down only; convert with ceil_mode=False."
        raise ContractError(msg)
