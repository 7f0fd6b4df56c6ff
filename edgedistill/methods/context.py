"""What a method builds its plan from: the frozen teacher, networks to start from, and what tables must say."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import nn

from edgedistill.errors import ConfigError
from edgedistill.methods.plan import Batch
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.extend import extend
from edgedistill.models.inputs import Inputs, scales_of
from edgedistill.models.lora import LoraSettings, inject
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, Guidance, Row, SamplerTable, Stage

START_TOLERANCE = 0.02
"""How far, relatively, a first state's scale may be from that of the first noise."""


class Samples(Protocol):
    """The data that the run trains on."""

    def __len__(self) -> int: ...

    def first(self, count: int) -> Batch:
        """Return the first samples in the order of training; after the last one it begins again."""


@dataclass(frozen=True)
class Context:
    """The setting that a recipe puts a method into.

    Fields:
        method: Its name, for the tables' annotations.
        teacher: Frozen; as it was trained.
        base: The network that students start from: the teacher's, or one cut from it. Never trained
            itself: methods take copies.
        scheduler: diffusers' scheduler configuration with the students' prediction type.
        prediction_type: What the students predict.
        shape: (channels, height, width) of the state.
        conditions: What the teacher is conditioned on.
        null: Their values for "no condition"; empty where the teacher was not trained with any.
        samples: The data, for what a method computes beforehand; None where there is none.
        examples: float32 (count, dim), the teacher's example prompts pooled; None where it reads no text.
        pooled: The condition that holds the embedding of a whole prompt.
        seed: Key of the weights that no teacher gives.
        space: Meaning of the state (see `SamplerTable`).
        clamp: Range of finished samples, or None.
        lora: Updates that students get in place of training whole weights, or None.
    """

    method: str
    teacher: Denoiser
    base: nn.Module
    scheduler: Mapping[str, Any]
    prediction_type: PredictionType
    shape: tuple[int, int, int]
    conditions: tuple[Condition, ...]
    null: Mapping[str, Any] = field(default_factory=dict)
    samples: Samples | None = None
    examples: np.ndarray | None = None
    pooled: str = "pooled"
    seed: int = 0
    space: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "pixel", "value_range": [-1.0, 1.0]}
    )
    clamp: tuple[float, float] | None = (-1.0, 1.0)
    lora: LoraSettings | None = None

    @property
    def schedule(self) -> Schedule:
        """The noise schedule of teacher and students."""
        return self.teacher.schedule

    @property
    def kind(self) -> str:
        """The students' prediction type as rows name it."""
        return self.prediction_type.value

    def student(
        self, *scalars: str, image_channels: int = 0, residuals: bool = False, mask: bool = False
    ) -> Denoiser:
        """Return a fresh student that starts from `base`, with further inputs where they are named.

        Args:
            *scalars: Keys of `SCALES`.
            image_channels, residuals, mask: See `Inputs`.

        Raises:
            ConfigError: If the network cannot take them.
        """
        inputs = Inputs(scales_of(scalars, self.schedule), image_channels, residuals, mask)
        plain = copy.deepcopy(self.base) if inputs == Inputs() else extend(self.base, inputs)
        if self.lora is not None:
            inject(plain, self.lora)
        return Denoiser(plain, self.schedule, self.prediction_type)

    def copy_of_teacher(self) -> Denoiser:
        """Return a denoiser with the teacher's weights that may be trained."""
        network = copy.deepcopy(self.teacher.network)
        return Denoiser(network, self.schedule, self.teacher.prediction_type)

    def require_frozen_base(self, side: str, otherwise: str = "") -> None:
        """Refuse a recipe that changes the base of a side network which alone is trained.

        Args:
            side: The side network, for people.
            otherwise: What else there is to do than to leave settings out, for people.

        Raises:
            ConfigError: If students are cut, predict something else than the teacher, or get low-rank updates:
                nothing would train them to it.
        """
        if (
            self.base is not self.teacher.network
            or self.prediction_type != self.teacher.prediction_type
        ):
            msg = f"{side}'s base is the teacher as it is; leave `student` and `prediction_type` out of the recipe{otherwise}."
            raise ConfigError(msg)
        if self.lora is not None:
            msg = f"{side}'s base stays as it is, so that nothing would train its low-rank updates; leave `lora` out of the recipe{otherwise}."
            raise ConfigError(msg)

    def require_null(self) -> None:
        """Refuse a teacher whose guidance cannot be computed.

        Raises:
            ConfigError: If it has no null condition.
        """
        if not self.null:
            msg = "The teacher has no null condition, so there is no guidance to distil; train it with condition dropout."
            raise ConfigError(msg)

    def require_start(self, label: int) -> None:
        """Refuse to begin at a label whose state has not the scale of the first noise, which is the noisiest label's.

        Raises:
            ConfigError: If a state ``alpha x + sigma eps`` there is of another scale than the noise that samplers
                start from.
        """
        noisiest = self.schedule.num_train_timesteps - 1
        found, wanted = (math.hypot(*self.schedule.alpha_sigma(t)) for t in (label, noisiest))
        if abs(found - wanted) > START_TOLERANCE * wanted:
            msg = (
                f"At label {label}, where the sampler is to start, a state has the scale {found:.4g}, but the noise that "
                f"it starts from is that of label {noisiest}, of the scale {wanted:.4g}; raise `sigma_max`."
            )
            raise ConfigError(msg)

    def table(
        self,
        rows: tuple[Row, ...],
        *,
        noise_count: int = 1,
        guidance: Guidance | None = None,
        **annotations: Any,
    ) -> SamplerTable:
        """Return a single-stage table over this space with the annotations that `validate` needs."""
        stage = Stage(self.shape, rows, init_noise=(self.schedule.first_scale, 0))
        return SamplerTable(
            stages=(stage,),
            noise_count=noise_count,
            guidance=guidance or Guidance(),
            conditions=self.conditions,
            clamp=self.clamp,
            space=self.space,
            annotations={
                "method": self.method,
                "scheduler": dict(self.scheduler),
                "prediction_type": self.kind,
                "num_steps": len(rows),
                **annotations,
            },
        )
