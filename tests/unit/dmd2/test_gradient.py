"""DMD2's gradient against closed forms: of a Gaussian that is reached, of a mixture whose modes are filled."""

import pytest
import torch
from torch import Tensor

from edgedistill.methods import dmd2
from edgedistill.methods.losses import matching_loss
from edgedistill.methods.plan import Batch, Step
from edgedistill.methods.targets import matching_gradient
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.training.draw import PositionDraw, Slice


def test_the_derivative_by_the_images_is_the_gradient_over_how_many_numbers_there_are(
    gaussian,
) -> None:
    draw = torch.Generator().manual_seed(0)
    images, real, fake = (torch.randn(6, *gaussian.shape, generator=draw) for _ in range(3))
    images.requires_grad_()
    gradient = matching_gradient(images.detach(), real, fake)
    scale = (images - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, ((fake - real) / scale).detach(), rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(matching_loss(images, gradient), images)
    torch.testing.assert_close(found, gradient / images.numel(), rtol=0, atol=1e-9)


def test_a_perfect_image_has_no_gradient_rather_than_none(gaussian) -> None:
    same = torch.ones(2, *gaussian.shape)
    assert torch.equal(matching_gradient(same, same, same + 1), torch.zeros_like(same))


def test_matching_alone_moves_samples_onto_the_data_and_rests_there(gaussian) -> None:
    teacher = Denoiser(
        gaussian.exact(gaussian.mean, gaussian.spread), gaussian.schedule, PredictionType("sample")
    )
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(200, *gaussian.shape, generator=draw)
    # The student is x = scale * noise + shift, whose own score is known at every step of it.
    scale, shift = torch.tensor(0.2, requires_grad=True), torch.tensor(-0.5, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=0.02)
    fake = Denoiser(gaussian.exact(0.0, 1.0), gaussian.schedule, PredictionType("sample"))
    method = dmd2.Distillation(gaussian.settings(), gaussian.context())
    for place in range(200):
        images = scale * noise + shift
        fake.network.fit(shift.item(), scale.item())
        step = Step(
            {"teacher": teacher, "fake": fake},
            Batch(images, {"class_labels": torch.zeros(200, dtype=torch.int32)}, {}),
            PositionDraw(0, (place,), Slice(200, 0, 200), torch.device("cpu")),
        )
        optimizer.zero_grad()
        method._matching(step, images).backward()
        optimizer.step()
    assert shift.item() == pytest.approx(gaussian.mean, abs=0.02)
    assert scale.item() == pytest.approx(gaussian.spread, abs=0.02)


MODES, WIDTH = torch.tensor([[-0.6, 0.2], [0.6, -0.3]]), 0.2


def posterior_mean(
    z: Tensor, centres: Tensor, spread: float, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Return E[x | z] of x that is Gaussian around one of some centres (count, 2), each as likely; z is (batch, 2)."""
    gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
    exponent = -(z[:, None] - alpha[:, None] * centres).square().sum(2)
    weights = (exponent / (2 * (alpha**2 * spread**2 + sigma**2))).softmax(1)
    means = centres + gain[:, None] * (z[:, None] - alpha[:, None] * centres)
    return (weights[:, :, None] * means).sum(1)


@torch.no_grad()
def test_matching_spreads_free_particles_over_both_modes_of_a_mixture(gaussian) -> None:
    draw, moves = torch.Generator().manual_seed(0), 400
    particles = 1.5 * torch.randn(300, 2, generator=draw)
    for move in range(moves):
        t = torch.randint(20, 980, (len(particles),), generator=draw)
        alpha, sigma = (
            torch.tensor(v)[t][:, None].float()
            for v in (gaussian.schedule.alphas, gaussian.schedule.sigmas)
        )
        z = alpha * particles + sigma * torch.randn(particles.shape, generator=draw)
        real = posterior_mean(z, MODES, WIDTH, alpha, sigma)
        # What a fake score learns of the particles themselves, nearly.
        fake = posterior_mean(z, particles, WIDTH / 4, alpha, sigma)
        gradient = matching_gradient(*(v[:, :, None, None] for v in (particles, real, fake)))
        particles = particles - 0.05 * (1 - move / moves) * gradient[:, :, 0, 0]
    nearest, mode = (particles[:, None] - MODES).square().mean(2).sqrt().min(1)
    assert (nearest < 2 * WIDTH).float().mean() >= 0.95
    assert torch.bincount(mode, minlength=2).min() > 0.4 * len(particles)
    # Drawn by the teacher alone, all would fall into one point of each mode.
    spreads = torch.stack([particles[mode == k].std(0).mean() for k in range(2)])
    assert ((spreads / WIDTH - 1).abs() < 0.2).all()


@torch.no_grad()
def test_the_mean_gradient_is_nothing_where_the_student_makes_data(gaussian) -> None:
    draw = torch.Generator().manual_seed(0)
    x = gaussian.mean + gaussian.spread * torch.randn(4000, *gaussian.shape, generator=draw)
    teacher = Denoiser(
        gaussian.exact(gaussian.mean, gaussian.spread), gaussian.schedule, PredictionType("sample")
    )
    t = torch.full((4000,), 400)
    alpha, sigma = teacher.alpha_sigma(t)
    z = alpha * x + sigma * torch.randn(x.shape, generator=draw)
    real = teacher.x0(z, t, {"class_labels": t})
    # What a fake score learns of these images: the regression of x on z.
    gain = ((x - x.mean()) * (z - z.mean())).mean() / z.var()
    learnt = x.mean() + gain * (z - z.mean())
    assert abs(matching_gradient(x, real, learnt).mean().item()) < 0.01
    assert abs(matching_gradient(x, real, learnt - 0.1).mean().item()) > 0.2
