"""Gaussian data, where every jump of CTM and every denoiser is known, and CTM on them."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import Tensor, nn

from edgedistill.methods import ctm
from edgedistill.methods.context import Context
from edgedistill.methods.jumps import GridSettings
from edgedistill.methods.plan import Batch, OptimizerSettings, Plan, Step, Stretch
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.table import Condition
from edgedistill.training.checkpoint import CheckpointFolder
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.logs import Unwatched
from edgedistill.training.loop import Trainer
from edgedistill.training.settings import TrainingSettings

EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.2, "sigma_max": 1.5}
MEAN, SPREAD = 0.3, 0.5
SHAPE = (1, 4, 4)
POINTS = 9
ADAM = OptimizerSettings(learning_rate=0.01, decay="cosine")
SETTINGS = ctm.CtmSettings(
    grid=GridSettings(points=POINTS),
    most_steps=POINTS - 1,
    average=0.9,
    consistency=Stretch(4, ADAM),
    adversarial=ctm.AdversarialSettings(4, ADAM, critic="pixels", width=4),
    steps=(2, 1, 4),
)


class Gaussian(nn.Module):
    """The exact denoiser of Gaussian data, by the level that an EDM network is told; classes shift the mean."""

    config = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "num_class_embeds": 3}

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.full((1, 1), MEAN))
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        self.seen.append((timestep, class_labels))
        label = np.searchsorted(self.schedule.feeds, timestep.double().numpy() - 1e-6)
        alpha, sigma, scale = (
            torch.tensor(values[label]).float()[:, None, None, None]
            for values in (self.schedule.alphas, self.schedule.sigmas, self.schedule.in_scales)
        )
        z = sample / scale
        mean = self.mean + 0.2 * class_labels[:, None, None, None]
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return mean + gain * (z - alpha * mean)


class Told(Gaussian):
    """The same as a student, which does not heed s."""

    config = {**Gaussian.config, "scalar_inputs": {"s": 1.0}}

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, s: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        return super().forward(sample, timestep, class_labels)


class Jumper(nn.Module):
    """x0 = scale[t, s] * z + shift[t, s] on a grid: holds the exact jumps of Gaussian data."""

    config = {**Gaussian.config, "scalar_inputs": {"s": 1.0}}

    def __init__(self, schedule: Schedule, labels: tuple[int, ...]) -> None:
        super().__init__()
        self.labels = torch.tensor(labels)
        self.feeds = torch.tensor(schedule.feeds[list(labels)]).float()
        self.in_scales = torch.tensor(schedule.in_scales[list(labels)]).float()
        self.seen: list[tuple[Tensor, ...]] = []
        count = len(labels)
        alpha, sigma = (torch.tensor(a[list(labels)]) for a in (schedule.alphas, schedule.sigmas))
        gain = (alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)).float()
        # A step of the teacher to every s, as with an input that is zero at first.
        start = torch.stack([gain, MEAN * (1 - gain * alpha.float())])
        self.jumps = nn.Parameter(start[:, :, None].repeat(1, 1, count))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, s: Tensor) -> Tensor:
        self.seen.append((timestep, s, class_labels))
        t, to = ((value[:, None] - self.feeds).abs().argmin(1) for value in (timestep, s))
        scale, shift = self.jumps[:, t, to][:, :, None, None, None]
        return scale * sample / self.in_scales[t][:, None, None, None] + shift


class GaussianContext(Context):
    """Students of Gaussian data have a number for every jump of the grid."""

    def student(self, *scalars: str, **inputs: Any) -> Denoiser:
        assert (scalars, inputs) == (("s",), {})
        labels = SETTINGS.grid.labels(self.schedule)
        return Denoiser(Jumper(self.schedule, labels), self.schedule, self.prediction_type)


def noise(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


class Endless:
    """Gaussian data for the trainer, a function of the position."""

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:  # noqa: ARG002
        return World().batch(part.stop - part.start, start)


class World:
    """What the tests of CTM ask of Gaussian data."""

    settings, mean, told, noise = SETTINGS, MEAN, Told, staticmethod(noise)

    def batch(self, count: int, seed: int = 0) -> Batch:
        x = MEAN + SPREAD * noise(seed, count)
        labels = torch.zeros(count, dtype=torch.int32)
        return Batch(x, {"class_labels": labels}, {"class_labels": labels + 2})

    def context(self, config: dict[str, Any] = EDM) -> GaussianContext:
        schedule, kind = Schedule.from_config(config), PredictionType("sample")
        return GaussianContext(
            "ctm",
            Denoiser(Gaussian(schedule), schedule, kind),
            nn.Identity(),
            config,
            kind,
            SHAPE,
            (Condition("class_labels", "class", 2),),
            {"class_labels": 2},
        )

    def draw(self, count: int, *position: int) -> PositionDraw:
        return PositionDraw(3, position, Slice(count, 0, count), torch.device("cpu"))

    def step(self, plan: Plan, count: int = 6, batch: Batch | None = None) -> Step:
        roles = {role.name: role.module for role in plan.roles}
        for role in plan.roles:
            role.network.requires_grad_(role.trained)
        return Step(roles, batch or self.batch(count), self.draw(count))

    def reached(self, step: Step) -> list[str]:
        """Return the roles that gradients have reached."""
        return [
            name
            for name, module in step.roles.items()
            if any(p.grad is not None and p.grad.any() for p in module.parameters())
        ]

    def exact(self, schedule: Schedule, z: Tensor, t: int, s: int) -> Tensor:
        """Where the probability-flow ODE leads from t to s: quantiles keep their place."""
        (a, b), (c, d) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        place = (z - a * MEAN) / math.hypot(a * SPREAD, b)
        return c * MEAN + place * math.hypot(c * SPREAD, d)

    def train(self, plan: Plan, folder: Path, **settings: Any) -> dict[str, Any]:
        """Run a plan; return the networks of its students."""
        emitted: dict[str, Any] = {}
        Trainer(
            plan,
            {"data": Endless()},
            TrainingSettings(**{"checkpoint_every": 10000, **settings}),
            0,
            CheckpointFolder(folder, "print"),
            lambda emission, states: emitted.update({emission.name: copy.deepcopy(states["unet"])}),
            Unwatched(),
            Accelerator(),
        ).run()
        return emitted


@pytest.fixture(scope="session")
def gaussian() -> World:
    """Gaussian data, and CTM on them."""
    return World()


@pytest.fixture
def stock() -> nn.Module:
    """A small UNet of diffusers for four classes and none."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=5,
    ).eval()
