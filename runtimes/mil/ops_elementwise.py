"""Ops that treat every element alone: arithmetic, comparison, activations, casts, quantization."""

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.errors import ContractError

from .registry import enter_all, op

enter_all(
    {
        "abs": torch.abs,
        "acos": torch.acos,
        "asin": torch.asin,
        "atan": torch.atan,
        "atanh": torch.atanh,
        "ceil": torch.ceil,
        "cos": torch.cos,
        "cosh": torch.cosh,
        "erf": torch.erf,
        "exp": torch.exp,
        "exp2": torch.exp2,
        "floor": torch.floor,
        "logical_not": torch.logical_not,
        "relu6": functional.relu6,
        "round": torch.round,
        "sigmoid": torch.sigmoid,
        "sign": torch.sign,
        "silu": functional.silu,
        "sin": torch.sin,
        "sinh": torch.sinh,
        "softplus": functional.softplus,
        "softsign": functional.softsign,
        "sqrt": torch.sqrt,
        "square": torch.square,
        "tan": torch.tan,
        "tanh": torch.tanh,
    },
    "x",
)
enter_all({"relu": torch.relu, "identity": lambda x: x}, "x", moves=True)
enter_all(
    {
        "add": torch.add,
        "equal": torch.eq,
        "floor_div": torch.floor_divide,
        "greater": torch.gt,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
        "logical_and": torch.logical_and,
        "logical_or": torch.logical_or,
        "logical_xor": torch.logical_xor,
        "mod": torch.remainder,
        "mul": torch.mul,
        "not_equal": torch.ne,
        "pow": torch.pow,
        "real_div": torch.div,
        "sub": torch.sub,
    },
    "x",
    "y",
)
enter_all({"maximum": torch.maximum, "minimum": torch.minimum}, "x", "y", moves=True)
enter_all({"select": torch.where}, "cond", "a", "b", moves=True)

_INTEGER_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@op("cast")
def _cast(x: Tensor, dtype: str) -> Tensor:
    if dtype == "bool":
        return x != 0
    return x.float() if dtype.startswith("fp") else x.to(torch.int32)


@op("clip")
def _clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@op("elu")
def _elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x < 0, alpha * torch.expm1(x), x)


@op("leaky_relu")
def _leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x < 0, alpha * x, x)


@op("gelu")
def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


@op("inverse")
def _inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


@op("log")
def _log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@op("rsqrt")
def _rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@op("quantize")
def _quantize(
    input: Tensor,  # noqa: A002 the op's own word
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    if output_dtype not in _INTEGER_RANGES:
        msg = f"The evaluator quantizes to {', '.join(_INTEGER_RANGES)}, not to {output_dtype}."
        raise ContractError(msg)
    levels = torch.round(input / _along(scale, axis, input))
    if zero_point is not None:
        levels = levels + _along(zero_point, axis, input)
    return levels.clamp(*_INTEGER_RANGES[output_dtype])


@op("dequantize")
def _dequantize(
    input: Tensor,  # noqa: A002 the op's own word
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    levels = input if zero_point is None else input - _along(zero_point, axis, input)
    return levels * _along(scale, axis, input)


def _along(parameter: Tensor, axis: int | None, data: Tensor) -> Tensor:
    """Shape a scalar or a vector so that it broadcasts along one axis of the data."""
    if parameter.dim() == 0 or axis is None:
        return parameter
    shape = [1] * data.dim()
    shape[axis] = -1
    return parameter.reshape(shape)
