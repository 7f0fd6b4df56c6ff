"""The pass of coremltools that makes a program float16, where weights are gigabytes.

The stock one makes index arrays of several times a weight's size to look for overflow, and keeps all weights in float32
and in float16 at once. This one makes the same program; its weights lie in a file until they are written.
"""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.converters.mil.mil.passes.defs.quantization import add_fp16_cast
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

EMBEDDING_OPS = ("sin", "cos")
_STOCK = "common::add_fp16_cast"
_DEAD = "common::dead_code_elimination"  # here it is what drops the weights in float32
_MOST = float(np.finfo(np.float16).max)
_INFINITE = 1e38  # what coremltools takes for an infinity, which float16 has too
_LARGE = 100_000  # values


def passes(stock: list[str]) -> list[str]:
    """Return the passes of a pipeline with those of this module in place."""
    where = stock.index(_STOCK)
    dropped = stock.index(_DEAD, where) + 1
    return [
        *stock[:where],
        "edgedistill::halve",
        *stock[where + 1 : dropped],
        "edgedistill::give_back",
        *stock[dropped:],
    ]


@register_pass(namespace="edgedistill")
class halve(add_fp16_cast):  # noqa: N801 (its name in a pipeline)
    """Compute in float16, but for the sinusoids of timestep and guidance and all that leads to them.

    Options:
        folder: Where large weights lie until they are written.
    """

    folder = Path()

    def apply(self, prog: Any) -> None:
        """Change a program."""
        self._precise = {
            name
            for function in prog.functions.values()
            for name in leading_to(function.operations, EMBEDDING_OPS)
        }
        super().apply(prog)

    def is_valid_op(self, op: Any) -> bool:
        """Say whether an op can be computed in float16."""
        return op.name not in self._precise and super().is_valid_op(op)

    @staticmethod
    def fp16_overflow(op: Any) -> bool:
        """Say whether a constant that an op reads is finite and no longer would be."""
        return any(
            _overflows(np.asarray(var.val))
            for var in _read(op)
            if var.op is not None
            and var.op.op_type == "const"
            and var.is_tensor_or_scalar_of(dtype="fp32")
        )

    def _check_underflow_to_zero(self, new_var: Any, var: Any) -> None:
        """Put a large weight aside as soon as it is halved; the stock pass looks at small ones only."""
        if new_var.val is None or new_var.val.size < _LARGE:
            super()._check_underflow_to_zero(new_var, var)
        else:
            new_var._sym_val.val = self._aside(new_var.val)

    def _aside(self, value: np.ndarray) -> np.ndarray:
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            file.write(np.ascontiguousarray(value).data)
        return np.asarray(np.memmap(file.name, value.dtype, "r", shape=value.shape))


@register_pass(namespace="edgedistill")
class give_back(AbstractGraphPass):  # noqa: N801
    """Give back the memory of what earlier passes dropped: ops and their values hold each other."""

    def apply(self, prog: Any) -> None:  # noqa: ARG002
        """Collect it."""
        gc.collect()


def _overflows(value: np.ndarray) -> bool:
    if max(value.max(initial=0), -value.min(initial=0)) <= _MOST:
        return False
    size = np.abs(value)
    return bool(size[size < _INFINITE].max(initial=0) > _MOST)


def leading_to(operations: Any, kinds: tuple[str, ...]) -> set[str]:
    """Return the names of the ops of some kinds and of all that they are computed from."""
    open_ends = [operation for operation in operations if operation.op_type in kinds]
    found: set[str] = set()
    while open_ends:
        operation = open_ends.pop()
        found.add(operation.name)
        open_ends += [
            var.op for var in _read(operation) if var.op is not None and var.op.name not in found
        ]
    return found


def _read(operation: Any) -> Iterator[Any]:
    for given in operation.inputs.values():
        yield from (
            var
            for var in (given if isinstance(given, list | tuple) else [given])
            if var is not None
        )
