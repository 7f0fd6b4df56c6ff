"""Losses on x0, weighted by what the error means at each noise level."""

from typing import Literal

from torch import Tensor

from edgedistill.models.denoiser import Denoiser

Weighting = Literal["truncated_snr", "snr_plus_one"]


def weighted_mse(
    denoiser: Denoiser, x0: Tensor, target: Tensor, t: Tensor, weighting: Weighting
) -> Tensor:
    """Return the mean squared error of x0, weighted per sample.

    Args:
        denoiser: Gives alpha and sigma.
        x0, target: (batch, channels, height, width).
        t: (batch,) timesteps.
        weighting: ``truncated_snr`` is max(SNR, 1), the larger of the errors of x and of eps;
            ``snr_plus_one`` is 1 + SNR, which is the plain error of v.

    References:
        Salimans and Ho, arXiv:2202.00512, section 4 (truncated SNR and SNR+1 weighting).
    """
    alpha, sigma = denoiser.alpha_sigma(t)
    snr = (alpha / sigma).square().flatten()
    weight = snr.clamp(min=1.0) if weighting == "truncated_snr" else 1.0 + snr
    return (weight * (x0 - target).square().flatten(1).mean(1)).mean()
