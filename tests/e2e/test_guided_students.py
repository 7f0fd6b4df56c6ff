"""What one folded student serves from its bundle: encoding, style transfer, edits, guidance by input, or baked in.

Its training is one step of next to no length, so that it is the teacher: the tables are what is tested.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgedistill
from edgedistill.data import load_digits
from edgedistill.errors import ConfigError, ContractError
from edgedistill.evaluation.report import Evaluator
from edgedistill.models import store
from edgedistill.models.run import sample_torch
from edgedistill.pipeline import Pipeline
from edgedistill.student import Student
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill
from export.assemble import export_student
from export.bake import bake_student

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = EXAMPLES / "digits_guided.yaml"
COUNT = 100
DIGITS = load_digits("test")
IMAGES, LABELS = DIGITS.images[:COUNT], DIGITS.labels[:COUNT]


def pipeline(folder: Path, *sets: str) -> Pipeline:
    made = distill(
        Recipe.load(
            RECIPE,
            [
                "guided.start_steps=16",
                "guided.steps=[16]",
                "guided.fold.iterations=1",
                "guided.fold.optimizer.learning_rate=1e-9",
                "training.batch_size=8",
                "training.tensorboard=false",
                *sets,
            ],
        ),
        folder / "student",
        quiet=True,
    )
    return edgedistill.load(export_student(made, folder / "bundle", ["onnx"]), "onnxruntime")


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return pipeline(tmp_path_factory.mktemp("decode"))


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return pipeline(
        tmp_path_factory.mktemp("encode"),
        "guided.direction=encode",
        "guided.default_guidance_scale=null",
    )


def psnr(made: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10(4 / np.square(made - wanted).mean()))


def test_what_is_encoded_decodes_to_itself(encode: Pipeline, decode: Pipeline) -> None:
    assert encode.bundle.table.guidance.default == 1.0
    noise = encode(class_labels=LABELS, image=IMAGES).array
    assert 0.7 < noise.std() < 1.1
    again = decode(class_labels=LABELS, noise=[noise], guidance_scale=1.0).array
    assert psnr(again, IMAGES) > 27  # measured 29.8; from other noise 8
    other = decode(class_labels=LABELS, seed=0, guidance_scale=1.0).array
    assert psnr(other, IMAGES) < 12


def test_encoding_with_one_class_and_decoding_with_another_transfers_style(
    encode: Pipeline, decode: Pipeline
) -> None:
    target = (LABELS + 1) % 10
    noise = encode(class_labels=LABELS, image=IMAGES).array
    styled = decode(class_labels=target, noise=[noise]).array
    assert Evaluator.open("digits").report(styled, target).accuracy >= 0.95
    fresh = decode(class_labels=target, seed=0).array
    nearer = np.square(styled - IMAGES).mean() / np.square(fresh - IMAGES).mean()
    assert nearer < 0.9


def test_the_stronger_the_edit_the_further_from_the_image(decode: Pipeline) -> None:
    target = (LABELS + 1) % 10
    apart, accuracy = [], []
    evaluator = Evaluator.open("digits")
    for strength in (0.1, 0.4, 0.7, 1.0):
        made = decode(class_labels=target, image=IMAGES, strength=strength).array
        apart.append(np.square(made - IMAGES).mean())
        accuracy.append(evaluator.report(made, target).accuracy)
    assert apart == sorted(apart)
    assert apart[0] < 0.1 * apart[-1]
    assert accuracy[0] < 0.2
    assert accuracy[-1] > 0.95


def test_inpainting_keeps_the_known_pixels_and_draws_the_others(decode: Pipeline) -> None:
    mask = np.zeros((COUNT, 1, 8, 8), np.float32)
    mask[:, :, 4:] = 1
    made = decode(class_labels=LABELS, image=IMAGES, mask=mask).array
    np.testing.assert_array_equal(made[:, :, :4], IMAGES[:, :, :4])
    drawn = made[:, :, 4:]
    assert (
        np.square(drawn - IMAGES[:, :, 4:]).mean()
        < 0.5 * np.square(drawn[::-1] - IMAGES[:, :, 4:]).mean()
    )
    assert Evaluator.open("digits").report(made, LABELS).accuracy >= 0.95


def test_guidance_is_an_input_within_its_range(decode: Pipeline) -> None:
    with pytest.raises(ContractError, match=r"must lie in the trained range \[1, 2\], got 2.5"):
        decode(2, guidance_scale=2.5)


def test_what_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`encode_from` must lie in .0, 60., before the first"):
        pipeline(tmp_path, "guided.direction=encode", "guided.encode_from=70")
    with pytest.raises(ConfigError, match="no stochastic sampler that encodes"):
        pipeline(tmp_path, "guided.direction=encode", "guided.sampler=stochastic")


def drawn(student: Student, guidance_scale: float | None = None) -> np.ndarray:
    modules = {name: store.load(student.folder(name)) for name in student.signatures}
    prompts = {"encoder_hidden_states": ["a handwritten three", "the digit seven"]}
    told = {"guidance_scale": guidance_scale, "tokenize": student.tokenize}
    return sample_torch(modules, student.table, 2, **told, **prompts)


def test_guidance_is_baked_into_a_student_that_reads_prompts(
    short: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = short(EXAMPLES / "captioned_guided.yaml")
    student = distill(recipe, tmp_path / "student", quiet=True)
    weights = student.root / "unet" / store.WEIGHTS
    state = load_file(weights)
    name = "time_embedding.cond_proj.weight"
    state[name] = 0.1 * np.random.default_rng(0).standard_normal(state[name].shape, np.float32)
    save_file(state, weights)
    student.write_manifest()
    (tmp_path / "baked").mkdir()
    baked = bake_student(student, 2.0, tmp_path / "baked")
    assert (baked.table.guidance.mode, baked.table.guidance.default) == ("baked", 2.0)
    np.testing.assert_allclose(drawn(baked), drawn(student, 2.0), rtol=0, atol=1e-5)
    assert np.abs(drawn(baked) - drawn(student, 1.0)).max() > 1e-3
