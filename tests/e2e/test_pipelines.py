"""What a request may ask of an exported pipeline: prompts, guidance, images to begin from, little memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.errors import ContractError
from edgedistill.models import store
from edgedistill.models.source import open_source
from edgedistill.pipeline import Pipeline
from edgedistill.sampler import RowTrace, latent_of
from edgedistill.table import Guidance
from edgedistill.teacher import Teacher
from export.assemble import export_student
from export.formats import ExportOptions

PROMPTS = ["a photo of the cat", "a ship in the rain"]
STEPS = 4


@pytest.fixture(scope="module")
def exported(tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    student = open_source(tiny_pipelines / "sd", num_steps=STEPS, guidance_scale=3.0)
    target, options = tmp_path_factory.mktemp("sd") / "bundle", ExportOptions(dtype="float32")
    return export_student(student, target, ["onnx", "openvino"], options)


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


GUIDANCE = {
    "none": Guidance(),
    "embedded": Guidance("embedded", "w", 2.0, (1.0, 4.0)),
    "baked": Guidance("baked", default=2.0, range=(2.0, 2.0)),
    "cfg": Guidance("cfg", default=2.0, range=(1.0, 4.0), null={"class_labels": 3}),
}
NEGATIVE: dict[str, Any] = {"negative_prompt": "rain"}


@pytest.mark.parametrize(
    ("mode", "asked", "message"),
    [
        (
            "none",
            {"guidance_scale": 2.0},
            "guidance is 'none' at scale 1; `guidance_scale=2` cannot be chosen here, leave it out",
        ),
        (
            "baked",
            {"guidance_scale": 3.0},
            "guidance is 'baked' at scale 2; `guidance_scale=3` cannot be chosen here",
        ),
        ("embedded", {"guidance_scale": 5.0}, r"lie in the trained range \[1, 4\], got 5"),
        ("cfg", {"guidance_scale": 0.5}, r"must lie in \[1, 4\], got 0.5"),
        ("none", NEGATIVE, "guidance is 'none', which takes no negative prompt; leave it out"),
        ("baked", NEGATIVE, "guidance is 'baked', which takes no negative prompt"),
        ("embedded", NEGATIVE, "guidance is 'embedded', which takes no negative prompt"),
        # Without a text there is nothing that a negative prompt could take the place of.
        ("cfg", NEGATIVE, "guidance is 'cfg', which takes no negative prompt"),
    ],
)
def test_guidance_that_a_model_does_not_have_is_refused(
    mode: str, asked: dict[str, Any], message: str, handmade: Path
) -> None:
    held = Bundle.open(handmade)
    (stage,) = held.table.stages
    scale = 2.0 if mode == "cfg" else None
    rows = tuple(replace(row, guidance_scale=scale) for row in stage.rows)
    table = replace(held.table, stages=(replace(stage, rows=rows),), guidance=GUIDANCE[mode])
    made = Pipeline(replace(held, table=table), held.artifact(runtime="fake"))
    with pytest.raises(ContractError, match=message):
        made(**asked)


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


PICTURE = np.tanh(np.random.default_rng(6).standard_normal((1, 3, 16, 16))).astype(np.float32)


def known_latent(folder: Path) -> torch.Tensor:
    """Return the latent of the picture: the mean, where diffusers draws; given a latent, it takes that."""
    vae = store.load(folder / "vae")
    with torch.no_grad():
        return vae.encode(torch.from_numpy(PICTURE)).latent_dist.mean * vae.config.scaling_factor


def theirs(pipeline: Any, **asked: Any) -> np.ndarray:
    """Return what a pipeline of diffusers draws at this file's steps and guidance, as ours gives it."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        PROMPTS[0],
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **asked,
    )
    return made.images.transpose(0, 3, 1, 2) * 2 - 1


def drawn() -> np.ndarray:
    """Return the noise that diffusers draws of the same generator."""
    return torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).numpy()


# diffusers 0.39 converts tensors in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
def test_an_image_is_gone_on_from_as_diffusers_does(
    strength: float, runtime: str, exported: Bundle, tiny_pipelines: Path
) -> None:
    stock = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_pipelines / "sd")
    expected = theirs(stock, image=known_latent(tiny_pipelines / "sd"), strength=strength)
    ours = edgedistill.load(exported, runtime=runtime)
    made = ours(prompt=PROMPTS[0], image=PICTURE, strength=strength, noise=[drawn()]).array
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("strength", [0.5, None])
def test_a_part_is_drawn_anew_as_diffusers_does(
    strength: float | None, runtime: str, exported: Bundle, tiny_pipelines: Path
) -> None:
    mask = np.zeros((1, 1, 16, 16), np.float32)
    mask[:, :, 6:, :10] = 1  # whole latents, of which diffusers takes one pixel each
    latent = known_latent(tiny_pipelines / "sd")
    stock = StableDiffusionInpaintPipeline.from_pretrained(tiny_pipelines / "sd")
    given = {"image": latent, "masked_image_latents": latent, "mask_image": torch.from_numpy(mask)}
    expected = theirs(stock, **given, strength=strength or 1.0)
    # What is kept is noised with the one noise that diffusers draws.
    noise = [drawn()] * int(STEPS * (strength or 1.0))
    ours = edgedistill.load(exported, runtime=runtime)
    asked = {"image": PICTURE, "mask": mask, "strength": strength, "noise": noise}
    made = ours(prompt=PROMPTS[0], **asked).array
    np.testing.assert_allclose(made, expected, atol=1e-4)
    free = ours(prompt=PROMPTS[0], noise=noise[:1], seed=0).array
    assert np.abs(made - free).max() > 1e-2


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
