"""The only thing that is traced: one network, positional inputs in signature order, one plain tensor out."""

import torch
from torch import Tensor, nn

from edgedistill.agreement import compare, finite_db
from edgedistill.contract import BATCH, Signature, TensorSpec
from edgedistill.errors import CheckFailedError
from edgedistill.models import store
from edgedistill.network import Session

LAST_TIMESTEP = 999.0
FREE_BATCH_EXAMPLE = 2


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

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the raw prediction for inputs in the order of the signature."""
        names = [spec.name for spec in self.signature.inputs]
        return store.call(self.network, dict(zip(names, inputs, strict=True)))


def examples(signature: Signature) -> tuple[Tensor, ...]:
    """Return inputs in signature order to trace and to check with.

    Timesteps run from the noisiest down, because float16 errs most there; a free batch becomes two.
    """
    batch = signature.batch or FREE_BATCH_EXAMPLE
    generator = torch.Generator().manual_seed(0)
    return tuple(_example(spec, batch, generator) for spec in signature.inputs)


def _example(spec: TensorSpec, batch: int, generator: torch.Generator) -> Tensor:
    shape = [batch if size == BATCH else int(size) for size in spec.shape]
    match spec.kind:
        case "t":
            value = torch.linspace(LAST_TIMESTEP, 0, batch)
        case "class":
            value = torch.arange(batch) % 2
        case "w":
            value = torch.linspace(0.5, 1.5, batch)
        case _:
            value = torch.randn(shape, generator=generator)
    return value.to(getattr(torch, spec.dtype))


def check_against(frozen: Frozen, session: Session, floor: float, what: str) -> float:
    """Run a written graph once beside PyTorch.

    Args:
        frozen: The reference.
        session: Runs the written file.
        floor: dB SNR that must be reached.
        what: What was written, for the message.

    Returns:
        dB SNR of the file's answer; 999 where every bit is equal.

    Raises:
        CheckFailedError: If it is below `floor`.
    """
    inputs = examples(frozen.signature)
    with torch.inference_mode():
        reference = frozen(*inputs).numpy()
    names = [spec.name for spec in frozen.signature.inputs]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    got = session(feeds)[frozen.signature.outputs[0].name]
    agreement = compare(reference, got)
    if agreement.snr_db < floor:
        msg = f"{what}: {agreement.snr_db:.1f} dB SNR against PyTorch, at least {floor:.0f} dB is required; it was not written."
        raise CheckFailedError(msg)
    return finite_db(agreement.snr_db)
