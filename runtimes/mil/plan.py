"""From the ops of an ML Program to steps over numbered places, with all constants worked out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgedistill.errors import ContractError

from . import constexpr, ops_elementwise, ops_layers, ops_reduce, ops_shape
from .registry import OPS, REQUIRED, Definition

_LARGE = 100_000  # values; such constants stay as they are stored, and each use widens its own

# Imported for the ops that they enter into the table.
FAMILIES = (constexpr, ops_elementwise, ops_layers, ops_reduce, ops_shape)


def dtype_of(var: Any) -> str:
    """Return the declared element type of a MIL variable, such as ``"fp16"``."""
    from coremltools.converters.mil.mil import types

    return types.builtin_to_string(var.dtype)


def rounded(value: Tensor, dtype: str) -> Tensor:
    """Round to what a dtype can hold; floats stay float32 tensors and integers int32 tensors."""
    if dtype == "fp16":
        return value.half().float()
    if dtype == "bool":
        return value.bool()
    return value.float() if dtype == "fp32" else value.to(torch.int32)


def _wide(value: Any) -> Any:
    """Return a large constant as the ops take it."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.half else value


@dataclass(frozen=True, slots=True)
class Step:
    """One call: read `sources`, run, write `targets`, forget `spent`; all are places in memory.

    A step that only prepares the input of another has no names.
    """

    op_type: str
    names: tuple[str, ...]
    run: Callable[..., Any]
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    spent: tuple[int, ...] = ()

    def call(self, memory: Sequence[Any]) -> tuple[Any, ...]:
        """Return the results for what stands in memory."""
        made = self.run(*[_wide(memory[place]) for place in self.sources])
        return made if isinstance(made, tuple) else (made,)


class Plan:
    """Memory with the constants in place, and the steps that fill the rest.

    Args:
        opset: Name of the program's op set, for messages, such as ``"iOS17"``.
    """

    def __init__(self, opset: str) -> None:
        self.memory: list[Any] = []
        self._opset = opset
        self._steps: list[Step] = []
        self._places: dict[Any, int] = {}
        self._raw: dict[Any, Any] = {}
        self._fixed: set[int] = set()

    def add(self, operation: Any) -> None:
        """Resolve one operation; it is run now if all that it reads is constant.

        Raises:
            ContractError: If the evaluator does not know the op, or one of its inputs.
        """
        if operation.op_type == "const":
            self._raw[operation.outputs[0]] = operation.val.val
            return
        definition = self._definition(operation)
        sources = tuple(self._source(operation, name, definition) for name in definition.defaults)
        self._run(
            Step(
                operation.op_type,
                tuple(var.name for var in operation.outputs),
                _rounding(definition, tuple(dtype_of(var) for var in operation.outputs)),
                sources,
                tuple(self.place(var) for var in operation.outputs),
            )
        )

    def place(self, var: Any) -> int:
        """Return the place of a variable's tensor."""
        if var not in self._places:
            value = self._raw.get(var)
            self._places[var] = (
                self._new() if value is None else self._constant(_tensor(value, dtype_of(var)))
            )
        return self._places[var]

    def finish(self, results: Iterable[int]) -> list[Step]:
        """Return the steps, each forgetting what none after it reads."""
        wanted = self._fixed | set(results)
        finished = []
        for step in reversed(self._steps):
            last = {*step.sources, *step.targets} - wanted
            wanted |= last
            finished.append(replace(step, spent=tuple(sorted(last))))
        return finished[::-1]

    def _definition(self, operation: Any) -> Definition:
        definition = OPS.get(operation.op_type)
        if definition is None:
            msg = (
                f"The Core ML reference evaluator does not know the op `{operation.op_type}` (op set {self._opset}); "
                "run the package on macOS, or add the op to runtimes/mil."
            )
            raise ContractError(msg)
        given = {name for name, var in operation.inputs.items() if var is not None}
        if unknown := given - set(definition.defaults) - set(definition.ignored):
            msg = (
                f"The Core ML reference evaluator does not know the input {', '.join(sorted(unknown))} of the op "
                f"`{operation.op_type}` (op set {self._opset}); run the package on macOS, or add it to runtimes/mil."
            )
            raise ContractError(msg)
        return definition

    def _source(self, operation: Any, name: str, definition: Definition) -> int:
        given = operation.inputs.get(name)
        if given is None:
            default = definition.defaults[name]
            assert default is not REQUIRED, f"{operation.op_type} without {name}"
            return self._constant(default)
        if isinstance(given, list | tuple):
            return self._derived(_listed, *[self.place(var) for var in given])
        if name in definition.tensors:
            return self.place(given)
        if given in self._raw:
            return self._constant(_plain(self._raw[given]))
        return self._derived(Tensor.tolist, self.place(given))

    def _derived(self, run: Callable[..., Any], *sources: int) -> int:
        target = self._new()
        self._run(Step("", (), run, sources, (target,)))
        return target

    def _run(self, step: Step) -> None:
        if not self._fixed.issuperset(step.sources):
            self._steps.append(step)
            return
        for place, result in zip(step.targets, step.call(self.memory), strict=True):
            self.memory[place] = result
        self._fixed.update(step.targets)

    def _new(self) -> int:
        self.memory.append(None)
        return len(self.memory) - 1

    def _constant(self, value: Any) -> int:
        place = self._new()
        self.memory[place] = value
        self._fixed.add(place)
        return place


def _rounding(definition: Definition, dtypes: tuple[str, ...]) -> Callable[..., Any]:
    run = definition.run
    if definition.moves:
        return run
    if len(dtypes) == 1:
        return lambda *given: rounded(run(*given), dtypes[0])
    return lambda *given: tuple(map(rounded, run(*given), dtypes))


def _listed(*items: Any) -> list[Any]:
    return list(items)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _tensor(value: Any, dtype: str) -> Tensor:
    if dtype == "fp16" and np.size(value) >= _LARGE:
        return torch.from_numpy(np.require(value, requirements="W"))
    held = {"fp16": np.float32, "fp32": np.float32, "bool": np.bool_}.get(dtype, np.int32)
    return torch.from_numpy(np.array(value, dtype=held))
