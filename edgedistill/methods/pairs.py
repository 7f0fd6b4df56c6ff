"""Noises with what the teacher makes of them: the set that regression onto the teacher trains on."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Batch, Draw, Subset
from edgedistill.methods.states import trajectory
from edgedistill.models.denoiser import Denoiser
from edgedistill.rows import ddim_row
from edgedistill.table import Guidance, SamplerTable

_BATCH = 64


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made.

    Fields:
        count: How many; their conditions are those of the first samples of the data.
        steps: DDIM steps of the teacher.
    """

    count: int = 10000
    steps: int = 50

    def __post_init__(self) -> None:
        if min(self.count, self.steps) < 1:
            msg = f"`count` and `steps` must be at least 1, got {self.count} and {self.steps}."
            raise ConfigError(msg)


class Pairs:
    """Pairs of a noise and the guided teacher's sample of it, made when they are first asked for.

    They depend on the context's seed and data alone, so that a resumed run makes the same ones again.

    Args:
        settings: How many, and of how many steps.
        guidance_scale: g of the teacher; 1: none.
        context: Gives teacher, data and seed.
        kept: Which of them are there, by their conditions; None: all.
    """

    def __init__(
        self,
        settings: PairSettings,
        guidance_scale: float,
        context: Context,
        kept: Subset | None = None,
    ) -> None:
        self._settings = settings
        self._context = context
        self._kept = kept
        self._table = _teacher_table(settings.steps, guidance_scale, context)
        self._made: tuple[Tensor, Batch] | None = None

    def sample(self, teacher: Denoiser, draw: Draw) -> tuple[Tensor, Batch]:
        """Return the noises (batch, channels, height, width) of pairs chosen by chance, and the samples as a batch."""
        place = draw.uniform(0.0, 1.0)
        if self._made is None:
            self._made = self._make(teacher, place.device)
        noise, samples = self._made
        index = (place * len(noise)).long().clamp(max=len(noise) - 1)
        return noise[index], _part(samples, index)

    def _make(self, teacher: Denoiser, device: torch.device) -> tuple[Tensor, Batch]:
        noise, asked = self._asked()
        noise, asked = noise.to(device), _part(asked, slice(None), device)
        parts = [slice(start, start + _BATCH) for start in range(0, len(noise), _BATCH)]
        made = [
            trajectory(teacher, self._table, noise[part], _part(asked, part))[-1]
            for part in tqdm(parts, desc="pairs", leave=False, disable=None)
        ]
        return noise, replace(asked, x=torch.cat(made))

    def _asked(self) -> tuple[Tensor, Batch]:
        """Return the noises, and the data whose conditions go with them."""
        count, context = self._settings.count, self._context
        if context.samples is None:
            msg = "Pairs need data to take their conditions from, and there is none."
            raise ConfigError(msg)
        generator = torch.Generator().manual_seed(context.seed)
        noise = torch.randn(count, *context.shape, generator=generator)
        asked = context.samples.first(count)
        if self._kept is None:
            return noise, asked
        conditions = {name: value.numpy() for name, value in asked.conditions.items()}
        index = torch.from_numpy(self._kept(conditions)).nonzero()[:, 0]
        if not len(index):
            msg = f"None of {count} pairs belongs to a student; make more of them."
            raise ConfigError(msg)
        return noise[index], _part(asked, index)


def _teacher_table(steps: int, guidance_scale: float, context: Context) -> SamplerTable:
    schedule, kind = context.schedule, context.teacher.prediction_type.value
    labels = [*schedule.timesteps(steps, "trailing"), -1]
    scale = None if guidance_scale == 1 else guidance_scale
    rows = tuple(
        ddim_row(schedule, t, s, kind, guidance_scale=scale) for t, s in itertools.pairwise(labels)
    )
    limits = (guidance_scale, guidance_scale)
    guidance = Guidance("cfg", None, guidance_scale, limits, context.null) if scale else None
    return context.table(rows, guidance=guidance)


def _part(batch: Batch, index: Tensor | slice, device: torch.device | None = None) -> Batch:
    def cut(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[index].to(device) for name, value in values.items()}

    return Batch(batch.x[index].to(device), cut(batch.conditions), cut(batch.null))
