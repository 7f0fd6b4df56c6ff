"""What a method says to the trainer: roles, updates, phases, and the students that come out."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.lora import has_updates, is_trained
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
        roles: Every module of the method by role: a `Denoiser`, or what the role holds.
        batch, draw: Data and randomness of this step.
        index: Position inside an unrolled update, from 0.
        carry: What the loss returned at the position before; None at the first.
        memo: What earlier updates of this iteration left for later ones; new in every iteration.
    """

    roles: Mapping[str, Any]
    batch: Batch
    draw: Draw
    index: int = 0
    carry: Any = None
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """What a loss function returns.

    Fields:
        terms: Named scalars, summed by the trainer; empty: no optimizer step is made here.
        carry: Handed to the next position of an unrolled update.
        done: Whether an unrolled update ends here, before its `unroll` is used up.
    """

    terms: Mapping[str, Tensor]
    carry: Any = None
    done: bool = False


LossFunction = Callable[[Step], Losses]


@dataclass(frozen=True)
class OptimizerSettings:
    """An Adam family optimizer and its learning-rate curve.

    Fields:
        kind: ``adam``, ``adamw`` or ``radam``.
        learning_rate: Peak value.
        betas, weight_decay, eps: As in torch.
        warmup: Iterations over which the rate rises linearly from 0.
        decay: ``constant``; ``linear`` or ``cosine``, down to 0 at the end of the phase; or ``step``, down
            to a tenth after half of it.
    """

    kind: Literal["adam", "adamw", "radam"] = "adam"
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup: int = 0
    decay: Literal["constant", "linear", "cosine", "step"] = "linear"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            msg = f"`learning_rate` must be positive, got {self.learning_rate}."
            raise ConfigError(msg)
        if self.warmup < 0:
            msg = f"`warmup` must not be negative, got {self.warmup}."
            raise ConfigError(msg)


@dataclass(frozen=True)
class Stretch:
    """Settings of one phase: its length and its optimizer."""

    iterations: int
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        if self.iterations < 1:
            msg = f"`iterations` must be at least 1, got {self.iterations}."
            raise ConfigError(msg)


@dataclass(frozen=True)
class Follow:
    """A moving average: ``weights <- rate * weights + (1 - rate) * those of the followed role``.

    Fields:
        role: The role that is followed, after each of its optimizer steps.
        rate: In [0, 1).
        warmed: Whether the rate rises as ``min(rate, (1 + n) / (10 + n))`` over the n updates of every
            phase, so that early averages forget the start.
    """

    role: str
    rate: float
    warmed: bool = True


@dataclass(frozen=True)
class Role:
    """One module of a method.

    Fields:
        name: ``student``, ``teacher``, ``previous``, ``guide``, ``fake``, ...
        module: A `Denoiser`, or any module that a loss calls (a discriminator's head).
        trained: Whether some update steps it.
        trains: Which of its network's parameters are trained, by name; None: all, or, where it has
            low-rank updates, these.
        follows: The role whose moving average it is, or None.
    """

    name: str
    module: nn.Module
    trained: bool = False
    trains: Callable[[str], bool] | None = None
    follows: Follow | None = None

    @property
    def network(self) -> nn.Module:
        """The module whose weights are trained, averaged, copied and saved."""
        return self.module.network if isinstance(self.module, Denoiser) else self.module

    def is_trained(self, parameter: str) -> bool:
        """Say whether a parameter of its network is trained."""
        if self.trains is not None:
            return self.trained and self.trains(parameter)
        return self.trained and (not self._has_updates or is_trained(parameter, self.network))

    @functools.cached_property
    def _has_updates(self) -> bool:
        return has_updates(self.network)


@dataclass(frozen=True)
class Update:
    """One optimizer over some roles.

    Fields:
        name: For logs and checkpoints; unique in its phase.
        roles: The roles it steps.
        loss: Pure function of a `Step`.
        optimizer: Its settings; the learning rate runs over the phase.
        every, offset: It is due at iterations where ``(iteration - offset) % every == 0``.
        unroll: Most optimizer steps in a row per iteration, with the carried state handed on.
        zero_also: Roles into which its gradients leak and are dropped.
        source: Which of the plan's subsets it draws its batches from; ``data`` is everything.
    """

    name: str
    roles: tuple[str, ...]
    loss: LossFunction
    optimizer: OptimizerSettings
    every: int = 1
    offset: int = 0
    unroll: int = 1
    zero_also: tuple[str, ...] = ()
    source: str = "data"


@dataclass(frozen=True)
class Emission:
    """A student that a phase leaves behind.

    Fields:
        name: Name of its folder; the last emission of a method is the run's result.
        table: The sampler it was trained for.
        networks: Role per network name of the table.
        samplers: Further samplers of the same networks, by name.
        sizes: (height, width) of the states of networks that take other ones than their role's module was
            built for; they share the weights on disk with the network of that role that is not named here.
        examples: Images and masks (examples, channels, height, width) by condition, which the probes are
            made of.
    """

    name: str
    table: SamplerTable
    networks: Mapping[str, str] = field(default_factory=lambda: {"unet": "student"})
    samplers: Mapping[str, SamplerTable] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    examples: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def folders(self) -> dict[str, str]:
        """The network whose folder each network of `sizes` lies in."""
        homes = {role: name for name, role in self.networks.items() if name not in self.sizes}
        return {name: homes[self.networks[name]] for name in self.sizes}


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Fields:
        name: For people and logs.
        iterations: Length.
        updates: In order.
        copies: (from, to) roles whose weights are copied before the first iteration, in order.
        preview: The student that sample grids are drawn with, or None.
        emits: The student that is written after the last iteration, or None.
    """

    name: str
    iterations: int
    updates: tuple[Update, ...]
    copies: tuple[tuple[str, str], ...] = ()
    preview: Emission | None = None
    emits: Emission | None = None


# From every sample's conditions, (count, ...) by name, to (count,) booleans.
Subset = Callable[[Mapping[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Plan:
    """Everything the trainer needs from a method.

    Fields:
        roles, phases: In order.
        subsets: Parts of the data that updates may draw from, by name.
    """

    roles: tuple[Role, ...]
    phases: tuple[Phase, ...]
    subsets: Mapping[str, Subset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {role.name for role in self.roles}
        followed = {role.follows.role for role in self.roles if role.follows is not None}
        problems = [("the plan", followed - known)]
        for phase in self.phases:
            used = {name for update in phase.updates for name in (*update.roles, *update.zero_also)}
            used |= {name for pair in phase.copies for name in pair}
            for student in (phase.preview, phase.emits):
                used |= set(student.networks.values()) if student is not None else set()
            problems.append((f"phase {phase.name!r}", used - known))
            sources = {update.source for update in phase.updates} - {"data", *self.subsets}
            problems.append((f"phase {phase.name!r}", sources))
        for where, missing in problems:
            if missing:
                msg = f"In {where} there are roles or subsets that do not exist: {', '.join(sorted(missing))}."
                raise ConfigError(msg)

    def changes(self, role: Role) -> bool:
        """Say whether a role's weights change during the run and so belong into checkpoints."""
        copied = {target for phase in self.phases for _, target in phase.copies}
        return role.trained or role.follows is not None or role.name in copied
