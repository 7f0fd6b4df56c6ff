"""Guided distillation: fold guidance into one call, then halve the steps (Meng et al., arXiv:2210.03142).

Stage 1 (section 3.1) trains a student with the guidance weight w as an input to reproduce the guided
teacher's two calls in one. Stage 2 (section 3.2) is progressive distillation (Salimans and Ho,
arXiv:2202.00512) of that student with w kept as an input: the student of every phase makes one step where
the one before made two.

Equations as restated by others and checked by their identities; the paper's own numbering could not be
read, so sections are named and equation numbers are not.

Left open by the paper and chosen here: the weighting of stage 1 is a setting; w is drawn per example;
every phase starts from the weights of the one before.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.losses import Weighting, weighted_mse
from edgedistill.methods.plan import (
    Emission,
    Follow,
    Losses,
    OptimizerSettings,
    Phase,
    Plan,
    Role,
    Step,
    Stretch,
    Update,
)
from edgedistill.methods.states import noised_data
from edgedistill.methods.targets import cfg_combine, progressive_target
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.rows import ddim_row, jump_and_noise_row
from edgedistill.schedule import Schedule
from edgedistill.table import Guidance, Row, SamplerTable

END = -1
MIN_EPSILON_ALPHA = 0.02


@dataclass(frozen=True)
class PhaseSettings(Stretch):
    """Length, optimizer and loss weighting of one kind of phase."""

    weighting: Weighting = "truncated_snr"


@dataclass(frozen=True)
class GuidedSettings:
    """Settings of guided distillation.

    Fields:
        guidance_scale: Range of g = 1 + w that the student is trained for.
        default_guidance_scale: What the sampler table uses when the caller does not choose.
        start_steps: Steps of the folded student that stage 2 halves first.
        steps: Numbers of sampler rows to write students for: `start_steps` itself (stage 1 alone) or
            halvings of it; for the stochastic sampler one even number, twice such a halving.
        sampler: ``deterministic`` (DDIM rows), or ``stochastic`` (jump by two grid steps, noise back
            by one), which also trains the last halving on the odd grid points.
        fold, halve: Stage 1, and each phase of stage 2.
        ema: Rate of a moving average of the student, or None (the reference uses none).
    """

    guidance_scale: tuple[float, float] = (1.0, 3.0)
    default_guidance_scale: float = 1.5
    start_steps: int = 16
    steps: tuple[int, ...] = (4,)
    sampler: Literal["deterministic", "stochastic"] = "deterministic"
    fold: PhaseSettings = field(
        default_factory=lambda: PhaseSettings(
            8000, OptimizerSettings("adamw", decay="constant"), "snr_plus_one"
        )
    )
    halve: PhaseSettings = field(default_factory=lambda: PhaseSettings(50000))
    ema: float | None = None

    def __post_init__(self) -> None:
        low, high = self.guidance_scale
        if not 1.0 <= low <= self.default_guidance_scale <= high:
            msg = (
                "`guidance_scale` must be [low, high] with 1 <= low <= `default_guidance_scale` <= high, "
                f"got {[low, high]} and {self.default_guidance_scale}."
            )
            raise ConfigError(msg)
        halvings = {self.start_steps >> k for k in range(self.start_steps.bit_length())}
        grids = {self.jumps(rows) for rows in self.steps}
        if not self.steps or not grids <= halvings or self.start_steps % min(grids, default=1):
            msg = f"`steps` must be halvings of `start_steps` {self.start_steps}, got {list(self.steps)}."
            raise ConfigError(msg)
        if self.sampler == "stochastic" and (len(self.steps) != 1 or self.steps[0] % 2):
            msg = f"The stochastic sampler trains one student of an even number of steps, got {list(self.steps)}."
            raise ConfigError(msg)

    def jumps(self, rows: int) -> int:
        """Number of equal jumps from noise to data that the student of `rows` rows is trained for."""
        return rows // 2 if self.sampler == "stochastic" else rows


def plan(settings: GuidedSettings, context: Context) -> Plan:
    """Lay out both stages.

    Raises:
        ConfigError: If the teacher has no null condition, or the student would predict epsilon where the
            first state holds next to nothing of x.
    """
    context.require_null()
    student = context.student("w")
    _check_start(student)
    return stages(settings, context, student)


def stages(
    settings: GuidedSettings,
    context: Context,
    student: Denoiser,
    networks: Mapping[str, str] | None = None,
    further: tuple[Role, ...] = (),
) -> Plan:
    """Lay out both stages for a student that takes w.

    Args:
        settings, context: Of the method.
        student: What is trained.
        networks: What every row calls, in order, with the role that holds it; None: the student as ``unet``.
        further: Other roles that are emitted.
    """
    sketch = _Sketch(settings, context, networks or {"unet": "student"})
    rows = {settings.jumps(count): count for count in settings.steps}
    counts = [settings.start_steps]
    while counts[-1] > min(rows):
        counts.append(counts[-1] // 2)
    roles = [
        Role("teacher", context.teacher),
        Role("student", student, trained=True),
        Role("previous", copy.deepcopy(student)),
    ]
    if settings.ema is not None:
        follow = Follow("student", settings.ema)
        roles.append(Role("average", copy.deepcopy(student), follows=follow))
    roles += further
    return Plan(tuple(roles), tuple(_phase(sketch, count, rows.get(count)) for count in counts))


def _check_start(student: Denoiser) -> None:
    """Refuse eps where the first state holds next to nothing of x: x0 = (z - sigma eps) / alpha."""
    alpha, _ = student.schedule.alpha_sigma(student.schedule.num_train_timesteps - 1)
    if student.prediction_type is PredictionType.EPSILON and alpha < MIN_EPSILON_ALPHA:
        msg = (
            f"A student that predicts epsilon cannot start where alpha is {alpha:.1e}: x0 is lost in rounding; "
            "set `prediction_type: v_prediction` in the recipe."
        )
        raise ConfigError(msg)


def _phase(sketch: "_Sketch", count: int, rows: int | None) -> Phase:
    """Lay out the phase after which the student makes `count` jumps; `rows` are emitted, or None."""
    settings = sketch.settings
    is_fold = count == settings.start_steps
    is_stochastic = settings.sampler == "stochastic" and rows is not None
    table = sketch.stochastic(rows) if is_stochastic and rows else sketch.deterministic(count)
    part = settings.fold if is_fold else settings.halve
    loss = (
        _fold_loss(settings)
        if is_fold
        else _halve_loss(settings, sketch.context.schedule, count, odd=is_stochastic)
    )
    # What the next phase goes on from is what was emitted: the average where there is one.
    result = "student" if settings.ema is None else "average"
    copies = () if settings.ema is None else (("average", "student"),)
    networks = {
        name: result if role == "student" else role for name, role in sketch.networks.items()
    }
    student = Emission(f"{rows or count}-step", table, networks)
    return Phase(
        "fold" if is_fold else f"halve to {count}",
        part.iterations,
        (Update("student", ("student",), loss, part.optimizer),),
        copies=() if is_fold else (*copies, ("student", "previous")),
        preview=student,
        emits=student if rows is not None else None,
    )


def _draw_w(settings: GuidedSettings, step: Step) -> Tensor:
    low, high = settings.guidance_scale
    return step.draw.uniform(low - 1.0, high - 1.0)


def _fold_loss(settings: GuidedSettings) -> Any:
    def loss(step: Step) -> Losses:
        """Match the guided teacher at any time and any w (section 3.1)."""
        teacher, student = step.roles["teacher"], step.roles["student"]
        w = _draw_w(settings, step)
        t = step.draw.integers(0, teacher.schedule.num_train_timesteps)
        z = noised_data(teacher, step.batch, t, step.draw)
        with torch.no_grad():
            target = cfg_combine(
                teacher.x0(z, t, step.batch.conditions), teacher.x0(z, t, step.batch.null), w
            )
        x0 = student.x0(z, t, {**step.batch.conditions, "w": w})
        return Losses({"fold": weighted_mse(student, x0, target, t, settings.fold.weighting)})

    return loss


def _halve_loss(settings: GuidedSettings, schedule: Schedule, count: int, *, odd: bool) -> Any:
    grid = time_grid(schedule, 2 * count)

    def loss(step: Step) -> Losses:
        """Make one step where the previous student makes two (section 3.2)."""
        student, previous = step.roles["student"], step.roles["previous"]
        w = _draw_w(settings, step)
        conditions = {**step.batch.conditions, "w": w}
        points = grid.to(w.device)
        # Position k of the grid is time k / (2 count); position 0 is the end.
        k = step.draw.integers(1, 2 * count + 1) if odd else 2 * step.draw.integers(1, count + 1)
        u, m, s = points[k], points[k - 1], points[(k - 2).clamp(min=0)]
        z = noised_data(student, step.batch, u, step.draw)
        target = progressive_target(
            student, lambda state, time: previous.x0(state, time, conditions), z, u, m, s
        )
        x0 = student.x0(z, u, conditions)
        return Losses({"halve": weighted_mse(student, x0, target, u, settings.halve.weighting)})

    return loss


def time_grid(schedule: Schedule, count: int) -> Tensor:
    """Return the labels of times 0, 1/count, ..., 1: -1 first, then diffusers' trailing grid ascending."""
    return torch.tensor([END, *reversed(schedule.timesteps(count, "trailing"))])


@dataclass(frozen=True)
class _Sketch:
    """Builds the tables that the students are trained for."""

    settings: GuidedSettings
    context: Context
    networks: Mapping[str, str]

    def deterministic(self, count: int) -> SamplerTable:
        """N DDIM rows on the trailing grid; the last one returns x0."""
        schedule, kind = self.context.schedule, self.context.kind
        grid = time_grid(schedule, count).tolist()
        rows = tuple(
            ddim_row(schedule, grid[k], grid[k - 1], kind, network=self.call)
            for k in range(count, 0, -1)
        )
        return self._wrap(rows, 1)

    def stochastic(self, count: int) -> SamplerTable:
        """N rows that jump by 2/N and noise back by 1/N; the last one returns x0 (section 3.3)."""
        schedule, kind = self.context.schedule, self.context.kind
        grid = time_grid(schedule, count).tolist()
        rows = [
            jump_and_noise_row(
                schedule, grid[k], grid[k - 2], grid[k - 1], kind, noise=index, network=self.call
            )
            for index, k in enumerate(range(count, 1, -1), start=1)
        ]
        rows.append(ddim_row(schedule, grid[1], END, kind, network=self.call))
        return self._wrap(tuple(rows), count)

    @property
    def call(self) -> tuple[str, ...]:
        """The networks of a row in the order of their calls."""
        return tuple(self.networks)

    def _wrap(self, rows: tuple[Row, ...], noise_count: int) -> SamplerTable:
        settings = self.settings
        guidance = Guidance(
            "embedded", "w", settings.default_guidance_scale, settings.guidance_scale
        )
        return self.context.table(
            rows, noise_count=noise_count, guidance=guidance, sampler=settings.sampler
        )
