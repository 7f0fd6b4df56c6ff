"""The recipes under examples/: all are valid, and those for a GPU run here on tiny pipelines of the same classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from edgedistill.config import read_yaml
from edgedistill.files import read_json
from edgedistill.methods.registry import METHODS
from edgedistill.models import store
from edgedistill.models.run import sample_torch
from edgedistill.models.source import open_network
from edgedistill.probes import example_conditions, load_probes
from edgedistill.student import EXAMPLES, Student
from edgedistill.teacher import ARCHITECTURES, PACKAGED
from edgedistill.training.describe import describe
from edgedistill.training.prepare import sketch
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill

RECIPES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
LARGE = [path for path in RECIPES if path.name.startswith(("edm_", "sd15_", "sdxl_"))]
COUNT = 16
# What a tiny pipeline has no room for; otherwise the recipes run as they are, but for lengths and batches.
FITTED: dict[str, tuple[str, ...]] = {
    "edm_cifar10_ctm": ("ctm.most_steps=2",),
    "edm_imagenet64_ctm": ("ctm.most_steps=2",),
    "edm_cifar10_lowdiff": ("lowdiff.factors=[2,1]", "lowdiff.steps=[[2,1]]"),
    "sd15_guide": ("guide.widths=[8,8]",),
    "sd15_msd": ("msd.students=2",),
}
PARAMETERS = {
    "edm-cifar10/unet": 59_024_643,
    "edm-imagenet64/unet": 295_899_267,
    "stable-diffusion-v1-5/text_encoder": 123_060_480,
    "stable-diffusion-v1-5/unet": 859_520_964,
    "stable-diffusion-v1-5/vae": 83_653_863,
    "stable-diffusion-xl-base-1.0/text_encoder": 123_060_480,
    "stable-diffusion-xl-base-1.0/text_encoder_2": 694_659_840,
    "stable-diffusion-xl-base-1.0/unet": 2_567_463_684,
    "stable-diffusion-xl-base-1.0/vae": 83_653_863,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random pictures with labels and captions, by the beginning of the recipes' names."""
    generator, root = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    vocabulary = read_json(PACKAGED["captioned_digits"] / "tokenizer" / "tokenizer.json")
    words = [word for word in vocabulary["model"]["vocab"] if word.isalpha()][:COUNT]
    made = {}
    for kind, size in (("edm", 8), ("sd", 16)):
        images = generator.integers(0, 256, (COUNT, size, size, 3), dtype=np.uint8)
        made[kind] = root / f"{kind}.npz"
        np.savez(made[kind], images=images, labels=np.arange(COUNT) % 7, captions=np.array(words))
    return made


def shrink(path: Path, pipelines: Path, data: dict[str, Path], folder: Path) -> Path:
    """Write the recipe with a tiny teacher, one iteration per phase and two samples per batch."""
    made = _shortened(read_yaml(path))
    kind = "edm" if path.name.startswith("edm") else "sd"
    made |= {"teacher": str(pipelines / Path(made["teacher"]).name), "data": str(data[kind])}
    made["training"] |= {"batch_size": 2, "gradient_accumulation": 1, "tensorboard": False}
    target = folder / path.name
    target.write_text(yaml.safe_dump(made))
    return target


def _shortened(settings: Any) -> Any:
    if isinstance(settings, dict):
        short = {"iterations": 1, "warmup": 0, "preview_every": 0, "cache": None}
        return {k: short.get(k, _shortened(v)) for k, v in settings.items()}
    return settings


def samples(student: Student) -> np.ndarray:
    """Sample a student once."""
    modules = {name: open_network(student, name) for name in student.table.networks}
    held = student.root / EXAMPLES
    examples = load_probes(held) if held.is_file() else None
    given = example_conditions(student.table, 2, examples, student.tokenize)
    known = {item.name for item in student.table.conditions}
    given = {name: value for name, value in given.items() if name in known}
    return sample_torch(modules, student.table, 2, tokenize=student.tokenize, **given)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_where_it_ran(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.name == path.stem.replace("_", "-") or path.stem == "sd15_codi"
    said = "No GPU has run this recipe yet." in path.read_text()
    assert said == (path in LARGE) == (recipe.teacher not in PACKAGED)


def test_every_method_has_a_recipe_for_a_gpu() -> None:
    assert {Recipe.load(path).method for path in LARGE} == set(METHODS)


def test_the_known_architectures_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        found = {
            path.parent.relative_to(ARCHITECTURES).as_posix(): sum(
                parameter.numel() for parameter in store.build(read_json(path)).parameters()
            )
            for path in ARCHITECTURES.glob("*/*/config.json")
        }
    assert found == PARAMETERS


def test_what_is_trained_beside_stable_diffusion_is_small() -> None:
    by_method = {}
    for name in ("sd15_guide", "sd15_codi"):
        recipe = Recipe.load(next(path for path in LARGE if path.stem == name))
        student = next(role for role in sketch(recipe).plan.roles if role.name == "student")
        by_method[name] = sum(parameter.numel() for parameter in student.network.parameters())
    base = PARAMETERS["stable-diffusion-v1-5/unet"]
    assert by_method["sd15_guide"] / base < 0.015  # the paper's share of a tiny guide
    assert 0.40 < by_method["sd15_codi"] / base < 0.43  # 364 M of 865 M in the paper


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_recipe_runs_on_a_tiny_pipeline(
    path: Path, tiny_pipelines: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    recipe = Recipe.load(shrink(path, tiny_pipelines, data, tmp_path), FITTED.get(path.stem, ()))
    plan = describe(recipe, is_sketch=True)
    assert all(
        update["forward_flops"] > 0 for phase in plan["phases"] for update in phase["updates"]
    )
    student = distill(recipe, tmp_path / "student", quiet=True)
    made = samples(student)
    shape = student.table.stages[-1].shape
    if student.table.decoder is not None:
        shape = student.signatures[student.table.decoder].outputs[0].shape[1:]
    assert made.shape == (2, *shape)
    assert np.isfinite(made).all()
    assert made.std() > 1e-3
