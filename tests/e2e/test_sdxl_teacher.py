"""A teacher of the classes of Stable Diffusion XL: two text encoders, an embedded prompt, sizes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from edgedistill.errors import BundleError, ContractError
from edgedistill.models import store
from edgedistill.models.extend import extend
from edgedistill.models.inputs import Inputs
from edgedistill.models.run import sample_torch
from edgedistill.models.source import open_network
from edgedistill.noise import noise_bank
from edgedistill.student import Student
from edgedistill.teacher import Teacher

# diffusers 0.39 converts tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS = ["a handwritten three", "the digit seven"]
SIZES = {"original_size": (16, 16), "crops_coords_top_left": (0, 0), "target_size": (16, 16)}


@pytest.fixture(scope="module")
def folder(tiny_pipelines: Path) -> Path:
    return tiny_pipelines / "stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return Teacher.open(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    parts = {
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": PreTrainedTokenizerFast,
        "tokenizer_2": PreTrainedTokenizerFast,
        "scheduler": EulerDiscreteScheduler,
    }
    made = {name: kind.from_pretrained(folder / name) for name, kind in parts.items()}
    made = StableDiffusionXLPipeline(**made, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_prompts_are_embedded_as_the_pipeline_embeds_them(
    teacher: Teacher, pipeline: StableDiffusionXLPipeline
) -> None:
    with torch.no_grad():
        tokens, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS)
    for prompts, each, whole in ((PROMPTS, tokens, pooled), (["", ""], null, null_pooled)):
        made = teacher.embed(prompts)
        np.testing.assert_allclose(made["encoder_hidden_states"], each.numpy(), atol=1e-5)
        np.testing.assert_allclose(made["text_embeds"], whole.numpy(), atol=1e-5)
    assert null.abs().max() == 0


@pytest.mark.parametrize("sizes", [None, {**SIZES, "crops_coords_top_left": (4, 2)}])
def test_it_samples_what_the_pipeline_samples(
    teacher: Teacher, pipeline: StableDiffusionXLPipeline, sizes: dict[str, tuple[int, int]] | None
) -> None:
    table = teacher.table(3, guidance_scale=4.0)
    noise = noise_bank(table, range(2))
    told = {} if sizes is None else {"time_ids": [n for pair in sizes.values() for n in pair]}
    samples = teacher.sample(table, 2, noise=noise, encoder_hidden_states=PROMPTS, **told)
    images = pipeline(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=torch.from_numpy(noise[0]),
        output_type="np",
        height=16,
        width=16,
        **(sizes or SIZES),
    ).images
    np.testing.assert_allclose(samples, images.transpose(0, 3, 1, 2) * 2 - 1, atol=5e-5)


def test_what_it_takes(teacher: Teacher) -> None:
    kinds = {spec.name: (spec.kind, spec.shape[1:]) for spec in teacher.signature.inputs}
    assert kinds["text_embeds"] == ("pooled", (12,))
    assert kinds["time_ids"] == ("size", (6,))
    _, size = teacher.conditions
    assert (size.kind, size.whole_size) == ("size", (16, 16, 0, 0, 16, 16))
    with pytest.raises(ContractError, match=r"`time_ids` must be 6 numbers, .* got shape \(4,\)"):
        teacher.sample(teacher.table(1), 2, time_ids=[1, 2, 3, 4])


def test_its_parts_are_written_as_loaders_know_them(teacher: Teacher, tmp_path: Path) -> None:
    signatures, folders = teacher.save_parts(tmp_path)
    table = teacher.complete(teacher.table(3, guidance_scale=4.0))
    store.save(teacher.network, tmp_path / "unet")
    signatures["unet"] = teacher.signature
    student = Student(tmp_path, "parts", table, signatures, folders=folders)
    assert set(table.networks) | {table.encoder} == set(signatures)
    noise = noise_bank(table, range(2))
    asked = {"noise": noise, "encoder_hidden_states": PROMPTS}
    made = sample_torch(
        {name: open_network(student, name) for name in table.networks},
        table,
        2,
        tokenize=student.tokenize,
        **asked,
    )
    expected = teacher.sample(teacher.table(3, guidance_scale=4.0), 2, **asked)
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_further_inputs_leave_it_as_it_is_until_they_are_trained(teacher: Teacher) -> None:
    extended = extend(teacher.network, Inputs({"w": 1000.0}, image_channels=2, residuals=True))
    inputs = {
        spec.name: torch.randn(2, *(12 if n == "length" else n for n in spec.shape[1:]))
        for spec in store.signature(extended).inputs
    }
    inputs |= {k: v * 0 for k, v in inputs.items() if k.startswith("residual_")}
    stock = {spec.name: inputs[spec.name] for spec in teacher.signature.inputs}
    assert torch.equal(store.call(extended, inputs), store.call(teacher.network, stock))


def test_parts_that_read_differently_are_refused(folder: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    words = broken("words") / "tokenizer_2" / "tokenizer.json"
    held = json.loads(words.read_text())
    words.write_text(json.dumps({**held, "normalizer": None}))
    with pytest.raises(BundleError, match="tokenizer_2: reads prompts differently than tokenizer/"):
        Teacher.open(words.parents[1])
    alone = broken("alone")
    shutil.rmtree(alone / "text_encoder_2")
    with pytest.raises(BundleError, match="no numbers of `text_embeds`, unet/ takes 12"):
        Teacher.open(alone)
    swapped = broken("swapped")
    shutil.rmtree(swapped / "text_encoder_2")
    shutil.copytree(folder / "text_encoder", swapped / "text_encoder_2")
    with pytest.raises(BundleError, match="is a CLIPTextModel; .* CLIPTextModelWithProjection"):
        Teacher.open(swapped)
