"""What a network would compute, recorded as ONNX or TorchScript: no weight is read and nothing large is computed.

A recorder of PyTorch follows one call of the network, whose weights and all that is computed from them are blank: tensors
of the right shape and dtype that hold one zero. Stable Diffusion's UNet is recorded in seconds and in the memory of its
imports. For ONNX the weights are further inputs, which keeps the exporter's passes from copying them.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from edgedistill.errors import ContractError

from .frozen import Frozen, examples, free_axes
from .stages import stage

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def record(frozen: Frozen, path: Path, opset: int) -> Mapping[str, Tensor]:
    """Write the graph of a network, its weights being inputs after those of its signature.

    Args:
        frozen: The network; it is not changed.
        path: The ``.onnx`` file to write.
        opset: Version of the operator set.

    Returns:
        The weights by the names of their inputs: the network's own tensors, not copies.
    """
    stage("tracing")
    weights = _tensors(frozen)
    inputs, outputs = frozen.signature.inputs, frozen.signature.outputs
    free = {spec.name: axes for spec in (*inputs, *outputs) if (axes := free_axes(spec))}
    torch.onnx.export(
        _Emptied(frozen, weights),
        (*examples(frozen.signature), *map(_blank, weights.values())),
        path,
        opset_version=opset,
        input_names=[*(spec.name for spec in inputs), *weights],
        output_names=[spec.name for spec in outputs],
        dynamic_axes=free,
        dynamo=False,
    )
    return weights


def trace(frozen: Frozen) -> torch.jit.ScriptModule:
    """Record a call of a network as TorchScript, constants folded.

    Args:
        frozen: The network; it is not changed.

    Returns:
        A module whose parameters are the network's own tensors, not copies.
    """
    stage("tracing")
    weights = _tensors(frozen)
    traced = torch.jit.trace(
        _Blanked(frozen, weights), examples(frozen.signature), check_trace=False
    )
    for name, value in _tensors(traced).items():
        value.data = weights[name].data
    graph = traced.forward.graph
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_constant_propagation(graph)
    return traced


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, each once."""
    return dict([*network.named_parameters(), *network.named_buffers()])


class _Emptied(Frozen):
    """A network without tensors of its own: it takes them as inputs, after those of its signature.

    Args:
        frozen: What is copied, all but its tensors.
        weights: Its tensors, in the order of the inputs.
    """

    def __init__(self, frozen: Frozen, weights: Mapping[str, Tensor]) -> None:
        memo = {id(value): _blank(value) for value in weights.values()}
        network = copy.deepcopy(frozen.network, memo)
        super().__init__(network, frozen.signature)
        order = {id(value): index for index, value in enumerate(weights.values())}
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (held, name, order[id(value)])
            for module, twin in zip(frozen.modules(), self.modules(), strict=True)
            for values, held in (
                (module._parameters, twin._parameters),
                (module._buffers, twin._buffers),
            )
            for name, value in values.items()
            if value is not None
        ]
        self._clear()

    def forward(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for inputs and weights, blank where they depend on a blank."""
        count = len(self.signature.inputs)
        for held, name, index in self._places:
            held[name] = given[count + index]
        try:
            with ThreadPoolExecutor(1) as aside, _Recorded(), _Blanks(aside):
                return super().forward(*given[:count])
        finally:
            self._clear()

    def _clear(self) -> None:
        for held, name, _ in self._places:
            held[name] = None


class _Blanked(Frozen):
    """A network whose tensors are blank.

    Args:
        frozen: What is copied, all but its tensors.
        weights: Its tensors by name.
    """

    def __init__(self, frozen: Frozen, weights: Mapping[str, Tensor]) -> None:
        memo: dict[int, Any] = {
            id(value): nn.Parameter(_blank(value), requires_grad=False)
            if isinstance(value, nn.Parameter)
            else _blank(value)
            for value in weights.values()
        }
        super().__init__(copy.deepcopy(frozen.network, memo), frozen.signature)

    def forward(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs, blank where they depend on a blank."""
        with ThreadPoolExecutor(1) as aside, _Recorded(), _Blanks(aside):
            return super().forward(*given)


class _Blanks(TorchDispatchMode):
    """Compute shapes instead of values where an operation reads a blank.

    Args:
        aside: Another thread. Sizes are tensors in one that is recorded, and the functions that compute shapes want
            numbers.
    """

    def __init__(self, aside: ThreadPoolExecutor) -> None:
        super().__init__()
        self._aside = aside

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute one operation."""
        kwargs = kwargs or {}
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        blank = any(map(_is_blank, read))
        if blank and func is torch.ops.aten.convolution.default:
            msg = "A convolution of this network cannot be recorded: call it through torch.nn or torch.nn.functional."
            raise ContractError(msg)
        if not blank or torch.Tag.data_dependent_output in func.tags:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0]
        return self._aside.submit(_shapes, func, args, kwargs).result()


class _Recorded(TorchFunctionMode):
    """Have convolutions recorded: PyTorch records them below the place where `_Blanks` answers."""

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call one function."""
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            return _convolution(func, *args, **kwargs)
        if func in _TRANSPOSED:
            return _computed(func, *args, **kwargs)
        return func(*args, **kwargs)


def _convolution(
    func: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Call what a convolution is recorded as, where that is simple."""
    rank = _CONVOLUTIONS.index(func) + 1
    if isinstance(padding, str) or x.dim() != rank + 2:
        return _computed(func, x, weight, bias, stride, padding, dilation, groups)
    sizes = [
        [size] * rank if isinstance(size, int) else size for size in (stride, padding, dilation)
    ]
    transposed = benchmark = deterministic = cudnn = tf32 = False
    record_as: Any = torch._convolution
    return record_as(
        x,
        weight,
        bias,
        *sizes,
        transposed,
        [0] * rank,
        groups,
        benchmark,
        deterministic,
        cudnn,
        tf32,
    )


def _computed(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    with _disable_current_modes():
        return func(*args, **kwargs)


def _blank(like: Tensor) -> Tensor:
    zero = torch.zeros(1, dtype=like.dtype).untyped_storage()
    return torch.empty(0, dtype=like.dtype).set_(zero, 0, like.shape, [0] * like.dim())


def _is_blank(value: Tensor) -> bool:
    return value.untyped_storage().nbytes() == value.element_size() and value.numel() > 1


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operation on shapes alone."""
    on_shapes = functools.partial(tree_map_only, Tensor, lambda value: value.to("meta"))
    device = functools.partial(tree_map_only, torch.device, lambda _: torch.device("meta"))
    args, kwargs = device(on_shapes((args, kwargs)))
    return tree_map_only(Tensor, _blank, func(*args, **kwargs))
