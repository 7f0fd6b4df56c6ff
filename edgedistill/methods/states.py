"""State sources: where the noised z of a training step comes from."""

import torch
from torch import Tensor

from edgedistill.methods.plan import Batch, Draw
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import network_of
from edgedistill.sampler import NULL, run_table
from edgedistill.table import SamplerTable


def noised_data(denoiser: Denoiser, batch: Batch, t: Tensor, draw: Draw) -> Tensor:
    """Return ``z = alpha_t x + sigma_t eps`` at labels t (batch,), with fresh noise."""
    alpha, sigma = denoiser.alpha_sigma(t)
    return alpha * batch.x + sigma * draw.normal(*batch.x.shape[1:])


@torch.no_grad()
def trajectory(
    denoiser: Denoiser, table: SamplerTable, noise: Tensor, batch: Batch
) -> list[Tensor]:
    """Return the state after every row of a table, without gradients.

    Args:
        denoiser: Whose network the rows call.
        table: A sampler with a noise bank of one.
        noise: (batch, channels, height, width) that it starts from.
        batch: Gives conditions, and what stands for none of them.
    """
    states: list[Tensor] = []
    null = {NULL + name: value for name, value in batch.null.items()}
    run_table(
        table,
        {"unet": network_of(denoiser)},
        [noise],
        {**batch.conditions, **null},
        observe=lambda trace: states.append(trace.next),
    )
    return states
