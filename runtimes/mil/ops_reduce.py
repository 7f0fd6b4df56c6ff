"""Ops that sum up along axes."""

from collections.abc import Callable

import torch
from torch import Tensor

from .registry import op

_Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]

_REDUCTIONS: dict[str, _Reduce] = {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "reduce_log_sum_exp": torch.logsumexp,
    "reduce_max": torch.amax,
    "reduce_mean": torch.mean,
    "reduce_min": torch.amin,
    "reduce_sum": torch.sum,
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keep),
}


def _enter(name: str, reduce: _Reduce) -> None:
    @op(name, moves=name in ("reduce_max", "reduce_min"))
    def _(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:  # noqa: FBT001, FBT002 a MIL input
        return reduce(x, tuple(range(x.dim()) if axes is None else axes), keep_dims)


for _name, _reduce in _REDUCTIONS.items():
    _enter(_name, _reduce)


@op("reduce_prod")
def _reduce_prod(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:  # noqa: FBT001, FBT002 a MIL input
    for axis in sorted(
        (a % x.dim() for a in (range(x.dim()) if axes is None else axes)), reverse=True
    ):
        x = x.prod(axis, keepdim=keep_dims)
    return x


@op("reduce_argmax", ignored=("output_dtype",))
def _reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False) -> Tensor:  # noqa: FBT001, FBT002 a MIL input
    return x.argmax(axis, keep_dims)


@op("reduce_argmin", ignored=("output_dtype",))
def _reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False) -> Tensor:  # noqa: FBT001, FBT002 a MIL input
    return x.argmin(axis, keep_dims)


@op("cumsum")
def _cumsum(
    x: Tensor,
    axis: int = 0,
    exclusive: bool = False,  # noqa: FBT001, FBT002 a MIL input
    reverse: bool = False,  # noqa: FBT001, FBT002 a MIL input
) -> Tensor:
    ordered = x.flip(axis) if reverse else x
    total = ordered.cumsum(axis)
    total = total - ordered if exclusive else total
    return total.flip(axis) if reverse else total
