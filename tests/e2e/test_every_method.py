"""A student of every method from its recipe to every runtime, by the same calls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgedistill.methods.registry import METHODS
from edgedistill.models.store import WEIGHTS
from edgedistill.student import Student
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill
from export.assemble import export_student
from export.formats import ExportOptions
from runtimes.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("guided", "guide", "dmd2", "msd", "ctm", "lowdiff", "sfd_v", "codi_super")
RECIPES = [*(EXAMPLES / f"digits_{name}.yaml" for name in NAMES), EXAMPLES / "captioned_msd.yaml"]
# Half of the tiny teacher's width leaves a channel per group, and normalisation takes the class out of it again.
FITTED = {"digits_msd": ("student.width=1.0",)}


def stirred(student: Student) -> Student:
    """Make what is zero at first, and hardly more after a few iterations, count."""
    generator = np.random.default_rng(0)
    for path in student.root.glob(f"*/{WEIGHTS}"):
        weights = load_file(path)
        for name, value in weights.items():
            if np.abs(value).max() < 0.05:
                weights[name] = 0.1 * generator.standard_normal(value.shape, np.float32)
        save_file(weights, path)
    student.write_manifest()
    return student


def test_every_method_has_a_recipe_here() -> None:
    assert {Recipe.load(path).method for path in RECIPES} == set(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_student_of_every_method_is_itself_on_every_runtime(
    path: Path, short: Callable[..., Recipe], tmp_path: Path
) -> None:
    student = stirred(
        distill(short(path, *FITTED.get(path.stem, ())), tmp_path / "student", quiet=True)
    )
    options = ExportOptions(dtype="float32")
    report = verify([export_student(student, tmp_path / "bundle", ["all"], options)])
    assert report.failures == ()
    compared = {(item.runtime, item.sampler) for item in report.artifacts}
    runtimes = ("torch", "onnxruntime", "openvino", "coreml")
    assert compared == {(runtime, name) for runtime in runtimes for name in student.samplers}
    changed = {"input_ids" if c.kind == "text" else c.name for c in student.table.conditions}
    changed |= {name for name in (student.table.guidance.input,) if name is not None}
    assert all(set(item.sensitivity) == changed for item in report.artifacts)
