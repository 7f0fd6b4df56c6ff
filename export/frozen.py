"""The only thing that is traced: one network, positional inputs in signature order, plain tensors out."""

import numpy as np
import torch
from torch import Tensor, nn

from edgedistill.contract import BATCH, Signature, TensorSpec
from edgedistill.models import store

from .checking import Expected
from .stages import stage
from .worker import AUTO, works_alone

LAST_TIMESTEP = 999.0
# Sizes to trace and to check with where the signature leaves them free.
FREE_SIZES = {BATCH: 2, "height": 16, "width": 24, "image_height": 64, "image_width": 96}
TOKENS_EXAMPLE = 16  # the smallest vocabulary here has 29


class Frozen(nn.Module):
    """A network with a fixed calling convention.

    Args:
        network: Without gradients; it is put into eval mode.
        signature: Names, order and shapes of what is traced.
    """

    def __init__(self, network: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.network = network
        self.signature = signature
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for inputs in the order of the signature; a single one is a plain tensor."""
        names = [spec.name for spec in self.signature.inputs]
        made = store.call_outputs(self.network, dict(zip(names, inputs, strict=True)))
        return made if len(made) > 1 else made[0]

    def run(self, *inputs: Tensor) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        with torch.inference_mode():
            made = self(*inputs)
        values = made if isinstance(made, tuple) else (made,)
        names = [spec.name for spec in self.signature.outputs]
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    @property
    def is_large(self) -> bool:
        """Whether its weights are worth a process of their own."""
        return works_alone(AUTO, sum(value.nbytes for value in self.state_dict().values()))

    def release(self) -> None:
        """Give the memory of the weights back; the network cannot be called any more."""
        for value in (*self.parameters(), *self.buffers()):
            value.data = torch.empty(0, dtype=value.dtype)


def examples(signature: Signature) -> tuple[Tensor, ...]:
    """Return inputs in signature order to trace and to check with.

    Timesteps run from the noisiest down, because float16 errs most there; free sizes are `FREE_SIZES`.
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(_example(spec, generator) for spec in signature.inputs)


def _example(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    shape = [FREE_SIZES[size] if isinstance(size, str) else size for size in spec.shape]
    match spec.kind, len(shape):
        case "t", 0:
            value = torch.tensor(LAST_TIMESTEP)
        case "t" | "s", _:
            value = torch.linspace(LAST_TIMESTEP, 0, shape[0])
        case "class" | "mask", _:
            ones = [1] * (len(shape) - 1)
            value = (torch.arange(shape[0]) % 2).reshape(-1, *ones).expand(shape)
        case "w" | "step" | "r", 1:
            value = torch.linspace(0.5, 1.5, shape[0])
        case "tokens", _:
            value = torch.randint(0, TOKENS_EXAMPLE, shape, generator=generator)
        case _:
            value = torch.randn(shape, generator=generator)
    return value.to(getattr(torch, spec.dtype))


def free_axes(spec: TensorSpec) -> dict[int, str]:
    """Return the axes of a tensor whose size is free, and their names."""
    return {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}


def expected_of(frozen: Frozen) -> Expected:
    """Call a network on `examples`."""
    stage("asking PyTorch")
    inputs = examples(frozen.signature)
    names = [spec.name for spec in frozen.signature.inputs]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return Expected(feeds, frozen.run(*inputs))
