"""From a recipe to student folders: trains, and puts the result in place."""

import logging
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState

from edgedistill import __version__
from edgedistill.errors import ConfigError
from edgedistill.files import write_json, written_aside
from edgedistill.methods.plan import Emission
from edgedistill.models import store
from edgedistill.models.denoiser import plain_network
from edgedistill.models.lora import has_updates, merged
from edgedistill.models.run import sample_torch
from edgedistill.probes import save_probes
from edgedistill.student import EXAMPLES, MANIFEST, Student
from edgedistill.table import SamplerTable
from edgedistill.teacher import Teacher
from edgedistill.training.checkpoint import CheckpointFolder
from edgedistill.training.logs import Preview, RunLog, Unwatched
from edgedistill.training.loop import Networks, State, Trainer, Watcher
from edgedistill.training.prepare import Prepared, prepare, student_scheduler
from edgedistill.training.recipe import Recipe

LOGGER = logging.getLogger(__name__)
PREVIEWS = 20
# Ways of accelerate to cut networks up, of which only the second version of FSDP leaves tensors that have names.
_CUTTING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


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
    accelerator, teacher = start(prepared), prepared.teacher
    partial = output.with_name(output.name + ".partial")
    if accelerator.is_main_process:
        _make_room(partial, recipe, resume=resume)
    accelerator.wait_for_everyone()
    watcher = (
        RunLog(
            partial / "training",
            _previewer(teacher),
            tensorboard=recipe.training.tensorboard,
            quiet=quiet,
        )
        if accelerator.is_main_process
        else Unwatched()
    )
    train(prepared, partial, watcher, accelerator)
    if accelerator.is_main_process:
        _assemble(prepared, partial, output)
    accelerator.wait_for_everyone()
    return Student.open(output)


def start(prepared: Prepared) -> Accelerator:
    """Return the accelerator of a run: device and processes as `accelerate launch` gives them.

    Raises:
        ConfigError: If accelerate is configured to cut networks up among processes in another way than FSDP2, or for
            FSDP2 where previews are asked for.
    """
    settings = prepared.recipe.training
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    # A loss that leaks into another role goes through a part of it, such as a critic's features.
    updates = [update for phase in prepared.plan.phases for update in phase.updates]
    partly = any(update.zero_also for update in updates)
    parallel = DistributedDataParallelKwargs(find_unused_parameters=partly)
    AcceleratorState._reset_state()  # it would hold every run to the precision of the first
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, kwargs_handlers=[parallel])
    if accelerator.distributed_type in _CUTTING and not accelerator.is_fsdp2:
        msg = (
            f"accelerate is configured for {accelerator.distributed_type.value} of a kind whose pieces of networks cannot be "
            "averaged, copied between roles and saved here; configure it for FSDP with fsdp_version: 2, or for MULTI_GPU."
        )
        raise ConfigError(msg)
    if accelerator.is_fsdp2 and settings.preview_every:
        msg = "Under FSDP no process has a whole network to draw previews with; add --set training.preview_every=0."
        raise ConfigError(msg)
    return accelerator


def _make_room(partial: Path, recipe: Recipe, *, resume: bool) -> None:
    if partial.exists() and not resume:
        LOGGER.warning(
            "%s: an unfinished run is dropped and begun anew; --resume would go on with it.",
            partial,
        )
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / "training" / "recipe.json", _shareable(recipe))


def _finished(recipe: Recipe, output: Path) -> Student | None:
    """Return the student that these settings already made, if it is there."""
    if not (output / MANIFEST).is_file():
        return None
    student = Student.open(output)
    if student.provenance.get("recipe_fingerprint") != recipe.fingerprint:
        return None
    LOGGER.warning("%s: already there, made with the same settings.", output)
    return student


def train(prepared: Prepared, partial: Path, watcher: Watcher, accelerator: Accelerator) -> None:
    """Run the plan; checkpoints and the students of its phases go under `partial`.

    Raises:
        TrainingError: As `Trainer.run`.
    """
    recipe = prepared.recipe

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
        accelerator,
    ).run()


def _write_student(
    prepared: Prepared, emission: Emission, states: Mapping[str, State], folder: Path
) -> None:
    roles = {role.name: role.network for role in prepared.plan.roles}
    with written_aside(folder) as aside:
        signatures, parameters = {}, {}
        for name, state in states.items():
            trained = plain_network(roles[emission.networks[name]])
            config = store.config_of(trained)
            if name in emission.sizes:
                config["sample_size"] = list(emission.sizes[name])
            network = store.build(config)
            signatures[name] = store.signature(network)
            if name not in emission.sizes:
                network.load_state_dict(merged(trained, state) if has_updates(trained) else state)
                store.save(network, aside / name)
                parameters[name] = sum(value.numel() for value in network.parameters())
        further, folders = prepared.teacher.save_parts(aside)
        scheduler = student_scheduler(prepared.recipe, prepared.teacher)
        write_json(aside / "scheduler" / "scheduler_config.json", scheduler)
        if emission.examples:
            save_probes(emission.examples, aside / EXAMPLES)
        Student(
            aside,
            f"{prepared.recipe.name}-{emission.name}",
            prepared.teacher.complete(emission.table),
            {**signatures, **further},
            {**_provenance(prepared), "parameters": parameters},
            {k: prepared.teacher.complete(v) for k, v in emission.samplers.items()},
            {**emission.folders, **folders},
        ).write_manifest()


def _assemble(prepared: Prepared, partial: Path, output: Path) -> None:
    emitted = [phase.emits.name for phase in prepared.plan.phases if phase.emits is not None]
    with written_aside(output) as aside:
        shutil.copytree(partial / "students" / emitted[-1], aside, dirs_exist_ok=True)
        for name in emitted[:-1]:
            shutil.copytree(partial / "students" / name, aside / name)
        shutil.copytree(partial / "training", aside / "training")
    shutil.rmtree(partial)


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
    return {**recipe.to_json(), **names, "cache": None}


def _previewer(teacher: Teacher) -> Preview:
    tokenize = None if teacher.tokenizer is None else teacher.tokenizer.encode

    def draw(networks: Networks, table: SamplerTable) -> np.ndarray:
        modules = {**teacher.modules, **networks}
        return teacher.decode(sample_torch(modules, table, PREVIEWS, tokenize=tokenize)).clip(-1, 1)

    return draw
