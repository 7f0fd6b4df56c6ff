"""Losses: on x0 weighted by noise level, between images, of critics; and the balance between them."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import relu, softplus

from edgedistill.errors import ConfigError
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import SIGMA_DATA, x0_coefficients

Adversarial = Literal["hinge", "non_saturating"]
Distance = Literal["l2", "pseudo_huber"]
Weighting = Literal["truncated_snr", "snr_plus_one", "edm", "prediction"]


def weighted_mse(
    denoiser: Denoiser, x0: Tensor, target: Tensor, t: Tensor, weighting: Weighting
) -> Tensor:
    """Return the mean squared error of x0, weighted per sample.

    Args:
        denoiser: Gives alpha and sigma.
        x0, target: (batch, channels, height, width).
        t: (batch,) timesteps.
        weighting: ``truncated_snr`` is max(SNR, 1), the larger of the errors of x and of eps;
            ``snr_plus_one`` is 1 + SNR, which is the plain error of v; ``edm`` is 1 / SIGMA_DATA^2 + SNR,
            which is the plain error of EDM's F; ``prediction`` is the plain error of whatever the network
            predicts (`prediction_mse`), such as SNR for eps.

    References:
        Salimans and Ho, arXiv:2202.00512, section 4 (truncated SNR and SNR+1 weighting); Karras et al.,
        arXiv:2206.00364, table 1.
    """
    if weighting == "prediction":
        return prediction_mse(denoiser, x0, target, t)
    alpha, sigma = denoiser.alpha_sigma(t)
    snr = (alpha / sigma).square().flatten()
    added = {"snr_plus_one": 1.0, "edm": SIGMA_DATA**-2}
    weight = snr.clamp(min=1.0) if weighting == "truncated_snr" else snr + added[weighting]
    return (weight * (x0 - target).square().flatten(1).mean(1)).mean()


def prediction_mse(denoiser: Denoiser, x0: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """Return the mean squared error of x0, weighted as the plain error of what the network predicts.

    That is the loss of eps, v, flow, x0 and EDM teachers alike: an error of x0 is a_r times one of raw.

    Args:
        denoiser: Says what is predicted, and alpha and sigma.
        x0, target: (batch, channels, height, width).
        t: (batch,) labels.
    """
    _, a_r = x0_coefficients(denoiser.prediction_type, *denoiser.alpha_sigma(t))
    return ((x0 - target) / a_r).square().mean()


def distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Return the mean over the batch of a distance between images, per number of the image.

    Args:
        a, b: (batch, channels, height, width).
        kind: ``l2`` is the squared error; ``pseudo_huber`` is ``sqrt(|a - b|^2 + c^2) - c`` of whole
            images, with c = 0.00054 sqrt(dimensions).

    References:
        Song and Dhariwal, arXiv:2310.14189, section 3.3 (pseudo-Huber).
    """
    squares = (a - b).square().flatten(1)
    if kind == "l2":
        return squares.mean()
    width = squares.shape[1]
    c = 0.00054 * width**0.5
    return (((squares.sum(1) + c**2).sqrt() - c) / width).mean()


def balance(
    leader: Tensor, term: Tensor, weight: nn.Parameter, bounds: tuple[float, float]
) -> Tensor:
    """Return what to multiply `term` with, so that it moves a weight as much as `leader` does.

    It is the ratio of the norms of the two gradients, which are averaged over processes; where gradients are
    accumulated, each piece of the batch has a ratio of its own.

    Args:
        leader, term: Scalar losses of one graph, which is kept.
        weight: The last layer that both depend on.
        bounds: The ratio is clamped to these.

    Raises:
        ConfigError: If FSDP has cut the weight up, whose graph then ends at pieces that are already gone.

    References:
        Esser et al., arXiv:2012.09841, Eq. 7.
    """
    if isinstance(weight, DTensor):
        msg = "Losses of this method are balanced by gradients of one layer, which FSDP hides; configure accelerate for MULTI_GPU."
        raise ConfigError(msg)
    gradients = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0].detach() for loss in (leader, term)
    ]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient.div_(torch.distributed.get_world_size()))
    leading, own = (gradient.norm() for gradient in gradients)
    return (leading / (own + 1e-4)).clamp(*bounds)


def critic_loss(real: Tensor, fake: Tensor, kind: Adversarial) -> Tensor:
    """Return the loss of a critic from its scores (batch,) of data and of what a student made.

    Args:
        real, fake: Scores; high means data.
        kind: ``hinge`` (arXiv:1705.02894), or ``non_saturating`` (Goodfellow et al., arXiv:1406.2661).
    """
    if kind == "hinge":
        return relu(1 - real).mean() + relu(1 + fake).mean()
    return softplus(-real).mean() + softplus(fake).mean()


def fooling_loss(fake: Tensor, kind: Adversarial) -> Tensor:
    """Return the student's side of `critic_loss`: least where the critic takes all of its images for data.

    Args:
        fake: (batch,) scores of what the student made, with their graph.
        kind: That of the critic's loss.
    """
    return -fake.mean() if kind == "hinge" else softplus(-fake).mean()


def matching_loss(images: Tensor, gradient: Tensor) -> Tensor:
    """Return a number whose derivative by the images is the gradient, divided by how many numbers there are.

    Args:
        images: (batch, channels, height, width), the student's, with their graph.
        gradient: Shaped as they are, such as `matching_gradient`; it gets no gradient itself.

    References:
        Yin et al., arXiv:2405.14867 (DMD2), as its public code has it.
    """
    target = (images - gradient).detach()
    return 0.5 * (images - target).square().mean()
