"""From a recipe to a plan with its data: everything that can be refused is refused here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgedistill.data import open_dataset
from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Batch, Plan, Subset
from edgedistill.methods.registry import METHODS
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.slim import cut
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.table import Condition
from edgedistill.teacher import Teacher
from edgedistill.training.draw import EpochOrder, Slice
from edgedistill.training.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A recipe whose teacher, data and plan are there and fit each other."""

    recipe: Recipe
    teacher: Teacher
    data: Mapping[str, "ImageBatches"]
    plan: Plan


class ImageBatches:
    """Images and class labels in memory, in an order that is a function of the seed.

    Args:
        images: (count, channels, height, width) float32.
        labels: (count,) integers, or None.
        null: Label of "no class", for the class input.
        seed: Key of the order.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None, null: Mapping[str, float], seed: int
    ) -> None:
        self._images = torch.from_numpy(images)
        self._labels = None if labels is None else torch.from_numpy(labels).to(torch.int32)
        self._null = null
        self._seed = seed
        self._order = EpochOrder(seed, len(images))

    def subset(self, chosen: Subset) -> "ImageBatches":
        """Return the samples that `chosen` picks by their conditions.

        Raises:
            ConfigError: If there are none.
        """
        labels = None if self._labels is None else self._labels.numpy()
        kept = chosen({} if labels is None else {"class_labels": labels})
        if not kept.any():
            msg = (
                "A part of the data that the method trains on holds no sample; choose fewer parts."
            )
            raise ConfigError(msg)
        return ImageBatches(
            self._images.numpy()[kept],
            None if labels is None else labels[kept],
            self._null,
            self._seed,
        )

    def __len__(self) -> int:
        return len(self._images)

    def first(self, count: int) -> Batch:
        """Return the first samples in the order of training, on the CPU."""
        return self.batch(0, Slice(count, 0, count), torch.device("cpu"))

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:
        """Return one part of the global batch that begins at running sample `start`."""
        chosen = self._order.indices(start + part.start, part.stop - part.start)
        x = self._images[chosen].to(device)
        if self._labels is None:
            return Batch(x, {}, {})
        labels = self._labels[chosen].to(device)
        null = {name: torch.full_like(labels, int(value)) for name, value in self._null.items()}
        return Batch(x, {"class_labels": labels}, null)


def prepare(recipe: Recipe) -> Prepared:
    """Open teacher and data and lay out the plan; everything that can be refused is refused here.

    Raises:
        BundleError: If the teacher cannot be read.
        ConfigError: If recipe, teacher and data do not fit each other.
    """
    if recipe.training.mixed_precision == "fp16" and not torch.cuda.is_available():
        msg = "`training.mixed_precision` fp16 needs a GPU; use bf16 or no here."
        raise ConfigError(msg)
    teacher = Teacher.open(recipe.teacher)
    images = open_dataset(recipe.data)
    if images.images.shape[1:] != teacher.shape:
        msg = f"Data {recipe.data!r} has images of {images.images.shape[1:]}, teacher {recipe.teacher!r} takes {teacher.shape} (channels, height, width)."
        raise ConfigError(msg)
    labels = images.labels if teacher.classes else None
    if teacher.classes and (labels is None or labels.max() >= teacher.classes):
        msg = f"Teacher {recipe.teacher!r} knows classes 0..{teacher.classes - 1}; data {recipe.data!r} must be labelled with these."
        raise ConfigError(msg)
    batches = ImageBatches(images.images, labels, teacher.null, recipe.seed)
    plan = METHODS[recipe.method].plan(recipe.settings, _context(recipe, teacher, batches))
    subsets = {name: batches.subset(chosen) for name, chosen in plan.subsets.items()}
    return Prepared(recipe, teacher, {"data": batches, **subsets}, plan)


def _context(recipe: Recipe, teacher: Teacher, samples: ImageBatches) -> Context:
    schedule = Schedule.from_config(teacher.scheduler)
    scheduler = student_scheduler(recipe, teacher)
    conditions = (Condition("class_labels", "class", teacher.classes),) if teacher.classes else ()
    return Context(
        method=recipe.method,
        teacher=Denoiser(teacher.network, schedule, PredictionType(teacher.prediction_type)),
        base=teacher.network if recipe.student is None else cut(teacher.network, recipe.student),
        scheduler=scheduler,
        prediction_type=PredictionType(scheduler["prediction_type"]),
        shape=teacher.shape,
        conditions=conditions,
        null=teacher.null,
        samples=samples,
        seed=recipe.seed,
        lora=recipe.lora,
    )


def student_scheduler(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """Return the teacher's scheduler configuration with what the students predict."""
    kind = recipe.prediction_type or teacher.prediction_type
    return {**teacher.scheduler, "prediction_type": kind}
