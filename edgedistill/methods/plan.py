"""What a method says to the trainer: roles, updates, phases, and the students that come out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.models.denoiser import Denoiser
from edgedistill.table import SamplerTable


class Draw(Protocol):
    """Random numbers of one step; the trainer makes them a function of (seed, position) alone."""

    def normal(self, *shape: int) -> Tensor:
        """Return unit Gaussian noise of shape (batch, *shape)."""

    def uniform(self, low: float, high: float) -> Tensor:
        """Return (batch,) numbers from [low, high)."""

    def integers(self, low: int, high: int) -> Tensor:
        """Return (batch,) whole numbers from {low, ..., high - 1}."""

    def shared_integer(self, low: int, high: int) -> int:
        """Return one whole number, the same for the whole batch and on every process."""


@dataclass(frozen=True)
class Batch:
    """Clean data with its conditions.

    Fields:
        x: (batch, channels, height, width) float32 in the model's own space.
        conditions: Network inputs by name, (batch, ...).
        null: The same inputs for "no condition".
    """

    x: Tensor
    conditions: Mapping[str, Tensor]
    null: Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What a loss function sees.

    Fields:
        roles: Every network of the method by role.
        batch, draw: Data and randomness of this step.
        index: Position inside an unrolled update, from 0.
        carry: What the loss returned at the position before; None at the first.
    """

    roles: Mapping[str, Denoiser]
    batch: Batch
    draw: Draw
    index: int = 0
    carry: Any = None


@dataclass(frozen=True)
class Losses:
    """What a loss function returns: named terms, summed by the trainer, and the state to carry on."""

    terms: Mapping[str, Tensor]
    carry: Any = None


LossFunction = Callable[[Step], Losses]


@dataclass(frozen=True)
class OptimizerSettings:
    """An Adam family optimizer and its learning-rate curve.

    Fields:
        kind: ``adam`` or ``adamw``.
        learning_rate: Peak value.
        betas, weight_decay, eps: As in torch.
        warmup: Iterations over which the rate rises linearly from 0.
        decay: ``constant``; or ``linear`` or ``cosine``, down to 0 at the end of the phase.
    """

    kind: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup: int = 0
    decay: Literal["constant", "linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            msg = f"`learning_rate` must be positive, got {self.learning_rate}."
            raise ConfigError(msg)
        if self.warmup < 0:
            msg = f"`warmup` must not be negative, got {self.warmup}."
            raise ConfigError(msg)


@dataclass(frozen=True)
class Role:
    """One network of a method.

    Fields:
        name: ``student``, ``teacher``, ``previous``, ``guide``, ``fake``, ...
        denoiser: The network with its schedule and prediction type.
        trained: Whether some update steps it.
        saved: Whether it changes during the run and so belongs into checkpoints.
        ema: Rate of its moving average, or None; the average is what a student is written from.
    """

    name: str
    denoiser: Denoiser
    trained: bool = False
    saved: bool = False
    ema: float | None = None


@dataclass(frozen=True)
class Update:
    """One optimizer over some roles.

    Fields:
        name: For logs and checkpoints; unique in its phase.
        roles: The roles it steps.
        loss: Pure function of a `Step`.
        optimizer: Its settings; the learning rate runs over the phase.
        every, offset: It is due at iterations where ``(iteration - offset) % every == 0``.
        unroll: Optimizer steps in a row per iteration, with the carried state handed on.
        zero_also: Roles into which its gradients leak and are dropped.
    """

    name: str
    roles: tuple[str, ...]
    loss: LossFunction
    optimizer: OptimizerSettings
    every: int = 1
    offset: int = 0
    unroll: int = 1
    zero_also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Emission:
    """A student that a phase leaves behind.

    Fields:
        name: Name of its folder; the last emission of a method is the run's result.
        table: The sampler it was trained for.
        networks: Role per network name of the table.
    """

    name: str
    table: SamplerTable
    networks: Mapping[str, str] = field(default_factory=lambda: {"unet": "student"})


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Fields:
        name: For people and logs.
        iterations: Length.
        updates: In order.
        copies: (from, to) roles whose weights are copied before the first iteration.
        preview: The table that sample grids are drawn with, or None.
        emits: The student that is written after the last iteration, or None.
    """

    name: str
    iterations: int
    updates: tuple[Update, ...]
    copies: tuple[tuple[str, str], ...] = ()
    preview: SamplerTable | None = None
    emits: Emission | None = None


@dataclass(frozen=True)
class Plan:
    """Everything the trainer needs from a method."""

    roles: tuple[Role, ...]
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        known = {role.name for role in self.roles}
        for phase in self.phases:
            used = {name for update in phase.updates for name in (*update.roles, *update.zero_also)}
            used |= {name for pair in phase.copies for name in pair}
            if missing := used - known:
                msg = f"Phase {phase.name!r} uses roles that do not exist: {', '.join(missing)}."
                raise ConfigError(msg)
