"""What a request may ask of an exported pipeline: prompts, guidance, images to begin from, little memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.errors import ContractError
from edgedistill.models import store
from edgedistill.models.source import open_source
from edgedistill.pipeline import Pipeline
from edgedistill.sampler import RowTrace, latent_of
from edgedistill.teacher import Teacher
from export.assemble import export_student

PROMPTS = ["a photo of the cat", "a ship in the rain"]
STEPS = 4


@pytest.fixture(scope="module")
def exported(tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    student = open_source(tiny_pipelines / "sd", num_steps=STEPS, guidance_scale=3.0)
    return export_student(student, tmp_path_factory.mktemp("sd") / "bundle", ["onnx"])


@pytest.fixture(scope="module")
def pipeline(exported: Bundle) -> Pipeline:
    return edgedistill.load(exported, runtime="onnxruntime")


def test_prompts_become_images_whatever_the_batch(pipeline: Pipeline) -> None:
    both = pipeline(prompt=PROMPTS, seed=[5, 9])
    assert [image.size for image in both.images] == [(16, 16)] * 2
    alone = pipeline(prompt=PROMPTS[1], seed=9).array
    assert np.abs(both.array[1:] - alone).max() < 1e-6


def test_every_step_is_shown_with_its_latent(pipeline: Pipeline) -> None:
    traces: list[RowTrace] = []
    pipeline(prompt=PROMPTS, observe=traces.append)
    assert [trace.index for trace in traces] == list(range(STEPS))
    assert traces[0].state.shape == (2, *pipeline.table.stages[0].shape)


def test_guidance_of_two_calls_is_the_request_s_to_choose(pipeline: Pipeline) -> None:
    default = pipeline(prompt=PROMPTS).array
    assert np.array_equal(pipeline(prompt=PROMPTS, guidance_scale=3.0).array, default)
    assert np.abs(pipeline(prompt=PROMPTS, guidance_scale=7.0).array - default).max() > 1e-3
    none = pipeline(prompt=PROMPTS, guidance_scale=1.0).array
    same = pipeline(prompt=PROMPTS, guidance_scale=1.0, negative_prompt="rain").array
    assert np.abs(none - same).max() < 1e-6  # u + 1*(c - u)
    with pytest.raises(ContractError, match=r"must lie in \[1, 20\], got 21"):
        pipeline(prompt=PROMPTS, guidance_scale=21.0)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipeline: Pipeline) -> None:
    default = pipeline(prompt=PROMPTS).array
    assert np.array_equal(pipeline(prompt=PROMPTS, negative_prompt="").array, default)
    # Guided away from itself, a prompt is not guided.
    away = pipeline(prompt=PROMPTS[0], negative_prompt=PROMPTS[0]).array
    assert np.abs(away - pipeline(prompt=PROMPTS[0], guidance_scale=1.0).array).max() < 1e-5


def test_other_guidance_takes_no_negative_prompt(bundle: Bundle) -> None:
    with pytest.raises(
        ContractError, match="guidance is 'embedded', which takes no negative prompt"
    ):
        edgedistill.load(bundle, runtime="onnxruntime")(negative_prompt="rain")


def test_an_image_is_begun_from_by_its_latent(pipeline: Pipeline, tiny_pipelines: Path) -> None:
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    traces: list[RowTrace] = []
    made = pipeline(prompt=PROMPTS[0], image=picture, strength=0.5, observe=traces.append)
    assert made.array.shape == (1, 3, 16, 16)
    assert len(traces) == STEPS // 2
    teacher = Teacher.open(tiny_pipelines / "sd")
    array = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = (
            store.load(tiny_pipelines / "sd" / "vae").encode(torch.tensor(array)).latent_dist.mean
        )
    expected = mean.numpy() * teacher.space["scale"]
    got = latent_of(pipeline.table, pipeline.networks["vae_encoder"], array)
    assert np.abs(got - expected).max() < 1e-5


def test_what_makes_latents_is_open_only_where_there_is_an_image(exported: Bundle) -> None:
    pipeline = edgedistill.load(exported, runtime="onnxruntime")
    pipeline(prompt=PROMPTS[0])
    assert set(pipeline.networks.opened) == {"unet", "text_encoder", "vae_decoder"}
    pipeline(prompt=PROMPTS[0], image=np.zeros((3, 16, 16), np.float32), strength=0.5)
    assert "vae_encoder" in pipeline.networks.opened


def test_kept_pixels_survive_inpainting_as_far_as_the_autoencoder_goes(pipeline: Pipeline) -> None:
    picture = np.tanh(np.random.default_rng(4).standard_normal((1, 3, 16, 16))).astype(np.float32)
    mask = np.zeros((1, 1, 16, 16), np.float32)
    states: list[np.ndarray] = []
    pipeline(
        prompt=PROMPTS[0], image=picture, mask=mask, observe=lambda trace: states.append(trace.next)
    )
    latent = latent_of(pipeline.table, pipeline.networks["vae_encoder"], picture)
    assert np.abs(states[-1] - latent).max() < 1e-6


def test_little_memory_opens_one_after_another_and_draws_the_same(
    pipeline: Pipeline, exported: Bundle
) -> None:
    thrifty = edgedistill.load(exported, runtime="onnxruntime", low_memory=True)
    assert thrifty.networks.opened == ()
    seen: list[tuple[str, ...]] = []
    made = thrifty(prompt=PROMPTS, observe=lambda _: seen.append(thrifty.networks.opened))
    assert np.array_equal(made.array, pipeline(prompt=PROMPTS).array)
    assert set(seen) == {("unet",)}
    assert thrifty.networks.opened == ("vae_decoder",)


def test_a_bar_is_shown_where_it_is_asked_for(
    exported: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    edgedistill.load(exported, runtime="onnxruntime", progress=True)(prompt=PROMPTS[0])
    assert f"0/{STEPS}" in capsys.readouterr().err
    edgedistill.load(exported, runtime="onnxruntime")(prompt=PROMPTS[0])
    assert capsys.readouterr().err == ""
