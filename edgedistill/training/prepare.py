"""From a recipe to a plan with its data: everything that can be refused is refused here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgedistill.data import open_dataset
from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Plan
from edgedistill.methods.registry import METHODS
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.slim import cut
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.teacher import Teacher
from edgedistill.training.encoded import EncodedData, encode
from edgedistill.training.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A recipe whose teacher, data and plan are there and fit each other.

    Fields:
        recipe, teacher, plan: As named.
        data: Everything (``data``) and the plan's subsets; empty in a sketch.
    """

    recipe: Recipe
    teacher: Teacher
    data: Mapping[str, EncodedData]
    plan: Plan


def prepare(recipe: Recipe) -> Prepared:
    """Open teacher and data and lay out the plan.

    Raises:
        BundleError: If the teacher cannot be read.
        ConfigError: If recipe, teacher and data do not fit each other.
    """
    if recipe.training.mixed_precision == "fp16" and not torch.cuda.is_available():
        msg = "`training.mixed_precision` fp16 needs a GPU; use bf16 or no here."
        raise ConfigError(msg)
    teacher = Teacher.open(recipe.teacher, null_class=recipe.null_class)
    cache = None if recipe.cache is None else Path(recipe.cache)
    device = torch.device("cuda") if torch.cuda.is_available() else None
    data = encode(open_dataset(recipe.data), teacher, recipe.seed, cache=cache, device=device)
    plan = METHODS[recipe.method].plan(recipe.settings, context_of(recipe, teacher, data))
    subsets = {name: data.subset(chosen) for name, chosen in plan.subsets.items()}
    return Prepared(recipe, teacher, {"data": data, **subsets}, plan)


def sketch(recipe: Recipe) -> Prepared:
    """Lay out the plan over networks without weights, on the meta device, and without data.

    Raises:
        BundleError: If the teacher's configurations cannot be read.
        ConfigError: If recipe and teacher do not fit each other.
    """
    teacher = Teacher.sketch(recipe.teacher, null_class=recipe.null_class)
    plan = METHODS[recipe.method].plan(recipe.settings, context_of(recipe, teacher, None))
    return Prepared(recipe, teacher, {}, plan)


def context_of(recipe: Recipe, teacher: Teacher, data: EncodedData | None) -> Context:
    """Return what the recipe's method builds its plan from."""
    schedule = Schedule.from_config(teacher.scheduler)
    scheduler = student_scheduler(recipe, teacher)
    pooled, examples = "pooled", None
    if teacher.text_encoder is not None:
        outputs = teacher.text_encoder.signature.outputs
        (pooled,) = (spec.name for spec in outputs if spec.kind == "pooled")
    if teacher.tokenizer is not None:
        examples = teacher.embed(teacher.examples)[pooled]
    return Context(
        method=recipe.method,
        teacher=Denoiser(teacher.network, schedule, PredictionType(teacher.prediction_type)),
        base=teacher.network if recipe.student is None else cut(teacher.network, recipe.student),
        scheduler=scheduler,
        prediction_type=PredictionType(recipe.prediction_type or teacher.prediction_type),
        shape=teacher.shape,
        conditions=teacher.conditions,
        null=teacher.null,
        samples=data,
        examples=examples,
        pooled=pooled,
        seed=recipe.seed,
        space=teacher.space,
        clamp=teacher.clamp,
        lora=recipe.lora,
    )


def student_scheduler(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """Return the teacher's scheduler configuration with what the students predict.

    Raises:
        ConfigError: If the scheduler's kind leaves no choice and another prediction is asked for.
    """
    if recipe.prediction_type is None:
        return dict(teacher.scheduler)
    if teacher.prediction_type in ("edm", "flow"):
        msg = f"Teacher {recipe.teacher!r} predicts {teacher.prediction_type!r}, which its scheduler ties its students to; take `prediction_type` out of the recipe."
        raise ConfigError(msg)
    return {**teacher.scheduler, "prediction_type": recipe.prediction_type}
