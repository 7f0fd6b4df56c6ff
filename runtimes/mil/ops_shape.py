"""Ops that move values or make them from shapes: reshape, slice, gather, concat, fill."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.errors import ContractError

from .registry import op


@op("reshape", moves=True)
def _reshape(x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(shape)


@op("transpose", moves=True)
def _transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@op("expand_dims", moves=True)
def _expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", moves=True)
def _squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@op("concat", moves=True)
def _concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:  # noqa: FBT001, FBT002 a MIL input
    if interleave:
        axis %= values[0].dim()
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


@op("stack", moves=True)
def _stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


@op("split", moves=True)
def _split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    return x.split(split_sizes or x.shape[axis] // (num_splits or 1), axis)


@op("slice_by_index", moves=True)
def _slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    if stride is not None and min(stride) < 0:
        msg = f"The evaluator slices forwards only, got the stride {stride}; reverse the axis instead."
        raise ContractError(msg)
    index: list[int | slice] = []
    for axis, (first, last) in enumerate(zip(begin, end, strict=True)):
        if squeeze_mask is not None and squeeze_mask[axis]:
            index.append(first)
            continue
        index.append(
            slice(
                None if begin_mask is not None and begin_mask[axis] else first,
                None if end_mask is not None and end_mask[axis] else last,
                None if stride is None else stride[axis],
            )
        )
    return x[tuple(index)]


@op("slice_by_size", moves=True)
def _slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    pairs = zip(begin, size, strict=True)
    return x[tuple(slice(at, None if n == -1 else at + n) for at, n in pairs)]


@op("reverse", moves=True)
def _reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(tuple(range(x.dim())) if axes is None else tuple(axes))


@op("tile", moves=True)
def _tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.repeat(reps)


@op("pad", moves=True)
def _pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)]
    while mode != "constant" and pairs[0] == [0, 0]:
        pairs = pairs[1:]  # PyTorch reflects and replicates only as many axes as it is told of
    flat = [size for pair in reversed(pairs) for size in pair]
    if mode == "constant":
        return functional.pad(x, flat, value=constant_val)
    leading = x.shape[: x.dim() - len(pairs)]
    padded = functional.pad(
        x.reshape(1, math.prod(leading), *x.shape[len(leading) :]), flat, mode=mode
    )
    return padded.reshape(*leading, *padded.shape[2:])


@op("gather", moves=True, ignored=("validate_indices",))
def _gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        msg = f"The evaluator's `gather` knows no batch dimensions, got {batch_dims}; choose an earlier deployment target."
        raise ContractError(msg)
    axis %= x.dim()
    picked = x.index_select(axis, _positive(indices, x.shape[axis]).flatten())
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@op("gather_along_axis", moves=True, ignored=("validate_indices",))
def _gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return torch.take_along_dim(x, _positive(indices, x.shape[axis]).long(), axis)


@op("gather_nd", moves=True, ignored=("validate_indices",))
def _gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        msg = f"The evaluator's `gather_nd` knows no batch dimensions, got {batch_dims}; choose an earlier deployment target."
        raise ContractError(msg)
    return x[tuple(indices.long().unbind(-1))]


@op("shape")
def _shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@op("fill")
def _fill(shape: list[int], value: Tensor) -> Tensor:
    return value.expand(shape)


@op("fill_like")
def _fill_like(ref_tensor: Tensor, value: Tensor) -> Tensor:
    return value.expand(ref_tensor.shape)


@op("range_1d")
def _range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@op("pixel_shuffle", moves=True)
def _pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return functional.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle", moves=True)
def _pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return functional.pixel_unshuffle(x, downscale_factor)


@op("upsample_nearest_neighbor", moves=True)
def _upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Tensor:
    return functional.interpolate(
        x, scale_factor=(float(scale_factor_height), float(scale_factor_width)), mode="nearest"
    )


@op("resize_nearest_neighbor", moves=True)
def _resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return functional.interpolate(x, size=(target_size_height, target_size_width), mode="nearest")


def _positive(indices: Tensor, size: int) -> Tensor:
    return torch.where(indices < 0, indices + size, indices)
