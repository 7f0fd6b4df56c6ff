"""A saved ML Program, resolved once into a list of steps and run over numpy arrays.

Arithmetic is *wide*: every op is computed in float32 and its result is rounded to the dtype that the
program declares for it, so that float16 overflow and rounding show where a device would show them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedistill.mlpackage import quiet_coremltools, read_package

from .plan import Plan, dtype_of, rounded

Observer = Callable[[str, str, np.ndarray], None]

_NUMPY = {"fp16": np.float16, "fp32": np.float32, "bool": np.bool_}


@dataclass(frozen=True)
class Port:
    """One input or output.

    Fields:
        name: Its name in the package.
        shape: Its sizes.
        dtype: Its element type in Core ML's words: ``fp16``, ``fp32``, ``int32``, ``bool``.
        place: Where its value stands in memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: int


class MilProgram:
    """The function `main` of an ML Program; weights are decompressed and kept when it is made.

    Args:
        function: A function of coremltools' intermediate language.
        opset: Name of its op set, for messages, such as ``"iOS17"``.

    Raises:
        ContractError: If it uses an op, or an input of an op, that the evaluator does not know.
    """

    def __init__(self, function: Any, opset: str) -> None:
        plan = Plan(opset)
        self.inputs = _ports(plan, function.inputs.values())
        for operation in function.operations:
            plan.add(operation)
        self.outputs = _ports(plan, function.outputs)
        self._memory = plan.memory
        self._steps = plan.finish(port.place for port in self.outputs)

    @classmethod
    def load(cls, path: Path) -> "MilProgram":
        """Read an ``.mlpackage``.

        Raises:
            BundleError: If there is no package, or it cannot be read.
            ContractError: If it is not an ML Program, or uses what the evaluator does not know.
            MissingDependencyError: If coremltools is not installed.
        """
        package = read_package(path)
        with quiet_coremltools():
            from coremltools.converters.mil.frontend.milproto.load import load

            spec = package.get_spec()
            program = load(spec, spec.specificationVersion, package.weights_dir)
        function = program.functions["main"]
        return cls(function, function.opset_version.name)

    @torch.inference_mode()
    def run(
        self, feeds: Mapping[str, np.ndarray], observe: Observer | None = None
    ) -> dict[str, np.ndarray]:
        """Evaluate.

        Args:
            feeds: One array per input, of the declared shape.
            observe: Called with the op's type, the result's name and its value after every op.

        Returns:
            One array per output.
        """
        memory = self._memory.copy()
        for port in self.inputs:
            memory[port.place] = rounded(torch.tensor(np.asarray(feeds[port.name])), port.dtype)
        for step in self._steps:
            results = step.call(memory)
            for place, result in zip(step.targets, results, strict=True):
                memory[place] = result
            if observe is not None:
                for name, result in zip(step.names, results, strict=False):
                    observe(step.op_type, name, result.numpy())
            for place in step.spent:
                memory[place] = None
        return {
            port.name: memory[port.place].numpy().astype(_NUMPY.get(port.dtype, np.int32))
            for port in self.outputs
        }


def _ports(plan: Plan, variables: Iterable[Any]) -> tuple[Port, ...]:
    return tuple(
        Port(var.name, tuple(var.shape), dtype_of(var), plan.place(var)) for var in variables
    )
