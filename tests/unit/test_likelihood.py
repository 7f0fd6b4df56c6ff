"""Likelihood along the probability-flow ODE, where it has a closed form: Gaussian data in every schedule."""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgedistill.bundle import Bundle
from edgedistill.data import Images
from edgedistill.errors import ConfigError
from edgedistill.evaluation.likelihood import Integration, bits_per_dim, log_likelihood
from edgedistill.methods import ctm
from edgedistill.methods.context import Context
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.student import Student
from edgedistill.teacher import Teacher

EXAMPLE = Path(__file__).parents[2] / "examples" / "likelihood.py"
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


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("likelihood", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_images_of_few_values_are_spread_over_the_cells_of_these(example: Any) -> None:
    schedule = Schedule.from_config(FAMILIES[0])
    denoiser = Denoiser(Exact(schedule), schedule, PredictionType.SAMPLE)
    draw, levels = np.random.default_rng(1), 33
    values = np.round(16 * (MEAN + SPREAD * draw.standard_normal((60, 1, 2, 2)))) / 16
    images = values.clip(-1, 1).astype(np.float32)
    found = example.bits_of_images(denoiser, Images(images), 55, levels, seed=3)
    noise = np.random.default_rng(3)
    parts = [noise.uniform(-0.5, 0.5, (count, 1, 2, 2)) for count in (50, 5)]
    spread = images[:55] + np.concatenate(parts) / 16
    square = ((spread - MEAN) / SPREAD) ** 2 / 2 + math.log(SPREAD * math.sqrt(2 * math.pi))
    exact = square.mean((1, 2, 3)) / math.log(2) + 4  # a cell is 1/16 wide
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.1)


def untrained(folder: Path) -> Student:
    """Write a CTM student of the packaged teacher that has not learned anything yet."""
    teacher, kind = Teacher.open("digits"), PredictionType.V_PREDICTION
    frozen = Denoiser(teacher.network, Schedule.from_config(teacher.scheduler), kind)
    parts = teacher.network, teacher.scheduler, kind, teacher.shape, teacher.conditions
    context = Context("ctm", frozen, *parts)
    network = context.student("s").network
    store.save(network, folder / "unet")
    table = ctm.table(ctm.CtmSettings(), context, 1)
    Student(folder, "untrained", table, {"unet": store.signature(network)}).write_manifest()
    return Student.open(folder)


def test_the_example_measures_students_and_teachers(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for model in (untrained(tmp_path / "s").root, "digits"):
        assert example.main([str(model), "--count", "6", "--levels", "17"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]  # an untrained student is its teacher
    bits = float(re.match(r"([\d.]+) \+- [\d.]+ bits per dimension, of 6 images", said[0])[1])
    assert 0.5 < bits < math.log2(17)


def test_models_without_a_likelihood_are_refused(
    example: Any, student: Student, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (student, bundle):
        with pytest.raises(SystemExit, match="2"):
            example.main([str(model.root)])
        assert "guidance 'embedded'. Train one with" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="takes class_labels, which these data do not tell"):
        example.bits_of_images(
            example.open_denoiser("digits"), Images(np.zeros((1, 1, 8, 8), np.float32)), 1, 17
        )
