"""A cascade in one network: a small image first, then larger ones that are told the smaller (Xu et al., arXiv:2509.15342).

Not distillation: trained on data with the teacher's own loss, the squared error of what it predicts. How the paper
tells a stage of the smaller image, disturbs and drops it, and divides training among the stages is not public;
here the smaller image enlarged enters the first layer, with noise as in other cascades. An image that is dropped is
all zeros, as that of the first stage; no flag tells the network so.
"""

import copy
import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.losses import prediction_mse
from edgedistill.methods.plan import (
    Draw,
    Emission,
    Follow,
    Losses,
    LossFunction,
    OptimizerSettings,
    Phase,
    Plan,
    Role,
    Step,
    Stretch,
    Update,
)
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.rows import ddim_row
from edgedistill.sampler import resize
from edgedistill.table import SamplerTable, Stage

Shape = tuple[int, int, int]
END = -1
_PARTS = 1 << 20  # the share of a stage is a whole number of these


@dataclass(frozen=True)
class LowdiffSettings:
    """Settings of the cascade.

    Fields:
        factors: By how much the images of each stage are smaller than the teacher's; the last is 1.
        shares: Share of the batches that each stage is trained on; empty: equal ones.
        start: Weights to start from: the ``teacher``'s, or ``random`` ones.
        image_noise: Range of the scale of noise on the smaller image in training, so that a stage gets
            along with what the one before it makes.
        image_dropout: How often a stage is told nothing of the smaller image, as the first one always is.
        log_sigma: Mean and spread of the logarithm of the noise levels that are trained on, for schedules of
            EDM (arXiv:2206.00364, table 1); other families draw their times evenly.
        steps: Rows of each stage, one entry per sampler to write; the first one is the default.
        sampled_noise: Scale of the noise on the smaller image in sampling.
        power: Times of the stages after the first are ``T (k / N)^power``: above 1 they favour low noise, since
            most of the picture is known from the start.
        ema: Rate of the average that is written.
        train: Length and optimizer.
    """

    factors: tuple[int, ...] = (4, 2, 1)
    shares: tuple[float, ...] = ()
    start: Literal["teacher", "random"] = "teacher"
    image_noise: tuple[float, float] = (0.0, 0.25)
    image_dropout: float = 0.1
    log_sigma: tuple[float, float] = (-1.2, 1.2)
    steps: tuple[tuple[int, ...], ...] = ((16, 8, 4),)
    sampled_noise: float = 0.0
    power: float = 1.0
    ema: float = 0.9999
    train: Stretch = field(
        default_factory=lambda: Stretch(
            400_000, OptimizerSettings(learning_rate=2e-4, decay="constant")
        )
    )

    def __post_init__(self) -> None:
        falls = all(a > b and a % b == 0 for a, b in itertools.pairwise(self.factors))
        if not self.factors or self.factors[-1] != 1 or not falls:
            msg = (
                f"`factors` must fall to 1, each a multiple of the next, got {list(self.factors)}."
            )
            raise ConfigError(msg)
        count = len(self.factors)
        if not self.steps or any(len(item) != count or min(item) < 1 for item in self.steps):
            msg = f"Every entry of `steps` must hold {count} numbers of rows, one per stage, got {[list(item) for item in self.steps]}."
            raise ConfigError(msg)
        if self.shares and (len(self.shares) != count or min(self.shares) <= 0):
            msg = f"`shares` must hold {count} positive numbers, one per stage, got {list(self.shares)}."
            raise ConfigError(msg)

    def stage(self, part: int) -> int:
        """Return the stage that part number `part` of `_PARTS` belongs to."""
        shares = np.cumsum(self.shares or [1.0] * len(self.factors))
        return int(np.searchsorted(shares / shares[-1], part / _PARTS, side="right"))


def plan(settings: LowdiffSettings, context: Context) -> Plan:
    """Lay out the one phase.

    Raises:
        ConfigError: If a factor does not divide the images, the network takes no further inputs, low-rank updates of
            random weights are asked for, two times of a stage are the same, or the student would predict epsilon
            where the first state has next to nothing of x.
    """
    shapes = stage_shapes(settings.factors, context.shape)
    student = _student(settings, context, cascaded=len(shapes) > 1)
    student.require_x0(context.schedule.num_train_timesteps - 1)
    average = Role("average", copy.deepcopy(student), follows=Follow("student", settings.ema))
    tables = {_name(steps): _table(settings, context, shapes, steps) for steps in settings.steps}
    default, *further = tables
    networks = [_network(shape) for shape in shapes]
    emission = Emission(
        default,
        tables[default],
        dict.fromkeys(networks, "average"),
        {name: tables[name] for name in further},
        {name: shape[1:] for name, shape in zip(networks[:-1], shapes[:-1], strict=True)},
    )
    loss = cascade_loss(settings, shapes)
    update = Update("student", ("student",), loss, settings.train.optimizer)
    phase = Phase("lowdiff", settings.train.iterations, (update,), preview=emission, emits=emission)
    return Plan((Role("student", student, trained=True), average), (phase,))


def stage_shapes(factors: tuple[int, ...], shape: Shape) -> tuple[Shape, ...]:
    """Return the shapes of the stages' states.

    Raises:
        ConfigError: If a factor does not divide height and width.
    """
    channels, height, width = shape
    if any(height % factor or width % factor for factor in factors):
        msg = f"`factors` {list(factors)} do not all divide images of {height}x{width}."
        raise ConfigError(msg)
    return tuple((channels, height // factor, width // factor) for factor in factors)


def _student(settings: LowdiffSettings, context: Context, *, cascaded: bool) -> Denoiser:
    if settings.start == "random" and context.lora is not None:
        msg = "Low-rank updates of random weights learn nothing; set `lowdiff.start: teacher`, or leave `lora` out of the recipe."
        raise ConfigError(msg)
    made = context.student("r", image_channels=context.shape[0]) if cascaded else context.student()
    if settings.start == "random":
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            made.network = store.build(store.config_of(made.network))
    return made


def cascade_loss(settings: LowdiffSettings, shapes: tuple[Shape, ...]) -> LossFunction:
    """Return the squared error of the prediction at one stage, the same for the whole batch.

    It is the plain error of what the network predicts (see `prediction_mse`).

    Args:
        settings: Of the method.
        shapes: (channels, height, width) of each stage, as of `stage_shapes`; the batch's images are of the last.
    """

    def loss(step: Step) -> Losses:
        student, draw = step.roles["student"], step.draw
        stage = settings.stage(draw.shared_integer(0, _PARTS))
        shape = shapes[stage]
        x = resize(step.batch.x, "area_down", shape)
        t = draw_times(settings, student, draw)
        alpha, sigma = student.alpha_sigma(t)
        z = alpha * x + sigma * draw.normal(*shape)
        told = {}
        if len(shapes) > 1:
            r = torch.full_like(x[:, 0, 0, 0], relative_size(shape, shapes[-1]))
            image = z * 0 if stage == 0 else told_image(settings, step, shapes[stage - 1], shape)
            told = {"r": r, "image": image}
        x0 = student.x0(z, t, {**step.batch.conditions, **told})
        return Losses({_network(shape): prediction_mse(student, x0, x, t)})

    return loss


def draw_times(settings: LowdiffSettings, denoiser: Denoiser, draw: Draw) -> Tensor:
    """Return (batch,) labels: evenly from all, or for EDM by the logarithm of their level."""
    if denoiser.prediction_type is not PredictionType.EDM:
        return draw.integers(0, denoiser.schedule.num_train_timesteps)
    mean, spread = settings.log_sigma
    return denoiser.label_of(torch.exp(mean + spread * draw.normal()))


def told_image(settings: LowdiffSettings, step: Step, before: Shape, shape: Shape) -> Tensor:
    """Return what a stage is told of the true smaller image, noised; for some samples nothing, which is zeros.

    Args:
        settings: Of the method.
        step: Gives the images and the randomness.
        before, shape: (channels, height, width) of the stage before, and of this one.

    Returns:
        (batch, channels, height, width) of this stage.
    """
    draw = step.draw
    small = resize(step.batch.x, "area_down", before)
    scale = draw.uniform(*settings.image_noise)[:, None, None, None]
    image = resize(small, "up_nearest", shape) + scale * draw.normal(*shape)
    kept = draw.uniform(0.0, 1.0)[:, None, None, None] >= settings.image_dropout
    return image * kept


def relative_size(shape: Shape, last: Shape) -> float:
    """Return what a network is told of its resolution: its height over that of the finished image."""
    return shape[1] / last[1]


def stage_times(labels: int, count: int, power: float) -> tuple[int, ...]:
    """Return falling labels at ``labels * (k / count)^power - 1``; power 1 is diffusers' trailing grid.

    Raises:
        ConfigError: If two of them would be the same.
    """
    shares = (np.arange(count, 0, -1) / count) ** power
    times = tuple(int(t) for t in (labels * shares).round() - 1)
    if any(a <= b for a, b in itertools.pairwise((*times, END))):
        msg = f"{count} rows at `power` {power:g} ask for times closer than the schedule's {labels} labels; ask for fewer."
        raise ConfigError(msg)
    return times


def _table(
    settings: LowdiffSettings, context: Context, shapes: tuple[Shape, ...], steps: tuple[int, ...]
) -> SamplerTable:
    schedule, stages, used = context.schedule, [], 0
    for index, (shape, count) in enumerate(zip(shapes, steps, strict=True)):
        times = stage_times(schedule.num_train_timesteps, count, settings.power if index else 1.0)
        feeds = {"r": relative_size(shape, shapes[-1])} if len(shapes) > 1 else {}
        rows = tuple(
            ddim_row(schedule, t, s, context.kind, network=_network(shape), feeds=feeds)
            for t, s in itertools.pairwise([*times, END])
        )
        stage = Stage(shape, rows, init_noise=(schedule.first_scale, used))
        used += 1
        if index:
            stage = dataclasses.replace(stage, carry="up_nearest", carry_to="image")
            if settings.sampled_noise:
                carried = (settings.sampled_noise, used)
                stage, used = dataclasses.replace(stage, carry_noise=carried), used + 1
        stages.append(stage)
    made = context.table(stages[-1].rows, steps=list(steps))
    made = dataclasses.replace(made, stages=tuple(stages), noise_count=used)
    annotations = {**made.annotations, "num_steps": sum(steps), "effective_nfe": made.effective_nfe}
    return dataclasses.replace(made, annotations=annotations)


def _network(shape: Shape) -> str:
    return f"unet_{shape[1]}"


def _name(steps: tuple[int, ...]) -> str:
    return "-".join(map(str, steps)) + "-step"
