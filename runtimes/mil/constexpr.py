"""Ops that unpack compressed weights: linear quantization, look-up tables, sparsity.

They are evaluated once, when a program is loaded. All data arrive unpacked, one element per number,
except in the iOS 16 forms of `constexpr_lut_to_dense` and `constexpr_sparse_to_dense`, which carry a
`shape` and bits packed from the least significant one up.
"""

import math

import torch
from torch import Tensor

from .registry import op


@op("constexpr_cast")
def _cast(source_val: Tensor, output_dtype: str) -> Tensor:  # noqa: ARG001 rounding follows the declared dtype
    return source_val


@op("constexpr_affine_dequantize")
def _affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    along = [1] * quantized_data.dim()
    along[axis] = -1
    return scale.reshape(along) * (quantized_data - zero_point.reshape(along))


@op("constexpr_blockwise_shift_scale")
def _blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    if offset is not None:
        data = data - _stretched(offset, data.shape)
    return _stretched(scale, data.shape) * data


@op("constexpr_lut_to_dense", moves=True)
def _lut_to_dense(
    indices: Tensor, lut: Tensor, shape: list[int] | None = None, vector_axis: int | None = None
) -> Tensor:
    if shape is not None:
        return lut[_unpacked(indices, int(math.log2(len(lut))), math.prod(shape))].reshape(shape)
    tables = _stretched(lut, indices.shape)
    picked = torch.take_along_dim(tables, indices.long()[..., None, None], -2).squeeze(-2)
    if vector_axis is None:
        return picked.squeeze(-1)
    axis = vector_axis % indices.dim()
    return picked.movedim(-1, axis + 1).flatten(axis, axis + 1)


@op("constexpr_sparse_to_dense", moves=True)
def _sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    if shape is not None:
        mask = _unpacked(mask, 1, math.prod(shape)).reshape(shape)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@op("constexpr_lut_to_sparse", moves=True)
def _lut_to_sparse(
    indices_mask: Tensor,
    indices_nonzero_data: Tensor,
    lut: Tensor,
    vector_axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    indices = _sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = _lut_to_dense(indices, lut, vector_axis=vector_axis)
    mask = indices_mask
    if vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


@op("constexpr_sparse_blockwise_shift_scale")
def _sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = _blockwise_shift_scale(_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def _stretched(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Repeat one entry per block over the block; further axes of `blocks` stay as they are."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] != size:
            blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return `count` unsigned numbers of `bits` bits from bytes, least significant bit first."""
    stream = (packed[:, None] >> torch.arange(8)) & 1
    groups = stream.flatten()[: bits * count].reshape(count, bits)
    return (groups << torch.arange(bits)).sum(1)
