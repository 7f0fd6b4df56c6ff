"""Gaussian data, whose exact denoiser is known, and DMD2 on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgedistill.methods import dmd2
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Batch, OptimizerSettings, Plan, Step
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.unet import build_stock
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.table import Condition
from edgedistill.training.checkpoint import CheckpointFolder
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.logs import Unwatched
from edgedistill.training.loop import Trainer
from edgedistill.training.settings import TrainingSettings

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
SCHEDULE = Schedule.from_config(CONFIG)
MEAN, SPREAD = 0.3, 0.5
SHAPE = (1, 8, 8)
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
    "num_class_embeds": 3,
}
ADAM = OptimizerSettings("adam", 1e-3, decay="constant")


class Gaussians:
    """Data whose every number is Gaussian; two classes."""

    def __len__(self) -> int:
        return 1000

    def first(self, count: int) -> Batch:
        return self.batch(0, Slice(count, 0, count), torch.device("cpu"))

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:
        draw = PositionDraw(7, (start,), part, device)
        labels = draw.integers(0, 2).int()
        null = {"class_labels": torch.full_like(labels, 2)}
        return Batch(MEAN + SPREAD * draw.normal(*SHAPE), {"class_labels": labels}, null)


class Affine(nn.Module):
    """x0 = gain[t] * z + shift[t], the exact denoiser of Gaussian data when it begins."""

    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 3}

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
        self.fit(mean, spread)

    def fit(self, mean: float, spread: float) -> None:
        alpha, sigma = torch.tensor(SCHEDULE.alphas), torch.tensor(SCHEDULE.sigmas)
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        self.gain.data = gain.float()
        self.shift.data = (mean - gain * alpha * mean).float()

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002
        t = timestep.long()
        return self.gain[t][:, None, None, None] * sample + self.shift[t][:, None, None, None]


class World:
    """What the tests of DMD2 ask of Gaussian data."""

    schedule, mean, spread, shape, unet, adam = SCHEDULE, MEAN, SPREAD, SHAPE, UNET, ADAM
    data, exact = Gaussians(), Affine

    def context(
        self, network: nn.Module | None = None, kind: str = "v_prediction", **fields: Any
    ) -> Context:
        if network is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = build_stock(UNET).eval()
        prediction = PredictionType(kind)
        return Context(
            "dmd2",
            Denoiser(network, SCHEDULE, prediction),
            network,
            {**CONFIG, "prediction_type": kind},
            prediction,
            SHAPE,
            (Condition("class_labels", "class", 2),),
            **{"null": {"class_labels": 2}, "samples": Gaussians(), **fields},
        )

    def settings(self, **changes: Any) -> dmd2.DMD2Settings:
        stage = dmd2.StageSettings(4, ADAM)
        return dmd2.DMD2Settings(
            **{
                "guidance_scale": 1.0,
                "student_every": 5,
                "match": stage,
                "adversarial": None,
                **changes,
            }
        )

    def step(self, plan: Plan, batch: int = 8, place: str = "test", **fields: Any) -> Step:
        part = Slice(batch, 0, batch)
        roles = {role.name: role.module for role in plan.roles}
        draw = PositionDraw(0, (place,), part, torch.device("cpu"))
        return Step(roles, Gaussians().batch(0, part, torch.device("cpu")), draw, **fields)

    def run(self, plan: Plan, folder: Path, kind: type[Trainer] = Trainer, **changes: Any) -> Any:
        trainer: Any = kind(
            plan,
            {"data": Gaussians()},
            TrainingSettings(**{"batch_size": 8, "clip_norm": None, **changes}),
            0,
            CheckpointFolder(folder, "print"),
            lambda *_: None,
            Unwatched(),
            Accelerator(),
        )
        trainer.run()
        return trainer


@pytest.fixture(scope="session")
def gaussian() -> World:
    """Gaussian data, and DMD2 on them."""
    return World()
