"""Guided distillation: fold guidance into one call, then halve the steps (Meng et al., arXiv:2210.03142).

Stage 1 (section 3.1) trains a student with the guidance weight w as an input to reproduce the guided
teacher's two calls in one. Stage 2 (section 3.2) is progressive distillation (Salimans and Ho,
arXiv:2202.00512) of that student with w kept as an input: the student of every phase makes one step where
the one before made two. Both work from noise to data and, to encode, from data to noise, where the same
target holds with rising times.

Equations as restated by others and checked by their identities; the paper's own numbering could not be
read, so sections are named and equation numbers are not.

Left open by the paper and chosen here: the weighting of stage 1 is a setting (``prediction``, the plain error
of what the network predicts, is the safe choice for teachers of latents that predict eps); w is drawn per
example; every phase starts from the weights of the one before.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.halving import Halving
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
from edgedistill.table import Guidance


@dataclass(frozen=True)
class PhaseSettings(Stretch):
    """Length, optimizer and loss weighting of one kind of phase."""

    weighting: Weighting = "truncated_snr"


@dataclass(frozen=True)
class GuidedSettings:
    """Settings of guided distillation.

    Fields:
        guidance_scale: Range of g = 1 + w that the student is trained for.
        default_guidance_scale: What the sampler table uses when the caller does not choose; None: 1.5, and 1
            (no guidance, which hurts inversion) to encode; or the nearest in the range.
        direction: ``decode``, from noise to data; ``encode``, from data to noise, for inversion, and for
            style transfer by decoding under another condition.
        encode_from: Label, a little above 0, that an image is taken to have where encoding begins.
        start_steps: Steps of the folded student that stage 2 halves first.
        steps: Numbers of sampler rows to write students for: `start_steps` itself (stage 1 alone) or
            halvings of it; for the stochastic sampler one even number, twice such a halving.
        sampler: ``deterministic`` (DDIM rows), or ``stochastic`` (jump by two grid steps, noise back
            by one), which also trains the last halving on the odd grid points.
        fold, halve: Stage 1, and each phase of stage 2.
        ema: Rate of a moving average of the student, or None (the reference uses none).
    """

    guidance_scale: tuple[float, float] = (1.0, 3.0)
    default_guidance_scale: float | None = None
    direction: Literal["decode", "encode"] = "decode"
    encode_from: int = 10
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
        if not 1.0 <= low <= self.default_scale <= high:
            msg = (
                "`guidance_scale` must be [low, high] with 1 <= low <= `default_guidance_scale` <= high, "
                f"got {[low, high]} and {self.default_scale}."
            )
            raise ConfigError(msg)
        if not self.steps or not {self.jumps(rows) for rows in self.steps} <= {*self.halvings}:
            msg = (
                f"`steps` must be halvings of `start_steps` {self.start_steps}, which are {list(self.halvings)} "
                f"(twice as many rows where the sampler is stochastic), got {list(self.steps)}."
            )
            raise ConfigError(msg)
        if self.sampler == "stochastic" and (len(self.steps) != 1 or self.steps[0] % 2):
            msg = f"The stochastic sampler trains one student of an even number of steps, got {list(self.steps)}."
            raise ConfigError(msg)
        if self.sampler == "stochastic" and self.direction == "encode":
            msg = "There is no stochastic sampler that encodes; set `sampler: deterministic`."
            raise ConfigError(msg)

    @property
    def default_scale(self) -> float:
        """`default_guidance_scale`, or what stands for it."""
        if self.default_guidance_scale is not None:
            return self.default_guidance_scale
        low, high = self.guidance_scale
        return min(max(low, 1.0 if self.direction == "encode" else 1.5), high)

    @property
    def halvings(self) -> tuple[int, ...]:
        """`start_steps`, and what is left of it as often as it can be halved."""
        start = self.start_steps
        return tuple(start >> k for k in range(start.bit_length()) if start % (1 << k) == 0)

    def jumps(self, rows: int) -> int:
        """Number of equal jumps from noise to data that the student of `rows` rows is trained for."""
        return rows // 2 if self.sampler == "stochastic" else rows


def plan(settings: GuidedSettings, context: Context) -> Plan:
    """Lay out both stages.

    Raises:
        ConfigError: If the teacher has no null condition, the network cannot be given w, or as `stages`.
    """
    context.require_null()
    return stages(settings, context, context.student("w"))


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

    Raises:
        ConfigError: If the student predicts epsilon where the first state holds next to nothing of x, the
            schedule has fewer labels than jumps, or encoding begins beyond the first jump.
    """
    student.require_x0(student.schedule.num_train_timesteps - 1)
    guidance = Guidance("embedded", "w", settings.default_scale, settings.guidance_scale)
    encode_from = settings.encode_from if settings.direction == "encode" else None
    halving = Halving(context, guidance, networks or {"unet": "student"}, encode_from)
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
    return Plan(
        tuple(roles), tuple(_phase(settings, halving, count, rows.get(count)) for count in counts)
    )


def _phase(settings: GuidedSettings, halving: Halving, count: int, rows: int | None) -> Phase:
    """Lay out the phase after which the student makes `count` jumps; `rows` are emitted, or None."""
    is_fold = count == settings.start_steps
    is_stochastic = settings.sampler == "stochastic" and rows is not None
    table = halving.stochastic(rows) if is_stochastic and rows else halving.deterministic(count)
    part = settings.fold if is_fold else settings.halve
    loss = (
        _fold_loss(settings)
        if is_fold
        else _halve_loss(settings, halving.grid(2 * count), odd=is_stochastic)
    )
    # What the next phase goes on from is what was emitted: the average where there is one.
    result = "student" if settings.ema is None else "average"
    copies = () if settings.ema is None else (("average", "student"),)
    networks = {
        name: result if role == "student" else role for name, role in halving.networks.items()
    }
    student = Emission(f"{rows or count}-step", table, networks)
    return Phase(
        "fold" if is_fold else f"halve to {count}",
        part.iterations,
        (Update("student", ("student",), loss, part.optimizer),),
        copies=() if is_fold else (*copies, ("student", "previous")),
        # Pictures cannot be drawn of what wants pictures.
        preview=student if settings.direction == "decode" else None,
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


def _halve_loss(settings: GuidedSettings, grid: Sequence[int], *, odd: bool) -> Any:
    count = len(grid) // 2

    def loss(step: Step) -> Losses:
        """Make one step where the previous student makes two (section 3.2)."""
        student, previous = step.roles["student"], step.roles["previous"]
        w = _draw_w(settings, step)
        conditions = {**step.batch.conditions, "w": w}
        points = torch.tensor(grid, device=w.device)
        k = step.draw.integers(1, 2 * count + 1) if odd else 2 * step.draw.integers(1, count + 1)
        u, m, s = points[k], points[k - 1], points[(k - 2).clamp(min=0)]
        z = noised_data(student, step.batch, u, step.draw)
        target = progressive_target(
            student, lambda state, time: previous.x0(state, time, conditions), z, u, m, s
        )
        x0 = student.x0(z, u, conditions)
        return Losses({"halve": weighted_mse(student, x0, target, u, settings.halve.weighting)})

    return loss
