"""The only thing that is traced: one network, positional inputs in signature order, plain tensors out."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgedistill.agreement import compare, finite_db
from edgedistill.contract import BATCH, Signature, TensorSpec
from edgedistill.errors import CheckFailedError
from edgedistill.models import store
from edgedistill.network import Session

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


@dataclass(frozen=True)
class Expected:
    """One call of a network in PyTorch, kept so that a written graph is checked when the network is gone.

    Fields:
        feeds: Inputs by name.
        outputs: What PyTorch answers, by name.
    """

    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def expected_of(frozen: Frozen) -> Expected:
    """Call a network on `examples`."""
    inputs = examples(frozen.signature)
    names = [spec.name for spec in frozen.signature.inputs]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return Expected(feeds, frozen.run(*inputs))


def check_against(expected: Expected, session: Session, floor: float, what: str) -> float:
    """Run a written graph once on what PyTorch was given.

    Args:
        expected: The reference.
        session: Runs the written file.
        floor: dB SNR that must be reached.
        what: What was written, for the message.

    Returns:
        dB SNR of the file's worst answer; 999 where every bit is equal.

    Raises:
        CheckFailedError: If it is below `floor`.
    """
    got = session(expected.feeds)
    found = {name: compare(value, got[name]).snr_db for name, value in expected.outputs.items()}
    worst = min(found, key=lambda name: found[name])
    if found[worst] < floor:
        msg = f"{what}: {found[worst]:.1f} dB SNR of `{worst}` against PyTorch, at least {floor:.0f} dB is required; it was not written."
        raise CheckFailedError(msg)
    return finite_db(found[worst])
