"""Consistency trajectory models: one network jumps from any time to any earlier one (Kim et al., arXiv:2310.02279).

Beside t the student g is told s, the time that it jumps to. The jump is DDIM's step,
``G(z, t, s) = (sigma_s/sigma_t) z + (alpha_s - sigma_s alpha_t/sigma_t) g(z, t, s)``; in z/alpha, the
variance-exploding state, that is the paper's ``(s/t) z + (1 - s/t) g``. Three losses train it:

- consistency: the jump t -> s, and the jump u -> s from where the teacher's ODE leads from t to u, end in
  the same image once the moving average has jumped on to the end of time;
- denoising: g(z, t, t) is the denoiser itself;
- adversarial, in a second phase: a critic tells jumps to the end from data.

The last two are weighted so that they move the last layer as much as the first does. The end of time is
label 0, the paper's smallest noise level.

What the paper and its code leave open, or need pretrained networks for, is decided so. Distances are on
pixels, where the paper's are LPIPS. The critic sees pixels, or the frozen teacher's features, where the
paper's sees those of ImageNet networks. The images that are to fool it are those of the consistency loss (the
code draws others). Where the teacher is guided, so is the target of the denoising loss: data would draw the
short jumps away from the guided trajectories. s enters as every scalar here does: one projection of its
embedding, zero at first, is added to the sinusoid of the time before the time MLP; in the code s has an MLP of
its own, and a projection in each block.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from edgedistill.contract import residual_shapes
from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.jumps import END, GridSettings, gamma_rows, jump
from edgedistill.methods.losses import (
    Adversarial,
    Distance,
    balance,
    critic_loss,
    distance,
    fooling_loss,
    weighted_mse,
)
from edgedistill.methods.plan import (
    Draw,
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
from edgedistill.methods.targets import Predict, Solver, cfg_combine, require_solver, solver_step
from edgedistill.models.critic import Critic
from edgedistill.models.discriminator import Head
from edgedistill.models.store import config_of
from edgedistill.schedule import Schedule
from edgedistill.table import Guidance, SamplerTable

DENOISING_BOUNDS, ADVERSARIAL_BOUNDS = (0.0, 1e4), (0.01, 10.0)


@dataclass(frozen=True)
class DenoisingSettings:
    """The denoising loss, and the noise levels sigma/alpha that it is drawn at.

    Fields:
        weight: Multiplies its balanced weight; 0 leaves it out. Without it the consistency loss, which sees
            states only by where the moving average takes them, lets several jumps in a row gather noise.
        mean, deviation: Of the logarithm of the level, for the first share of samples.
        high: The other samples' levels lie this far down the polynomial grid, from 0 (noise) to 1.
        share: Of samples at the log-normal levels.
    """

    weight: float = 1.0
    mean: float = -1.2
    deviation: float = 1.2
    high: float = 0.7
    share: float = 0.5


@dataclass(frozen=True)
class AdversarialSettings(Stretch):
    """The second phase, in which student and critic take turns.

    Fields:
        iterations: Half of them the student's.
        form: Of the two losses.
        weight: Multiplies the balanced weight of the student's.
        critic: What the critic sees: ``pixels``, or the features in the middle of the frozen ``teacher``.
        noise: What hides small differences from it: standard deviation of noise on the pixels, or the
            share of the schedule's labels, from the cleanest on, that the teacher sees images at.
        width: Channels of the first layer of a critic of pixels.
        critic_optimizer: Its optimizer.
    """

    iterations: int = 60000
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings("radam", 8e-6, decay="constant")
    )
    form: Adversarial = "hinge"
    weight: float = 1.0
    critic: Literal["pixels", "teacher"] = "teacher"
    noise: float = 0.5
    width: int = 64
    critic_optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings("radam", 2e-3, (0.5, 0.9), decay="constant")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0 or (self.critic == "teacher" and self.noise > 1):
            msg = f"`noise` must not be negative, and with `critic: teacher`, a share of labels, not above 1, got {self.noise:g}."
            raise ConfigError(msg)


@dataclass(frozen=True)
class CtmSettings:
    """Settings of CTM; the defaults are those of its code for CIFAR-10.

    Fields:
        guidance_scale: g of the teacher's trajectories, which the student makes its own; 1: none.
        grid: Where jumps begin and end, in training and in the samplers.
        solver: Of the teacher's ODE (see `solver_step`).
        most_steps: Largest number h of its steps between t and u.
        steps_drawn: Chance of h: ``weighted`` is in proportion to h, ``uniform`` is equal, ``global``
            goes all the way to s, the target of other distillations.
        to_end: Share of the other jumps that are made to end at the data; without them few do.
        self_learn: Let the moving average's g(z, t, t) take the teacher's place.
        distance: Between the two images of the consistency loss.
        average: Rate of the moving average, which is also what is exported.
        denoising, consistency: The denoising loss; length and optimizer of the first phase.
        adversarial: The second phase, or None.
        steps: Evaluations of the deterministic samplers; the first is the student's default.
        gamma: Of one more sampler of as many evaluations as the longest of `steps`: the share of fresh
            noise at every time between; 0: none.
    """

    guidance_scale: float = 1.0
    grid: GridSettings = field(default_factory=GridSettings)
    solver: Solver = "heun"
    most_steps: int = 17
    steps_drawn: Literal["weighted", "uniform", "global"] = "weighted"
    to_end: float = 0.0
    self_learn: bool = False
    distance: Distance = "l2"
    average: float = 0.999
    denoising: DenoisingSettings = field(default_factory=DenoisingSettings)
    consistency: Stretch = field(
        default_factory=lambda: Stretch(50000, OptimizerSettings("radam", 4e-4, decay="constant"))
    )
    adversarial: AdversarialSettings | None = field(default_factory=AdversarialSettings)
    steps: tuple[int, ...] = (1, 2, 4)
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.most_steps < self.grid.points:
            msg = f"`most_steps` must lie in [1, {self.grid.points - 1}], below `grid.points`, got {self.most_steps}."
            raise ConfigError(msg)
        if not self.steps or min(self.steps) < 1 or len({*self.steps}) < len(self.steps):
            msg = f"`steps` must be different numbers of at least 1, got {list(self.steps)}."
            raise ConfigError(msg)
        if self.self_learn and self.guidance_scale != 1:
            msg = f"A student that learns from itself has no guidance to learn, got `guidance_scale` {self.guidance_scale}."
            raise ConfigError(msg)

    @property
    def w(self) -> float:
        """Meng's weight of the guidance."""
        return self.guidance_scale - 1


def plan(settings: CtmSettings, context: Context) -> Plan:
    """Lay out the two phases.

    Raises:
        ConfigError: If the schedule is too coarse for a grid, a grid begins far from the first noise, the
            solver cannot take its first step, there is guidance without a null condition, the student
            would predict epsilon where the first state has next to nothing of x, or a critic of the
            teacher's features finds none.
    """
    if settings.w:
        context.require_null()
    labels = settings.grid.labels(context.schedule)
    context.require_start(labels[0])
    require_solver(settings.solver, context.schedule, *labels[:2])
    points = torch.tensor(labels)
    student = context.student("s")
    student.require_x0(labels[0])
    follow = Follow("student", settings.average, warmed=False)
    roles = [
        Role("teacher", context.teacher),
        Role("student", student, trained=True),
        Role("average", copy.deepcopy(student), follows=follow),
    ]
    objective = _Objective(settings, context, points)
    phases = [_phase("consistency", settings.consistency, objective)]
    if (against := settings.adversarial) is not None:
        roles.append(Role("critic", _critic(against, context), trained=True))
        phases.append(_phase("adversarial", against, objective, against))
    return Plan(tuple(roles), tuple(phases))


class Times(NamedTuple):
    """Places on the grid of one step, (batch,) each: u lies `steps` after t, and s not before u."""

    t: Tensor
    s: Tensor
    steps: int


def draw_times(settings: CtmSettings, draw: Draw) -> Times:
    """Draw the places t < u <= s, (batch,) each; the number of steps from t to u is one for the batch."""
    most, last = settings.most_steps, settings.grid.points - 1
    if settings.steps_drawn == "uniform":
        steps = draw.shared_integer(1, most + 1)
    else:
        # The numbers 1, 2, 2, 3, 3, 3, ... by their places.
        place = draw.shared_integer(0, most * (most + 1) // 2)
        steps = (math.isqrt(8 * place + 1) + 1) // 2
    t = draw.integers(0, last - steps + 1)
    u = t + steps
    further = (draw.uniform(0, 1) * (last + 1 - u)).long()
    s = torch.minimum(u + further, torch.full_like(u, last))
    s = torch.where(draw.uniform(0, 1) < settings.to_end, last, s)
    return Times(t, u if settings.steps_drawn == "global" else s, steps)


def image_of(step: Step, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return where the student's jump t -> s ends once the moving average has jumped on to the end.

    Args:
        step: Roles and conditions.
        z: (batch, channels, height, width) state at t.
        t, s: (batch,) labels, s <= t.
    """
    conditions = step.batch.conditions
    landed = jump(step.roles["student"], z, t, s, conditions)
    return jump(step.roles["average"], landed, s, torch.full_like(s, END), conditions)


@torch.no_grad()
def target_of(settings: CtmSettings, points: Tensor, times: Times, step: Step, z: Tensor) -> Tensor:
    """Return the image of the jump u -> s from where the ODE leads z from t to u.

    Args:
        settings: Of the method.
        points: The grid's labels, falling.
        times: Places on the grid.
        step: Roles and conditions.
        z: (batch, channels, height, width) state at t.
    """
    student, predict = step.roles["student"], _predict(settings, step)
    for place in range(times.steps):
        now, then = points[times.t + place], points[times.t + place + 1]
        z = solver_step(student, predict, z, now, then, settings.solver)
    return image_of(step, z, points[times.t + times.steps], points[times.s])


def _predict(settings: CtmSettings, step: Step) -> Predict:
    """Return x0 of (state, label), as the ODE that is learnt has it."""
    teacher, average, w = step.roles["teacher"], step.roles["average"], settings.w
    conditions = step.batch.conditions
    both = {k: torch.cat([v, step.batch.null.get(k, v)]) for k, v in conditions.items()}

    def predict(z: Tensor, t: Tensor) -> Tensor:
        if settings.self_learn:
            return average.x0(z, t, {**conditions, "s": t})
        if not w:
            return teacher.x0(z, t, conditions)
        x0, null = teacher.x0(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return cfg_combine(x0, null, torch.full_like(z[:, 0, 0, 0], w))

    return predict


def denoising_levels(settings: CtmSettings, schedule: Schedule, draw: Draw) -> Tensor:
    """Draw the noise levels sigma/alpha (batch,) of the denoising loss, before they are rounded to labels."""
    own = settings.denoising
    normal = (own.mean + own.deviation * draw.normal()).exp()
    spread = settings.grid.level(schedule, draw.uniform(0, own.high))
    return torch.where(draw.uniform(0, 1) < own.share, normal, spread)


@dataclass(frozen=True)
class _Objective:
    """The losses of both phases; `points` are the training grid's labels, falling."""

    settings: CtmSettings
    context: Context
    points: Tensor

    def student(self, step: Step, against: AdversarialSettings | None = None) -> Losses:
        """Return the consistency loss, the denoising loss, and the one against a critic if there is one."""
        settings, last = self.settings, step.roles["student"].last_layer
        points = self.points.to(step.batch.x.device)
        times = draw_times(settings, step.draw)
        z = noised_data(step.roles["student"], step.batch, points[times.t], step.draw)
        estimate = image_of(step, z, points[times.t], points[times.s])
        target = target_of(settings, points, times, step, z)
        lead = distance(estimate, target, settings.distance)
        terms = {"consistency": lead}
        if settings.denoising.weight:
            term = self._denoising(step)
            share = settings.denoising.weight * balance(lead, term, last, DENOISING_BOUNDS)
            terms["denoising"] = share * term
        if against is not None:
            term = fooling_loss(self._score(step, estimate, against), against.form)
            share = against.weight * balance(lead, term, last, ADVERSARIAL_BOUNDS)
            terms["adversarial"] = share * term
        return Losses(terms)

    def critic(self, step: Step, against: AdversarialSettings) -> Losses:
        """Tell data from the student's jumps."""
        points = self.points.to(step.batch.x.device)
        times = draw_times(self.settings, step.draw)
        z = noised_data(step.roles["student"], step.batch, points[times.t], step.draw)
        with torch.no_grad():
            fake = image_of(step, z, points[times.t], points[times.s])
        real, made = (self._score(step, images, against) for images in (step.batch.x, fake))
        return Losses({"critic": critic_loss(real, made, against.form)})

    def _denoising(self, step: Step) -> Tensor:
        """Return the error of g(z, t, t), weighted as EDM's."""
        settings, student = self.settings, step.roles["student"]
        levels = denoising_levels(settings, student.schedule, step.draw)
        t = student.label_of(levels)
        z = noised_data(student, step.batch, t, step.draw)
        target = step.batch.x
        if settings.w:
            with torch.no_grad():
                target = _predict(settings, step)(z, t)
        x0 = student.x0(z, t, {**step.batch.conditions, "s": t})
        return weighted_mse(student, x0, target, t, "edm")

    def _score(self, step: Step, images: Tensor, against: AdversarialSettings) -> Tensor:
        critic, draw = step.roles["critic"], step.draw
        labels = [item.name for item in self.context.conditions if item.kind == "class"]
        if against.critic == "pixels":
            noised = images + against.noise * draw.normal(*images.shape[1:])
            return critic(noised, *(step.batch.conditions[name] for name in labels))
        teacher = step.roles["teacher"]
        highest = max(int(against.noise * teacher.schedule.num_train_timesteps), 1)
        t = draw.integers(0, highest)
        z = noised_data(teacher, replace(step.batch, x=images), t, draw)
        return critic(teacher.tapped(z, t, step.batch.conditions)[1])


def _critic(settings: AdversarialSettings, context: Context) -> nn.Module:
    if settings.critic == "teacher":
        _ = context.teacher.middle
        return Head(residual_shapes(config_of(context.teacher.network))[-1], context.seed)
    sizes = [item.size for item in context.conditions if item.kind == "class"]
    channels, *size = context.shape
    classes = sizes[0] if sizes else None
    return Critic(channels, min(size), classes, width=settings.width, seed=context.seed)


def table(settings: CtmSettings, context: Context, steps: int, gamma: float = 0.0) -> SamplerTable:
    """Return the sampler of `steps` jumps, with a share `gamma` of fresh noise between (see `gamma_rows`).

    Raises:
        ConfigError: If the schedule is too coarse for as many jumps, or gamma is outside of [0, 1].
    """
    labels = settings.grid.labels(context.schedule, steps + 1)
    rows = gamma_rows(context.schedule, labels, context.kind, gamma)
    scale = settings.guidance_scale
    guidance = Guidance("baked", None, scale, (scale, scale)) if settings.w else Guidance()
    count = 1 + sum(row.noise is not None for row in rows)
    return context.table(rows, noise_count=count, guidance=guidance, gamma=gamma)


def _phase(
    name: str, part: Stretch, objective: _Objective, against: AdversarialSettings | None = None
) -> Phase:
    settings, context = objective.settings, objective.context
    samplers = {f"{n}-step": table(settings, context, n) for n in settings.steps}
    default, *_ = samplers
    if settings.gamma:
        most = max(settings.steps)
        samplers[f"{most}-step-stochastic"] = table(settings, context, most, settings.gamma)
    emission = Emission(name, samplers.pop(default), {"unet": "average"}, samplers)
    student = Update(
        "student", ("student",), partial(objective.student, against=against), part.optimizer
    )
    updates: tuple[Update, ...] = (student,)
    if against is not None:
        optimizer, loss = against.critic_optimizer, partial(objective.critic, against=against)
        updates = (
            replace(student, every=2, zero_also=("critic",)),
            Update("critic", ("critic",), loss, optimizer, every=2, offset=1),
        )
    return Phase(name, part.iterations, updates, preview=emission, emits=emission)
