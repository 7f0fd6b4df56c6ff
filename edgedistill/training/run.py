"""From a recipe to student folders: opens, builds, trains, and puts the result in place."""

import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from edgedistill import __version__
from edgedistill.data import open_dataset
from edgedistill.errors import ConfigError
from edgedistill.files import write_json, written_aside
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Batch, Emission, Phase, Plan, Subset
from edgedistill.methods.registry import METHODS
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser, plain_network
from edgedistill.models.run import sample_torch
from edgedistill.models.slim import cut
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.student import MANIFEST, Student
from edgedistill.table import Condition, SamplerTable
from edgedistill.teacher import Teacher
from edgedistill.training.checkpoint import CheckpointFolder, Position
from edgedistill.training.draw import EpochOrder, Slice
from edgedistill.training.logs import RunLog
from edgedistill.training.loop import Networks, State, Trainer, Watcher
from edgedistill.training.recipe import Recipe

LOGGER = logging.getLogger(__name__)
PREVIEWS = 20


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
    plan = METHODS[recipe.method].plan(recipe.settings, _context(recipe, teacher))
    subsets = {name: batches.subset(chosen) for name, chosen in plan.subsets.items()}
    return Prepared(recipe, teacher, {"data": batches, **subsets}, plan)


def _context(recipe: Recipe, teacher: Teacher) -> Context:
    schedule = Schedule.from_config(teacher.scheduler)
    scheduler = _student_scheduler(recipe, teacher)
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
    )


def _student_scheduler(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    kind = recipe.prediction_type or teacher.prediction_type
    return {**teacher.scheduler, "prediction_type": kind}


def distill(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Student:
    """Train and write the student folder.

    ``output`` appears when the last phase is done; until then everything lies in ``output.partial``. The
    students of earlier phases that the method emits are subfolders of their names.

    Args:
        recipe: What to do.
        output: Folder to make.
        resume: Go on from ``output.partial``; the result is bitwise that of a run that was never stopped.
        overwrite: Replace a student of other settings, or whatever else `output` is.
        quiet: No progress bar.

    Raises:
        ConfigError: If `output` exists and is something else.
        TrainingError: If losses are not finite, or the unfinished run has other settings.
    """
    if output.exists():
        finished = _finished(recipe, output)
        if finished is not None:
            return finished
        if not overwrite:
            msg = f"{output}: exists and was not made with these settings; choose another folder or add --overwrite."
            raise ConfigError(msg)
    prepared = prepare(recipe)
    partial = output.with_name(output.name + ".partial")
    if partial.exists() and not resume:
        LOGGER.warning(
            "%s: an unfinished run is dropped and begun anew; --resume would go on with it.",
            partial,
        )
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    log = RunLog(
        partial / "training", _previewer, tensorboard=recipe.training.tensorboard, quiet=quiet
    )
    write_json(partial / "training" / "recipe.json", _shareable(recipe))
    _train(prepared, partial, log)
    return _assemble(prepared, partial, output)


def _finished(recipe: Recipe, output: Path) -> Student | None:
    """Return the student that these settings already made, if it is there."""
    if not (output / MANIFEST).is_file():
        return None
    student = Student.open(output)
    if student.provenance.get("recipe_fingerprint") != recipe.fingerprint:
        return None
    LOGGER.warning("%s: already there, made with the same settings.", output)
    return student


def _train(prepared: Prepared, partial: Path, watcher: Watcher) -> None:
    recipe = prepared.recipe
    torch.backends.cuda.matmul.allow_tf32 = recipe.training.tf32

    def emit(emission: Emission, states: Mapping[str, State]) -> None:
        _write_student(prepared, emission, states, partial / "students" / emission.name)

    Trainer(
        prepared.plan,
        prepared.data,
        recipe.training,
        recipe.seed,
        CheckpointFolder(partial / "checkpoints", recipe.fingerprint),
        emit,
        watcher,
        Accelerator(mixed_precision=recipe.training.mixed_precision),
    ).run()


def _write_student(
    prepared: Prepared, emission: Emission, states: Mapping[str, State], folder: Path
) -> None:
    roles = {role.name: role.network for role in prepared.plan.roles}
    with written_aside(folder) as aside:
        signatures, parameters = {}, {}
        for name, state in states.items():
            trained = plain_network(roles[emission.networks[name]])
            network = store.build(store.config_of(trained))
            network.load_state_dict(state)
            store.save(network, aside / name)
            signatures[name] = store.signature(network)
            parameters[name] = sum(value.numel() for value in network.parameters())
        scheduler = _student_scheduler(prepared.recipe, prepared.teacher)
        write_json(aside / "scheduler" / "scheduler_config.json", scheduler)
        Student(
            aside,
            f"{prepared.recipe.name}-{emission.name}",
            emission.table,
            signatures,
            {**_provenance(prepared), "parameters": parameters},
        ).write_manifest()


def _assemble(prepared: Prepared, partial: Path, output: Path) -> Student:
    emitted = [phase.emits.name for phase in prepared.plan.phases if phase.emits is not None]
    with written_aside(output) as aside:
        shutil.copytree(partial / "students" / emitted[-1], aside, dirs_exist_ok=True)
        for name in emitted[:-1]:
            shutil.copytree(partial / "students" / name, aside / name)
        shutil.copytree(partial / "training", aside / "training")
    shutil.rmtree(partial)
    return Student.open(output)


def _provenance(prepared: Prepared) -> dict[str, Any]:
    packages = ("torch", "diffusers", "accelerate", "numpy")
    return {
        "made_by": f"edgedistill {__version__}",
        "method": prepared.recipe.method,
        "recipe": _shareable(prepared.recipe),
        "recipe_fingerprint": prepared.recipe.fingerprint,
        "teacher_fingerprint": prepared.teacher.fingerprint,
        "versions": {name: metadata.version(name) for name in packages},
    }


def _shareable(recipe: Recipe) -> dict[str, Any]:
    """Return the settings with names in place of local paths."""
    names = {"teacher": Path(recipe.teacher).name, "data": Path(recipe.data).name}
    return {**recipe.to_json(), **names}


def _previewer(networks: Networks, table: SamplerTable) -> np.ndarray:
    return sample_torch(networks, table, PREVIEWS)


@dataclass
class _Stopwatch:
    """Measures seconds per iteration, the first of each phase left out."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _last: float = 0.0

    def begin(self, phase: Phase, position: Position) -> None:  # noqa: ARG002
        self._last = 0.0

    def step(self, phase: Phase, position: Position, losses: Mapping[str, float]) -> None:  # noqa: ARG002
        now = time.perf_counter()
        if self._last:
            self.seconds[phase.name] = min(
                self.seconds.get(phase.name, float("inf")), now - self._last
            )
        self._last = now

    def preview(self, student: Emission, position: Position, networks: Networks) -> None:
        """Nothing is drawn."""

    def end(self) -> None:
        """Nothing is open."""


def describe(recipe: Recipe, *, timed_iterations: int = 4) -> dict[str, Any]:
    """Return the plan of a recipe without carrying it out: roles, phases, updates, samples, time.

    Args:
        recipe: What would be done.
        timed_iterations: Iterations of each phase that are run to measure the time; 0: none.

    Raises:
        BundleError, ConfigError: As `prepare`.
    """
    prepared = prepare(recipe)
    seconds: dict[str, float] = {}
    if timed_iterations:
        watch = _Stopwatch()
        short = tuple(
            dataclasses.replace(phase, iterations=timed_iterations, emits=None)
            for phase in prepared.plan.phases
        )
        plan = dataclasses.replace(prepared.plan, phases=short)
        trial = dataclasses.replace(prepare(recipe), plan=plan)
        with tempfile.TemporaryDirectory() as folder:
            _train(trial, Path(folder), watch)
        seconds = watch.seconds
    return {
        "recipe": recipe.to_json(),
        "roles": [
            {
                "name": role.name,
                "parameters": sum(p.numel() for p in role.network.parameters()),
                "trained": role.trained,
                "follows": role.follows.role if role.follows else None,
            }
            for role in prepared.plan.roles
        ],
        "phases": [
            {
                "name": phase.name,
                "iterations": phase.iterations,
                "samples": phase.iterations * recipe.training.batch_size,
                "updates": [
                    {"name": u.name, "steps": list(u.roles), "every": u.every, "unroll": u.unroll}
                    for u in phase.updates
                ],
                "emits": phase.emits.name if phase.emits else None,
                "seconds_per_iteration": seconds.get(phase.name),
            }
            for phase in prepared.plan.phases
        ],
    }
