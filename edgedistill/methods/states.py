"""State sources: where the noised z of a training step comes from."""

from torch import Tensor

from edgedistill.methods.plan import Batch, Draw
from edgedistill.models.denoiser import Denoiser


def noised_data(denoiser: Denoiser, batch: Batch, t: Tensor, draw: Draw) -> Tensor:
    """Return ``z = alpha_t x + sigma_t eps`` at labels t (batch,), with fresh noise."""
    alpha, sigma = denoiser.alpha_sigma(t)
    return alpha * batch.x + sigma * draw.normal(*batch.x.shape[1:])
