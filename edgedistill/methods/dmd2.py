"""Improved distribution matching distillation, DMD2 (Yin et al., arXiv:2405.14867).

The student's images are noised and shown to two denoisers: the frozen teacher, which knows the data, and a
fake score, which learns what the student makes at the moment. Their difference is the gradient that moves
the student's distribution onto the teacher's. In the place of DMD's regression onto the teacher's samples the
fake score and its head, one critic, make several steps for each one of the student (two time-scales), and the
head, which sees the features in the middle of the fake score, adds a GAN loss on data. Regression is there all the
same, as a setting: the paper's one-step SDXL warms up by it, and so do the recipes of the packaged teachers,
whose students keep more variety so.

Equations and settings are those of the paper's public code, whose section numbers could not be checked.
Decided here: the fake score's loss is the plain error of what it predicts, which is the code's for eps and
for EDM alike; a warm-up by regression (the paper's one-step SDXL) uses the squared error in place of LPIPS.
"""

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.losses import critic_loss, fooling_loss, matching_loss, prediction_mse
from edgedistill.methods.pairs import Pairs, PairSettings
from edgedistill.methods.plan import (
    Batch,
    Emission,
    Losses,
    LossFunction,
    OptimizerSettings,
    Phase,
    Plan,
    Role,
    Step,
    Stretch,
    Subset,
    Update,
)
from edgedistill.methods.states import noised_data
from edgedistill.methods.targets import cfg_combine, matching_gradient
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.discriminator import Head
from edgedistill.models.run import network_of
from edgedistill.rows import renoise_row, return_x0_row
from edgedistill.sampler import enter_stage, run_row
from edgedistill.table import Guidance, Next, SamplerTable

IMAGES = "images"  # in the memo: what the student's update made for the critic's


def _adamw(learning_rate: float, warmup: int = 500) -> OptimizerSettings:
    return OptimizerSettings(
        "adamw", learning_rate, weight_decay=0.01, warmup=warmup, decay="constant"
    )


@dataclass(frozen=True)
class StageSettings(Stretch):
    """A phase of distribution matching; student and critic have the same optimizer settings.

    Fields:
        student_gan: Weight of the GAN loss in the student's update.
        critic_gan: Weight of the GAN loss in the critic's update; 0: no GAN, and so `student_gan` must be 0.
        regression: Weight of the squared error to the teacher's samples of the same noise, which DMD
            needed and DMD2 does without.
    """

    iterations: int = 40000
    optimizer: OptimizerSettings = field(default_factory=lambda: _adamw(1e-5))
    student_gan: float = 0.0
    critic_gan: float = 0.0
    regression: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.student_gan, self.critic_gan, self.regression)
        if min(weights) < 0:
            msg = (
                f"`student_gan`, `critic_gan` and `regression` must not be negative, got {weights}."
            )
            raise ConfigError(msg)
        if self.student_gan and not self.critic_gan:
            msg = f"`student_gan` {self.student_gan:g} would fool a head that `critic_gan` 0 never trains; set both above 0, or both to 0."
            raise ConfigError(msg)

    @property
    def has_gan(self) -> bool:
        """Whether the head is trained."""
        return self.critic_gan > 0


@dataclass(frozen=True)
class DMD2Settings:
    """Settings of DMD2; the defaults are the code's for Stable Diffusion 1.5 in one step.

    Fields:
        labels: What the student is told of the time at each of its evaluations, falling. The first one
            gets pure noise, whatever the label says (for SDXL in one step it is 399); several make the
            student one of as many steps, each trained on its own samples up to there.
        guidance_scale: g of the teacher's score; 1: none. The fake score is never guided.
        student_every: Steps of the critic for each step of the student.
        times: Range of the noise that images are compared under, as shares of the schedule's length.
        pairs: Of the warm-up and of `StageSettings.regression`.
        warm_up: Regression onto the teacher's samples before everything else, or None, as in the paper.
        match: Distribution matching, or None to begin with the GAN at once.
        adversarial: Distribution matching with the GAN, or None.
    """

    labels: tuple[int, ...] = (999,)
    guidance_scale: float = 1.75
    student_every: int = 10
    times: tuple[float, float] = (0.02, 0.98)
    pairs: PairSettings = field(default_factory=PairSettings)
    warm_up: Stretch | None = None
    match: StageSettings | None = field(default_factory=StageSettings)
    adversarial: StageSettings | None = field(
        default_factory=lambda: StageSettings(5000, _adamw(5e-7), 1e-3, 1e-2)
    )

    def __post_init__(self) -> None:
        if not self.labels or list(self.labels) != sorted({*self.labels}, reverse=True):
            msg = f"`labels` must be one or more falling labels, got {list(self.labels)}."
            raise ConfigError(msg)
        low, high = self.times
        if not 0 <= low < high <= 1 or self.student_every < 1:
            msg = f"`times` must be [low, high] in [0, 1] and `student_every` at least 1, got {[low, high]} and {self.student_every}."
            raise ConfigError(msg)
        if self.match is None and self.adversarial is None:
            msg = "One of `match` and `adversarial` must be there."
            raise ConfigError(msg)


def plan(settings: DMD2Settings, context: Context) -> Plan:
    """Lay out the phases: the warm-up where there is one, distribution matching, then the GAN.

    Raises:
        ConfigError: If the teacher cannot be guided or has no middle block, a label is outside of the
            schedule, or the student would predict epsilon where its first label has next to nothing of x.
    """
    method = Distillation(settings, context)
    student = Role("student", method.student(), trained=True)
    return Plan((*method.roles(), student), method.phases(student.name))


class Distillation:
    """What all students of the same settings have in common: their sampler, critic and losses.

    Args:
        settings: Of the method.
        context: What the recipe puts it into.
        paired: Which of the pairs are trained on, by their conditions; None: all.
    """

    def __init__(
        self, settings: DMD2Settings, context: Context, paired: Subset | None = None
    ) -> None:
        if settings.guidance_scale != 1:
            context.require_null()
        self.settings = settings
        self.context = context
        self.table = student_table(settings, context)
        self.pairs = Pairs(settings.pairs, settings.guidance_scale, context, paired)

    def student(self) -> Denoiser:
        """Return a fresh student."""
        student = self.context.student()
        student.require_x0(self.settings.labels[0])
        return student

    def head(self) -> Head:
        """Return a fresh head for the teacher's features."""
        return Head(self.context.teacher.middle_shape, self.context.seed)

    def roles(self) -> tuple[Role, ...]:
        """Return the teacher, and the critic's two parts with their first weights."""
        return (
            Role("teacher", self.context.teacher),
            Role("fake", self.context.copy_of_teacher(), trained=True),
            Role("head", self.head(), trained=True),
        )

    def phases(self, student: str, source: str = "data") -> tuple[Phase, ...]:
        """Lay out the training of one student.

        Args:
            student: Its role.
            source: The part of the data that it is trained on.
        """
        settings = self.settings
        parts: list[tuple[str, Stretch, tuple[Update, ...]]] = []
        if settings.warm_up is not None:
            optimizer = settings.warm_up.optimizer
            update = Update("student", (student,), self.warm_up_loss(student), optimizer)
            parts.append(("warm-up", settings.warm_up, (update,)))
        for name, stage in (("match", settings.match), ("adversarial", settings.adversarial)):
            if stage is not None:
                parts.append((name, stage, self._updates(stage, student, source)))
        return tuple(
            Phase(name, part.iterations, updates, preview=emission, emits=emission)
            for name, part, updates in parts
            for emission in [Emission(name, self.table, {"unet": student})]
        )

    def _updates(self, stage: StageSettings, student: str, source: str) -> tuple[Update, ...]:
        critic = ("fake", "head") if stage.has_gan else ("fake",)
        return (
            Update(
                "student",
                (student,),
                self.student_loss(stage, student),
                stage.optimizer,
                every=self.settings.student_every,
                zero_also=critic,
                source=source,
            ),
            Update(
                "critic",
                critic,
                self.critic_loss(stage, student),
                stage.optimizer,
                source=source,
            ),
        )

    def student_loss(self, stage: StageSettings, student: str) -> LossFunction:
        """Return the student's loss; its images are left in the memo for the critic."""

        def loss(step: Step) -> Losses:
            images = generate(self.table, step.roles[student], step)
            step.memo[IMAGES] = images.detach()
            terms = {"matching": self._matching(step, images)}
            if stage.student_gan:
                logits = judge(step, replace(step.batch, x=images))
                terms["gan"] = stage.student_gan * fooling_loss(logits, "non_saturating")
            if stage.regression:
                terms["regression"] = stage.regression * self._regression(step, student)
            return Losses(terms)

        return loss

    def critic_loss(self, stage: StageSettings, student: str) -> LossFunction:
        """Return the loss of the fake score, and of the head where there is a GAN."""

        def loss(step: Step) -> Losses:
            fake = step.roles["fake"]
            images = step.memo.get(IMAGES)
            if images is None:
                with torch.no_grad():
                    images = generate(self.table, step.roles[student], step)
            made = replace(step.batch, x=images)
            t = step.draw.integers(0, fake.schedule.num_train_timesteps)
            z = noised_data(fake, made, t, step.draw)
            x0 = fake.x0(z, t, step.batch.conditions)
            terms = {"denoising": prediction_mse(fake, x0, images, t)}
            if stage.critic_gan:
                real, false = judge(step, step.batch), judge(step, made)
                terms["gan"] = stage.critic_gan * critic_loss(real, false, "non_saturating")
            return Losses(terms)

        return loss

    def warm_up_loss(self, student: str) -> LossFunction:
        """Return the loss of the regression onto the teacher's samples."""

        def loss(step: Step) -> Losses:
            return Losses({"regression": self._regression(step, student)})

        return loss

    def _matching(self, step: Step, images: Tensor) -> Tensor:
        """Compare the two scores of the noised images."""
        teacher, fake, batch = step.roles["teacher"], step.roles["fake"], step.batch
        w = torch.full((len(images),), self.settings.guidance_scale - 1, device=images.device)
        with torch.no_grad():
            low, high = self.settings.times
            last = fake.schedule.num_train_timesteps
            t = step.draw.integers(int(low * last), min(int(high * last) + 1, last))
            z = noised_data(fake, replace(batch, x=images), t, step.draw)
            real = teacher.x0(z, t, batch.conditions)
            if self.settings.guidance_scale != 1:
                real = cfg_combine(real, teacher.x0(z, t, batch.null), w)
            gradient = matching_gradient(images, real, fake.x0(z, t, batch.conditions))
        return matching_loss(images, gradient)

    def _regression(self, step: Step, student: str) -> Tensor:
        """Compare one evaluation with the teacher's samples: of the same noise, or of themselves noised to its label."""
        denoiser: Denoiser = step.roles[student]
        noise, batch = self.pairs.sample(step.roles["teacher"], step.draw)
        row = step.draw.shared_integer(0, len(self.settings.labels))
        t = torch.full((len(noise),), self.settings.labels[row], device=noise.device)
        z = (
            noised_data(denoiser, batch, t, step.draw)
            if row
            else noise * denoiser.schedule.first_scale
        )
        return (denoiser.x0(z, t, batch.conditions) - batch.x).square().mean()


def student_table(settings: DMD2Settings, context: Context) -> SamplerTable:
    """Return a row for each label: x0 noised afresh to the next one, and at the last x0 itself."""
    schedule, kind, labels = context.schedule, context.kind, settings.labels
    pairs = enumerate(itertools.pairwise(labels), start=1)
    rows = (
        *(renoise_row(schedule, t, s, kind, noise) for noise, (t, s) in pairs),
        return_x0_row(schedule, labels[-1], kind),
    )
    scale = settings.guidance_scale
    guidance = None if scale == 1 else Guidance("baked", None, scale, (scale, scale))
    return context.table(rows, noise_count=len(rows), guidance=guidance)


def generate(table: SamplerTable, student: Denoiser, step: Step) -> Tensor:
    """Return images of one of the student's evaluations, drawn for the whole batch.

    Its input is what the sampler itself would have come to (the paper's backward simulation).

    Args:
        table: The student's sampler.
        student: Called as ``unet``.
        step: Gives conditions and randomness; which evaluation it is, is drawn too.

    Returns:
        (batch, channels, height, width), with gradients of that evaluation alone.
    """
    row = step.draw.shared_integer(0, len(table.rows))
    noises = [step.draw.normal(*table.stages[0].shape) for _ in range(row + 1)]
    return evaluate(table, student, noises, step.batch)


def evaluate(table: SamplerTable, student: Denoiser, noises: list[Tensor], batch: Batch) -> Tensor:
    """Run as many rows as there are noises, and return the last one's x0, which alone has gradients.

    Args:
        table: The student's sampler.
        student: Called as ``unet``.
        noises: The first entries of the sampler's noise bank.
        batch: Gives the conditions.
    """
    called = {"unet": network_of(student)}
    z, given = enter_stage(table, table.stages[0], noises, batch.conditions)
    *earlier, last = table.rows[: len(noises)]
    with torch.no_grad():
        for row in earlier:
            z = run_row(table, row, called, z, noises, given).next
    returning = replace(last, next=Next(x0=1.0), noise=None)
    images: Tensor = run_row(table, returning, called, z, noises, given).next
    return images


def judge(step: Step, batch: Batch) -> Tensor:
    """Return the head's logits (batch,) of images under noise of any level."""
    fake = step.roles["fake"]
    t = step.draw.integers(0, fake.schedule.num_train_timesteps)
    z = noised_data(fake, batch, t, step.draw)
    _, features = fake.tapped(z, t, batch.conditions)
    logits: Tensor = step.roles["head"](features)
    return logits
