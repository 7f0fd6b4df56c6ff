"""Conditional diffusion distillation: an image condition and few steps in one training (Mei et al., arXiv:2310.01407).

The paper's main equation and its pseudo-code differ in the state at the earlier time (`CodiSettings.state`), and
the boundary scaling and the sampler's times are those of its public code.

There is no guidance: both networks are compared unguided, and a row of the tables is one call; the public code also
trains with both guided, and its demo guides in sampling. Where guidance is wanted, fold it first
(`edgedistill.methods.guided`, stage 1 alone), bake it (``edgedistill export --guidance-scale``), and let that
network be the teacher; or give a table of one's own rows of `edgedistill.rows.boundary_row` with a
``guidance_scale``, which are two calls each.
"""

import copy
import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edgedistill.data.controls import CHANCES, Task, control_conditions, control_error, controls_of
from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.losses import Weighting, weighted_mse
from edgedistill.methods.plan import (
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
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.guide import GuidedDenoiser
from edgedistill.models.inputs import Inputs
from edgedistill.models.residuals import residual_encoder
from edgedistill.models.slim import CutSettings, cut
from edgedistill.prediction import boundary_coefficients
from edgedistill.rows import boundary_row
from edgedistill.schedule import Schedule
from edgedistill.table import Blend, Condition, SamplerTable

Conditions = dict[str, Tensor]
EXAMPLES = 32
LATENT_LIMITS = (-100.0, 100.0)  # no latent has numbers beyond


@dataclass(frozen=True)
class CodiSettings:
    """Settings of conditional distillation.

    Fields:
        task: What the image condition is (see `edgedistill.data.controls`).
        factor: Of super-resolution.
        control: ``adapter``: a copy of the base's encoder reads the image, and its outputs are added to the
            base's skips and middle; ``channels``: the image enters the base's first layer.
        cut: How the adapter's encoder is cut from the base's; its levels must stay.
        trains: ``adapter``: the base stays as it is, and one copy of it serves many adapters; ``all``.
        steps: Numbers of sampler rows to write students for, over the same weights; the first one's is the
            default.
        jumps: Number of equal jumps from noise to data; the student is trained to agree with itself over one.
        spacing: ``leading``: times are multiples of ``T / jumps``, as in the paper's code; ``trailing``:
            they start at the last label, for schedules that leave nothing of x there.
        shared_time: Draw one time for the whole batch, which the paper found better for 1 to 4 steps.
        state: How the state at the earlier time is made of the estimate of x: ``noised`` with the true noise
            (the paper's equation), or along the student's own ``ddim`` step (its pseudo-code).
        compared: What is to agree: the estimates of ``x`` (the default of the public code) or of ``eps`` (as
            the paper writes it), which says nothing of x where little of it is left.
        agreement: Weight of the consistency over one jump.
        guidance: Weight of the distance to the data.
        weighting: Of the distance to the data by noise level; None: plain, as in the paper.
        fidelity: Weight of the distance of the estimate's own control to the given one; not of the paper.
        keeps: Whether the sampler puts the known pixels of inpainting back in the end.
        timestep_scaling: How fast the boundary condition fades with the time.
        ema: Rate of the average that is the target, and is written.
        adapt: Length and optimizer of a phase before, without agreement, which teaches the adapter its task;
            None: none, as in the paper. It pays where training is short.
        train: Length and optimizer.
    """

    task: Task = "super_resolution"
    factor: int = 2
    control: Literal["adapter", "channels"] = "adapter"
    cut: CutSettings = field(default_factory=CutSettings)
    trains: Literal["adapter", "all"] = "adapter"
    steps: tuple[int, ...] = (4,)
    jumps: int = 50
    spacing: Literal["leading", "trailing"] = "leading"
    shared_time: bool = True
    state: Literal["noised", "ddim"] = "ddim"
    compared: Literal["x", "eps"] = "eps"
    agreement: float = 1.0
    guidance: float = 1.0
    weighting: Weighting | None = None
    fidelity: float = 0.0
    keeps: bool = False
    timestep_scaling: float = 10.0
    ema: float = 0.99995
    adapt: Stretch | None = None
    train: Stretch = field(
        default_factory=lambda: Stretch(
            100_000,
            OptimizerSettings("adamw", 1e-5, weight_decay=0.01, decay="constant"),
        )
    )

    def __post_init__(self) -> None:
        if not self.steps or not all(1 <= count <= self.jumps for count in self.steps):
            msg = f"`steps` must lie in [1, {self.jumps}], the number of `jumps`, got {list(self.steps)}."
            raise ConfigError(msg)
        if self.control == "channels" and (self.trains, self.cut) != ("all", CutSettings()):
            msg = "With `control: channels` there is no adapter: set `trains: all` and leave `cut` out."
            raise ConfigError(msg)
        if self.keeps and self.task != "inpainting":
            msg = f"`keeps` is for inpainting; a sampler for {self.task} knows no pixels."
            raise ConfigError(msg)
        weights = (self.agreement, self.guidance, self.fidelity)
        if min(weights) < 0 or self.agreement + self.guidance == 0:
            msg = f"`agreement`, `guidance` and `fidelity` must not be negative, nor the first two both 0, got {weights}."
            raise ConfigError(msg)


def plan(settings: CodiSettings, context: Context) -> Plan:
    """Lay out the phases.

    Raises:
        ConfigError: If the network takes no adapter, the base of a lone adapter is not the teacher as it is, the
            images do not divide by `factor`, the schedule has fewer labels than jumps, the jumps make no sampler
            of so many steps, or the student would predict epsilon where the first state has next to nothing of x.
    """
    _, height, width = context.shape
    if settings.task == "super_resolution" and (
        height % settings.factor or width % settings.factor
    ):
        msg = f"`factor` {settings.factor} does not divide images of {height}x{width}."
        raise ConfigError(msg)
    grid = jump_grid(context.schedule, settings.jumps, settings.spacing)
    require_steps(grid, settings.jumps, settings.steps)
    controls = control_conditions(settings.task, context.shape, context.clamp or LATENT_LIMITS)
    roles, networks = _roles(settings, context, controls)
    for role in roles:
        if isinstance(role.module, Denoiser):
            role.module.require_x0(grid[-1])
    tables = {str(count): _table(settings, context, controls, count) for count in settings.steps}
    default, *further = tables
    student = Emission(
        f"{default}-step",
        tables[default],
        networks,
        {f"{name}-step": tables[name] for name in further},
        examples=_examples(settings, context),
    )
    stretches = {"codi": (settings.train, settings)}
    if settings.adapt is not None:
        alone = dataclasses.replace(settings, agreement=0.0)
        stretches = {"adapt": (settings.adapt, alone), **stretches}
    trained = tuple(role.name for role in roles if role.trained)
    # What a phase goes on from is the average of the one before.
    averages = tuple((role.name, role.follows.role) for role in roles if role.follows is not None)
    phases = tuple(
        Phase(
            name,
            stretch.iterations,
            (Update("student", trained, codi_loss(chosen, grid), stretch.optimizer),),
            copies=averages if index else (),
            preview=student,
            emits=student if name == "codi" else None,
        )
        for index, (name, (stretch, chosen)) in enumerate(stretches.items())
    )
    return Plan(roles, phases)


def _examples(settings: CodiSettings, context: Context) -> dict[str, np.ndarray]:
    """Return what some of the data is controlled by; nothing where there is no data."""
    if context.samples is None:
        return {}
    x = context.samples.first(EXAMPLES).x.cpu().numpy()
    generator = np.random.Generator(np.random.Philox(key=context.seed))
    chances = generator.random((len(x), CHANCES), dtype=np.float32)
    return controls_of(settings.task, x, chances, settings.factor)


def _roles(
    settings: CodiSettings, context: Context, controls: tuple[Condition, ...]
) -> tuple[tuple[Role, ...], dict[str, str]]:
    """Return the roles, and the role of each network of the table."""
    (channels, *_), follow = controls[0].shape or (1,), Follow("student", settings.ema)
    masked = len(controls) > 1
    if settings.control == "channels":
        student = context.student(image_channels=channels, mask=masked)
        average = Role("average", copy.deepcopy(student), follows=follow)
        return (Role("student", student, trained=True), average), {"unet": "average"}
    if settings.trains == "adapter":
        context.require_frozen_base("An adapter", ", or train it too (`codi.trains: all`)")
    base = context.student(residuals=True)
    whole = settings.cut == CutSettings()
    source = context.base if whole else cut(context.base, settings.cut)
    inputs = Inputs(image_channels=channels, mask=masked)
    adapter = residual_encoder(source, base.network, inputs)
    everything = settings.trains == "all"
    last = copy.deepcopy(base) if everything else base
    roles = [
        Role("base", base, trained=everything),
        Role("student", GuidedDenoiser(adapter, base), trained=True),
        Role("average", GuidedDenoiser(copy.deepcopy(adapter), last), follows=follow),
    ]
    if everything:
        roles.append(Role("base average", last, follows=Follow("base", settings.ema)))
    return tuple(roles), {"adapter": "average", "unet": "base average" if everything else "base"}


def jump_grid(
    schedule: Schedule, jumps: int, spacing: Literal["leading", "trailing"]
) -> tuple[int, ...]:
    """Return the rising labels between which the student jumps; the first is 0, where its estimate is its state.

    Raises:
        ConfigError: If the schedule has fewer labels than jumps.
    """
    times = schedule.timesteps(jumps, spacing)[::-1]
    return times if times[0] == 0 else (0, *times)


def row_times(grid: tuple[int, ...], jumps: int, count: int) -> list[tuple[int, int]]:
    """Return (t, s) of `count` rows: every ceil(jumps / count)-th time from the top, and 0 in the end."""
    stride = -(-jumps // count)
    chosen = [grid[-1 - stride * index] for index in range(count) if stride * index < len(grid) - 1]
    return list(itertools.pairwise([*chosen, 0]))


def require_steps(grid: tuple[int, ...], jumps: int, counts: tuple[int, ...]) -> None:
    """Refuse numbers of rows that whole strides over the grid do not make.

    Args:
        grid: Of `jump_grid`.
        jumps: Number of jumps that it was made of.
        counts: Numbers of rows that are asked for.

    Raises:
        ConfigError: Naming the numbers that there are.
    """
    possible = [n for n in range(1, jumps + 1) if len(row_times(grid, jumps, n)) == n]
    if missing := sorted({*counts} - {*possible}):
        msg = (
            f"`steps` {missing} cannot be made of {jumps} jumps, every ceil(jumps / steps)-th of which is a row's time; "
            f"choose among {', '.join(map(str, possible))}, or other `jumps`."
        )
        raise ConfigError(msg)


def _table(
    settings: CodiSettings, context: Context, controls: tuple[Condition, ...], count: int
) -> SamplerTable:
    schedule = context.schedule
    grid = jump_grid(schedule, settings.jumps, settings.spacing)
    network = ("adapter", "unet") if settings.control == "adapter" else "unet"
    rows = [
        boundary_row(
            schedule,
            t,
            s,
            context.kind,
            timestep_scaling=settings.timestep_scaling,
            network=network,
        )
        for t, s in row_times(grid, settings.jumps, count)
    ]
    table = context.table(tuple(rows), task=settings.task)
    table = dataclasses.replace(table, conditions=(*context.conditions, *controls))
    if not settings.keeps:
        return table
    rows[-1] = dataclasses.replace(rows[-1], blend=Blend(known=1.0))
    stage = dataclasses.replace(table.stages[0], rows=tuple(rows))
    return dataclasses.replace(table, stages=(stage,))


def codi_loss(settings: CodiSettings, grid: tuple[int, ...]) -> LossFunction:
    """Return the loss: distance to the data, and agreement with oneself over one jump.

    Args:
        settings: Of the method.
        grid: Rising labels, of `jump_grid`; a jump leads from one to the one before.
    """
    labels = torch.tensor(grid)

    def loss(step: Step) -> Losses:
        x, draw, student = step.batch.x, step.draw, step.roles["student"]
        chances = torch.stack([draw.uniform(0.0, 1.0) for _ in range(CHANCES)], dim=1)
        controls = controls_of(settings.task, x, chances, settings.factor)
        conditions = {**step.batch.conditions, **controls}
        places = draw.integers(1, len(grid))
        if settings.shared_time:
            places = torch.full_like(places, draw.shared_integer(1, len(grid)))
        t, s = (labels.to(x.device)[places - back] for back in (0, 1))
        noise = draw.normal(*x.shape[1:])
        alpha, sigma = student.alpha_sigma(t)
        z = alpha * x + sigma * noise
        made = estimates(student, z, t, conditions, settings.timestep_scaling)
        terms = data_terms(settings, student, made[0], x, t, controls)
        if settings.agreement:
            kept = noise if settings.state == "noised" else made[1]
            target = agreement_target(
                step.roles["average"], made[0], kept, s, conditions, settings.timestep_scaling
            )
            place = ("x", "eps").index(settings.compared)
            error = (made[place] - target[place]).square().mean()
            terms["agreement"] = settings.agreement * error
        return Losses(terms)

    return loss


def data_terms(
    settings: CodiSettings,
    student: Denoiser,
    x0: Tensor,
    x: Tensor,
    t: Tensor,
    controls: Conditions,
) -> dict[str, Tensor]:
    """Return the terms that need no second network: distances to the data, and to its control.

    Args:
        settings: Weights of the terms; those of weight 0 are left out.
        student: Says how the distance is weighted by noise level.
        x0, x: (batch, channels, height, width), the student's estimate and the data.
        t: (batch,) labels.
        controls: The image and the mask (batch, ., height, width) that the data was turned into.

    Returns:
        Scalars by name.
    """
    terms = {}
    if settings.guidance and settings.weighting is None:
        terms["guidance"] = settings.guidance * (x0 - x).square().mean()
    elif settings.guidance and settings.weighting is not None:
        terms["guidance"] = settings.guidance * weighted_mse(student, x0, x, t, settings.weighting)
    if settings.fidelity:
        error = control_error(settings.task, x0, controls, settings.factor)
        terms["fidelity"] = settings.fidelity * error
    return terms


def estimates(
    denoiser: Denoiser, z: Tensor, t: Tensor, conditions: Conditions, timestep_scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the estimate of x, which is z itself at label 0, and the network's eps; both shaped as z.

    Args:
        denoiser: The network.
        z: (batch, channels, height, width) state.
        t: (batch,) labels.
        conditions: The network's other inputs.
        timestep_scaling: See `CodiSettings`.
    """
    raw = denoiser.raw(z, t, conditions)
    c_skip, c_out = boundary_coefficients(t[:, None, None, None], timestep_scaling)
    x0 = c_skip * z + c_out * denoiser.to_x0(z, t, raw)
    return x0, denoiser.to_eps(z, t, raw)


@torch.no_grad()
def agreement_target(
    average: Denoiser,
    x0: Tensor,
    eps: Tensor,
    s: Tensor,
    conditions: Conditions,
    timestep_scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return the average student's estimates of x and eps at ``z_s = alpha_s x0 + sigma_s eps``.

    Args:
        average: The target network.
        x0, eps: The student's estimate, and the true noise or the student's own.
        s: (batch,) labels of the earlier time.
        conditions: Of the batch.
        timestep_scaling: See `CodiSettings`.
    """
    alpha, sigma = average.alpha_sigma(s)
    return estimates(average, alpha * x0 + sigma * eps, s, conditions, timestep_scaling)
