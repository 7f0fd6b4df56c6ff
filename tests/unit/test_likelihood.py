"""Likelihood along the probability-flow ODE, where it has a closed form: Gaussian data in every schedule."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgedistill.evaluation.likelihood import Integration, bits_per_dim, log_likelihood
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule

MEAN, SPREAD = 0.2, 0.4
FAMILIES: list[dict[str, Any]] = [
    {"_class_name": "EDMEulerScheduler"},
    {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
]


class Exact(nn.Module):
    """The denoiser of Gaussian data, at whatever level the schedule's feed says; tells of its calls."""

    config = {"sample_size": 2, "in_channels": 1, "out_channels": 1, "scalar_inputs": {"s": 1.0}}

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.register_buffer("feeds", torch.tensor(schedule.feeds))
        self.register_buffer("alphas", torch.tensor(schedule.alphas))
        self.register_buffer("sigmas", torch.tensor(schedule.sigmas))
        self.register_buffer("in_scales", torch.tensor(schedule.in_scales))
        self.calls = 0

    def forward(self, sample: Tensor, timestep: Tensor, s: Tensor) -> Tensor:
        assert torch.equal(timestep, s)
        self.calls += 1
        above = int(torch.searchsorted(self.feeds, timestep[0].double()).clamp(1, 999))
        low, high = self.feeds[above - 1], self.feeds[above]
        share = (timestep[0] - low) / (high - low)
        alpha, sigma, scale = (
            torch.lerp(values[above - 1], values[above], share)
            for values in (self.alphas, self.sigmas, self.in_scales)
        )
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return MEAN + gain * (sample / scale - alpha * MEAN)


@pytest.mark.parametrize("config", FAMILIES)
def test_gaussian_data_have_the_density_of_their_gaussian(config: dict[str, Any]) -> None:
    schedule = Schedule.from_config(config)
    denoiser = Denoiser(Exact(schedule), schedule, PredictionType.SAMPLE)
    x = MEAN + SPREAD * torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    made = log_likelihood(denoiser, x, {}, Integration(rtol=1e-5, atol=1e-5))
    scaled = ((x - MEAN) / SPREAD).double()
    exact = -(scaled.square() / 2 + math.log(SPREAD * math.sqrt(2 * math.pi))).flatten(1).sum(1)
    assert (made - exact).abs().max() < 0.1
    assert abs((made - exact).mean()) < 0.03


def test_a_looser_tolerance_asks_the_network_less_often() -> None:
    schedule = Schedule.from_config(FAMILIES[0])
    calls = []
    for tolerance in (1e-2, 1e-6):
        network = Exact(schedule)
        denoiser = Denoiser(network, schedule, PredictionType.SAMPLE)
        log_likelihood(
            denoiser, torch.zeros(2, 1, 2, 2), {}, Integration(80.0, tolerance, tolerance)
        )
        calls.append(network.calls)
    assert 2 * calls[0] < calls[1]


def test_bits_of_uniform_images_are_those_of_their_values() -> None:
    # Density 1/2 on [-1, 1]: as many bits as a value has.
    uniform = torch.tensor([-64 * math.log(2)])
    assert bits_per_dim(uniform, 64).item() == pytest.approx(8)
    assert bits_per_dim(uniform, 64, levels=16).item() == pytest.approx(4)
