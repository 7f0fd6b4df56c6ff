"""SFD and SFD-v: the student follows its teacher's trajectory, one optimizer step per row (arXiv 2409.19681).

What the public text leaves open is a setting: the grid of the time stamps, where it ends, the teacher's
guidance. All is written in labels and (alpha, sigma), where the paper's Euler steps are DDIM's.

SFD-v's number of stamps enters as every scalar here does: one projection of its embedding, zero at first, is
added to the sinusoid of the time before the time MLP. The paper's code has a projection in each block, after
that of the time.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.plan import (
    Emission,
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
from edgedistill.methods.states import trajectory
from edgedistill.mixture import CallOptions
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import network_of
from edgedistill.rows import analytic_row, ddim_row
from edgedistill.sampler import enter_stage, run_row
from edgedistill.schedule import Schedule
from edgedistill.solvers import multistep_rows
from edgedistill.table import Guidance, Row, SamplerTable

END = -1
STEP = "step"  # the input that tells a student of several samplers how many time stamps there are
ORDERS = {"dpmpp3m": 3, "dpmpp2m": 2, "ddim": 1}


def _adam(learning_rate: float) -> OptimizerSettings:
    return OptimizerSettings("adam", learning_rate, decay="step")


@dataclass(frozen=True)
class SecondSettings(Stretch):
    """The second stage, to fewer stamps: the first stage's student is the teacher, along its own rows.

    Fields:
        stamps: Time stamps of the student; 3 with an analytic first row are one evaluation.
        inserted: Stamps of the teacher between two of the student's. The teacher's own number,
            ``(inserted + 1) * (stamps - 1) + 1``, must be one that the first stage trains.
        features: Weight of a perceptual distance at the last stamp. The paper's is LPIPS, which needs a
            network trained on photographs; here the frozen teacher's own middle block stands in for it.
            0: none.
    """

    iterations: int = 15625
    optimizer: OptimizerSettings = field(default_factory=lambda: _adam(5e-4))
    stamps: int = 3
    inserted: int = 2
    features: float = 0.0

    @property
    def teacher_stamps(self) -> int:
        """Time stamps of the teacher."""
        return (self.inserted + 1) * (self.stamps - 1) + 1


@dataclass(frozen=True)
class SfdSettings:
    """Settings of SFD; the defaults are the paper's, for CIFAR-10.

    Fields:
        stamps: Numbers of time stamps (the paper's ``num_steps``): n stamps are n - 1 rows, the first of
            them without a call where `analytic_first` is set. Several train one student for all of them
            (SFD-v), which is told the number; the first named is its default sampler.
        inserted: Stamps of the teacher between two of the student's (the paper's M).
        solver: The teacher's: DPM-Solver++ of third or second order, or DDIM, which is Euler's.
        guidance_scale: g that the teacher samples with, and that the student makes its own; 1: none.
        grid: ``polynomial`` (Karras' time stamps), or ``trailing`` (even in labels), which ends at the data.
        rho, sigma_max, sigma_min: Of the polynomial grid, in sigma/alpha; where the schedule reaches less
            far, its own ends.
        end: Where the polynomial grid ends: at the stamp ``sigma_min``, or at the ``data`` in its place.
        analytic_first: Whether the student's first row is analytic.
        main: Length and optimizer.
        second: The second stage, or None.
    """

    stamps: tuple[int, ...] = (4,)
    inserted: int = 3
    solver: Literal["dpmpp3m", "dpmpp2m", "ddim"] = "dpmpp3m"
    guidance_scale: float = 1.0
    grid: Literal["polynomial", "trailing"] = "polynomial"
    rho: float = 7.0
    sigma_max: float = 80.0
    sigma_min: float = 0.006
    end: Literal["sigma_min", "data"] = "sigma_min"
    analytic_first: bool = True
    main: Stretch = field(default_factory=lambda: Stretch(1563, _adam(5e-5)))
    second: SecondSettings | None = None

    def __post_init__(self) -> None:
        fewest = 3 if self.analytic_first else 2
        counts = [*self.stamps, *([self.second.stamps] if self.second else [])]
        inserted = [self.inserted, *([self.second.inserted] if self.second else [])]
        if not self.stamps or len({*self.stamps}) < len(self.stamps) or min(counts) < fewest:
            msg = f"`stamps` must be different numbers of at least {fewest}, got {counts}."
            raise ConfigError(msg)
        if min(inserted) < 0:
            msg = f"`inserted` must not be negative, got {min(inserted)}."
            raise ConfigError(msg)
        if self.second is not None and self.second.teacher_stamps not in self.stamps:
            msg = (
                f"The second stage needs a student of {self.second.teacher_stamps} stamps for its teacher; "
                f"`stamps` has {list(self.stamps)}."
            )
            raise ConfigError(msg)

    @property
    def told(self) -> tuple[str, ...]:
        """The scalar inputs that the student has beside the teacher's."""
        return (STEP,) if len(self.stamps) > 1 else ()


@dataclass(frozen=True)
class Course:
    """A student's sampler and its teacher's, which passes through the same stamps.

    Fields:
        student, teacher: The tables.
        each: Rows of the teacher per row of the student.
    """

    student: SamplerTable
    teacher: SamplerTable
    each: int


class Carried(NamedTuple):
    """What goes on from row to row: the course, the student's state, and the teacher's at every stamp."""

    course: Course
    z: Tensor
    targets: Sequence[Tensor]


def plan(settings: SfdSettings, context: Context) -> Plan:
    """Lay out the training: the main stage, and the second one where there is one.

    Raises:
        ConfigError: If the schedule has no such stamps, or none near the first noise, the student predicts
            epsilon where its first call finds next to nothing of x, or guidance is wanted of a teacher
            without a null condition.
    """
    if settings.guidance_scale != 1:
        context.require_null()
    context.require_start(time_stamps(settings, context.schedule, 3)[0])
    student = context.student(*settings.told)
    roles = [Role("teacher", context.teacher), Role("student", student, trained=True)]
    courses = [_main_course(settings, context, count) for count in settings.stamps]
    for course in courses:
        student.require_x0(next(row.note["t"] for row in course.student.rows if row.call))
    phases = [_phase("main", settings.main, trajectory_loss(courses, "teacher"), courses)]
    if settings.second is not None:
        roles.append(Role("first", copy.deepcopy(student)))
        course = _second_course(settings, settings.second, context)
        loss = trajectory_loss([course], "first", settings.second.features)
        copies = (("student", "first"),)
        phases.append(_phase("second", settings.second, loss, [course], copies))
    return Plan(tuple(roles), tuple(phases))


def _phase(
    name: str,
    part: Stretch,
    loss: LossFunction,
    courses: Sequence[Course],
    copies: tuple[tuple[str, str], ...] = (),
) -> Phase:
    tables = {_sampler_name(course.student): course.student for course in courses}
    default, *further = tables
    student = Emission(
        "variable" if further else default,
        tables[default],
        samplers={other: tables[other] for other in further},
    )
    unroll = max(len(table.rows) for table in tables.values())
    update = Update("student", ("student",), loss, part.optimizer, unroll=unroll)
    return Phase(name, part.iterations, (update,), copies, preview=student, emits=student)


def _sampler_name(table: SamplerTable) -> str:
    return f"{table.nfe}-evaluation{'s' if table.nfe > 1 else ''}"


def time_stamps(settings: SfdSettings, schedule: Schedule, count: int) -> tuple[int, ...]:
    """Return the labels of `count` time stamps, falling; the last is where the sampler ends.

    Raises:
        ConfigError: If the schedule is too coarse for them.
    """
    if settings.grid == "trailing":
        return (*schedule.timesteps(count - 1, "trailing"), END)
    levels = schedule.levels
    reach = settings.sigma_max < np.max(levels, where=np.isfinite(levels), initial=0)
    labels = schedule.polynomial(
        count,
        settings.rho,
        settings.sigma_max if reach else None,
        max(settings.sigma_min, float(levels[0])),
    )
    return labels if settings.end == "sigma_min" else (*labels[:-1], END)


def _main_course(settings: SfdSettings, context: Context, count: int) -> Course:
    each = settings.inserted + 1
    labels = time_stamps(settings, context.schedule, each * (count - 1) + 1)
    return Course(
        student_table(settings, context, labels[::each]),
        teacher_table(settings, context, labels),
        each,
    )


def _second_course(settings: SfdSettings, second: SecondSettings, context: Context) -> Course:
    each = second.inserted + 1
    labels = time_stamps(settings, context.schedule, second.teacher_stamps)
    return Course(
        student_table(settings, context, labels[::each]),
        student_table(settings, context, labels),
        each,
    )


def teacher_table(settings: SfdSettings, context: Context, labels: Sequence[int]) -> SamplerTable:
    """Return the teacher's sampler along some labels: the solver's rows, guided where that is set.

    Raises:
        ConfigError: If the teacher predicts epsilon and x0 is not defined at a label, or the solver cannot
            step along them.
    """
    schedule, kind = context.schedule, context.teacher.prediction_type.value
    scale = None if settings.guidance_scale == 1 else settings.guidance_scale
    guidance = Guidance("cfg", None, scale, (scale, scale), context.null) if scale else None
    options: CallOptions = {"guidance_scale": scale}
    rows = (
        [ddim_row(schedule, t, s, kind, **options) for t, s in itertools.pairwise(labels)]
        if settings.solver == "ddim"
        else multistep_rows(schedule, labels, kind, order=ORDERS[settings.solver], **options)
    )
    return context.table(tuple(rows), guidance=guidance)


def student_table(settings: SfdSettings, context: Context, labels: Sequence[int]) -> SamplerTable:
    """Return the student's sampler along its stamps: an analytic row where that is set, and DDIM's rows.

    A student of several samplers is told the number of stamps at every row.

    Raises:
        ConfigError: If the student predicts epsilon and x0 is not defined at a label that it is called at.
    """
    schedule, scale = context.schedule, settings.guidance_scale
    told = dict.fromkeys(settings.told, float(len(labels)))
    pairs = list(itertools.pairwise(labels))
    rows: list[Row] = [analytic_row(schedule, *pairs.pop(0))] if settings.analytic_first else []
    rows += [ddim_row(schedule, t, s, context.kind, feeds=told) for t, s in pairs]
    guidance = None if scale == 1 else Guidance("baked", None, scale, (scale, scale))
    return context.table(tuple(rows), guidance=guidance)


def trajectory_loss(courses: Sequence[Course], teacher: str, features: float = 0.0) -> LossFunction:
    """Return the loss of one row: the L1 distance of the student's state to the teacher's.

    At its first row an iteration chooses one of the courses and draws the noise; data gives only the
    conditions. The state that goes on is the student's own, without its gradient, so that a row learns to
    correct the errors of those before (the paper's algorithm 1). An analytic row has no loss.

    Args:
        courses: To choose from, one for each iteration.
        teacher: The role that runs the teacher's tables.
        features: Weight of the perceptual distance at the last row.
    """

    def loss(step: Step) -> Losses:
        student, conditions = step.roles["student"], step.batch.conditions
        course, z, targets = step.carry or _begin(step, courses, step.roles[teacher])
        row, target = course.student.rows[step.index], targets[step.index]
        called = {"unet": network_of(student)}
        after = run_row(course.student, row, called, z, (), conditions).next
        last = step.index + 1 == len(course.student.rows)
        terms = {}
        if row.call:
            terms[f"row {step.index}"] = (after - target).abs().sum() / len(z)
        if last and features:
            distance = feature_distance(step.roles["teacher"], after, target, conditions)
            terms["features"] = features * distance
        return Losses(terms, Carried(course, after.detach(), targets), done=last)

    return loss


def _begin(step: Step, courses: Sequence[Course], teacher: Denoiser) -> Carried:
    course = courses[step.draw.shared_integer(0, len(courses))]
    stage = course.student.stages[0]
    noise = step.draw.normal(*stage.shape)
    states = trajectory(teacher, course.teacher, noise, step.batch)
    z, _ = enter_stage(course.student, stage, [noise], step.batch.conditions)
    return Carried(course, z, states[course.each - 1 :: course.each])


def feature_distance(
    teacher: Denoiser, made: Tensor, target: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """Return the mean squared distance between the unit features of two batches of nearly clean images.

    As in LPIPS (arXiv 1801.03924) features are scaled to length 1 over their channels; they come from the
    teacher's middle block at label 0.
    """
    t = torch.zeros(len(made), dtype=torch.int64, device=made.device)
    with torch.no_grad():
        wanted = functional.normalize(teacher.tapped(target, t, conditions)[1])
    found = functional.normalize(teacher.tapped(made, t, conditions)[1])
    return (found - wanted).square().sum(1).mean()
