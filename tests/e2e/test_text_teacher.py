"""Teachers that read prompts, and teachers of latents: the packaged one, and tiny pipelines of stock classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerFast

from edgedistill.data.captions import TEMPLATES, caption
from edgedistill.errors import BundleError, ConfigError
from edgedistill.evaluation.baselines import Settings, naive_baselines
from edgedistill.evaluation.report import Evaluator
from edgedistill.models import store
from edgedistill.models.run import sample_torch
from edgedistill.models.vae import VaeDecoder, VaeEncoder
from edgedistill.noise import noise_bank
from edgedistill.student import Student
from edgedistill.teacher import PACKAGED, Teacher

FOLDER = PACKAGED["captioned_digits"]
PROMPTS = ["a handwritten three", "the digit seven", "an image of a zero"]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.open("captioned_digits")


def make_pipeline(kind: str = "AutoencoderKL") -> StableDiffusionPipeline:
    """Return a pipeline of random weights around the packaged text encoder."""
    torch.manual_seed(0)
    vaes = {
        "AutoencoderKL": lambda: AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.5,
            shift_factor=0.25,
        ),
        "AutoencoderTiny": lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER, subfolder="tokenizer")
    return StableDiffusionPipeline(
        vae=vaes[kind](),
        text_encoder=CLIPTextModel.from_pretrained(FOLDER, subfolder="text_encoder"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(timestep_spacing="trailing", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    """Write the pipeline's parts; the pipeline itself insists on a tokenizer class of its own."""
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        getattr(pipeline, name).save_pretrained(folder / name)
    return folder


def test_every_part_of_the_packaged_one_opens_in_its_stock_library(teacher: Teacher) -> None:
    unet = UNet2DConditionModel.from_pretrained(FOLDER, subfolder="unet").float().eval()
    encoder = CLIPTextModel.from_pretrained(FOLDER, subfolder="text_encoder").float().eval()
    words = AutoTokenizer.from_pretrained(FOLDER, subfolder="tokenizer")
    tokens = words(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    z, t = torch.randn(3, 1, 8, 8), torch.tensor([999, 400, 0])
    made = teacher.embed(PROMPTS)
    with torch.no_grad():
        text = encoder(tokens)
        raw = teacher.network(z, t, torch.from_numpy(made["encoder_hidden_states"])).sample
        expected = unet(z, t, text.last_hidden_state).sample
    np.testing.assert_allclose(made["pooled"], text.pooler_output.numpy(), atol=1e-5)
    torch.testing.assert_close(raw, expected, rtol=0, atol=1e-5)


def test_what_the_packaged_one_is(teacher: Teacher) -> None:
    (condition,) = teacher.conditions
    assert (condition.name, condition.kind, condition.encoder, condition.length) == (
        "encoder_hidden_states",
        "text",
        "text_encoder",
        12,
    )
    assert condition.examples[3] == "a handwritten three"
    assert (teacher.classes, teacher.null) == (None, {"encoder_hidden_states": ""})
    assert teacher.signature.input("text").shape == ("batch", "length", 32)
    assert (teacher.space["kind"], teacher.shape, teacher.image_shape) == (
        "pixel",
        (1, 8, 8),
        (1, 8, 8),
    )
    assert teacher.prediction_type == "v_prediction"


def test_its_guided_table_samples_what_a_hand_written_loop_samples(teacher: Teacher) -> None:
    table, g = teacher.table(4, guidance_scale=2.5), 2.5
    assert table.nfe == 8
    scheduler = DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    scheduler.set_timesteps(4)
    text, null = (
        torch.from_numpy(teacher.embed(prompts)["encoder_hidden_states"])
        for prompts in (PROMPTS, [""] * 3)
    )
    z = torch.from_numpy(noise_bank(table, range(3))[0])
    with torch.no_grad():
        for t in scheduler.timesteps:
            asked, free = (teacher.network(z, t, words).sample for words in (text, null))
            z = scheduler.step(free + g * (asked - free), t, z).prev_sample
    samples = teacher.sample(table, 3, encoder_hidden_states=PROMPTS)
    np.testing.assert_allclose(samples, z.clip(-1, 1).numpy(), atol=1e-5)


def test_it_draws_what_the_prompt_says_in_sentences_it_has_not_seen(teacher: Teacher) -> None:
    evaluator = Evaluator.open("captioned_digits")
    digits = np.arange(200) % 10
    for split in TEMPLATES:
        prompts = [caption(int(d), i // 10, split) for i, d in enumerate(digits)]
        samples = teacher.sample(teacher.table(4, 1.5), 200, encoder_hidden_states=prompts)
        report = evaluator.report(samples, digits)
        assert report.accuracy >= 0.97
        assert report.frechet < 2.2  # 200 samples, where 1000 give 1.45; white noise has 45


def test_it_is_measured_by_what_its_examples_say(teacher: Teacher) -> None:
    evaluator = Evaluator.open("captioned_digits")
    assert evaluator.labels(teacher.conditions, 12).tolist() == [*range(10), 0, 1]
    assert Evaluator.open("digits").labels(teacher.conditions, 12) is None
    settings = Settings((4,), (0.0,), ("trailing",), reference_steps=8, count=60)
    made = naive_baselines(teacher, evaluator, settings)
    assert made.teacher.accuracy >= 0.97
    assert made.naive[4].report.accuracy >= 0.95
    assert made.naive[4].report.frechet > made.teacher.frechet


def test_a_student_reads_prompts_as_it_does(teacher: Teacher, tmp_path: Path) -> None:
    table = teacher.table(2, guidance_scale=2.0)
    store.save(teacher.network, tmp_path / "unet")
    signatures = {"unet": teacher.signature, **teacher.save_parts(tmp_path)[0]}
    Student(tmp_path, "reader", table, signatures).write_manifest()
    student = Student.open(tmp_path)
    modules = {name: store.load(student.folder(name)) for name in student.signatures}
    made = sample_torch(
        modules, student.table, 3, tokenize=student.tokenize, encoder_hidden_states=PROMPTS
    )
    expected = teacher.sample(table, 3, encoder_hidden_states=PROMPTS)
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_a_latent_pipeline_samples_what_stable_diffusion_samples(kind: str, tmp_path: Path) -> None:
    pipeline = make_pipeline(kind)
    teacher = Teacher.open(save(pipeline, tmp_path))
    assert (teacher.shape, teacher.image_shape, teacher.clamp) == ((4, 8, 8), (3, 16, 16), None)
    table = teacher.table(3, guidance_scale=3.0)
    assert table.space == {**teacher.space, "kind": "latent"}
    noise = noise_bank(table, range(3))
    samples = teacher.sample(table, 3, noise=noise, encoder_hidden_states=PROMPTS)
    assert samples.shape == (3, 3, 16, 16)
    pipeline.set_progress_bar_config(disable=True)
    states, images = (
        pipeline(
            PROMPTS,
            num_inference_steps=3,
            guidance_scale=3.0,
            latents=torch.from_numpy(noise[0]),
            output_type=form,
        ).images
        for form in ("latent", "np")
    )
    shift = dict(pipeline.vae.config).get("shift_factor") or 0.0
    if shift:  # StableDiffusionPipeline leaves the shift out
        with torch.no_grad():
            images = pipeline.vae.decode(states / pipeline.vae.config.scaling_factor + shift)
        images = images.sample.clip(-1, 1).numpy()
    else:
        images = images.transpose(0, 3, 1, 2) * 2 - 1
    np.testing.assert_allclose(samples, images, atol=2e-5)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_the_halves_of_an_autoencoder_are_the_whole(kind: str, tmp_path: Path) -> None:
    vae = make_pipeline(kind).vae.eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        coded = vae.encode(images)
        latents = coded.latents if kind == "AutoencoderTiny" else coded.latent_dist.mean
        expected = vae.decode(latents).sample
        for half, given, wanted in ((VaeEncoder, images, latents), (VaeDecoder, latents, expected)):
            store.save(half(vae, (8, 8)), tmp_path / half.__name__)
            network = store.load(tmp_path / half.__name__)
            torch.testing.assert_close(network(given), wanted, rtol=0, atol=1e-5)
            (taken,), (made,) = store.signature(network).inputs, store.signature(network).outputs
            assert (taken.shape[1:], made.shape[1:]) == (given.shape[1:], wanted.shape[1:])


def test_latents_are_scaled_and_shifted_and_come_back(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    teacher = Teacher.open(save(pipeline, tmp_path))
    images = np.random.default_rng(0).uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    states = teacher.encode(images)
    with torch.no_grad():
        mean = pipeline.vae.eval().encode(torch.from_numpy(images)).latent_dist.mean
        back = pipeline.vae.decode(mean).sample
    np.testing.assert_allclose(states, (mean.numpy() - 0.25) * 0.5, atol=1e-5)
    np.testing.assert_allclose(teacher.decode(states), back.numpy(), atol=1e-4)


def test_a_scheduler_without_rows_of_its_own_lends_its_noise_to_ddim(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    table = Teacher.open(save(pipeline, tmp_path)).table(5)
    assert table.annotations["scheduler"]["_class_name"] == "DDIMScheduler"
    assert table.annotations["scheduler"]["beta_schedule"] == "scaled_linear"
    assert all(row.clip is None for row in table.rows)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_pipelines_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    whole = save(make_pipeline(), tmp_path / "whole")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    third = broken("third")
    (third / "text_encoder_3").mkdir()
    with pytest.raises(BundleError, match="text_encoder_3: pipelines with this part are not known"):
        Teacher.open(third)
    other = broken("other")
    edit(other / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(BundleError, match="vae: is a VQModel; .* AutoencoderKL, AutoencoderTiny"):
        Teacher.open(other)
    normalised = broken("normalised")
    edit(normalised / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(BundleError, match="`latents_mean` and `latents_std` are not known"):
        Teacher.open(normalised)
    added = broken("added")
    edit(added / "unet" / "config.json", addition_embed_type="text_image")
    with pytest.raises(BundleError, match="not known here: addition_embed_type 'text_image'"):
        Teacher.open(added)
    scheduled = broken("scheduled")
    edit(scheduled / "scheduler" / "scheduler_config.json", _class_name="VQDiffusionScheduler")
    with pytest.raises(ConfigError, match="noise schedule of a VQDiffusionScheduler is not known"):
        Teacher.open(scheduled)
    silent = broken("silent")
    shutil.rmtree(silent / "text_encoder")
    with pytest.raises(BundleError, match=r"text_encoder.config\.json: no such file"):
        Teacher.open(silent)
    pickled = broken("pickled")
    weights = pickled / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(BundleError, match=r"pytorch_model\.bin is a pickle"):
        Teacher.open(pickled)


def test_parts_of_different_pipelines_are_refused(tmp_path: Path) -> None:
    folder = save(make_pipeline(), tmp_path)
    config = UNet2DConditionModel.load_config(folder / "unet")
    store.save(
        UNet2DConditionModel.from_config(
            {**config, "cross_attention_dim": 16, "in_channels": 9, "out_channels": 9}
        ),
        folder / "unet",
    )
    with pytest.raises(
        BundleError,
        match="32 numbers of `encoder_hidden_states`, unet/ takes 16; vae/ makes latents of 4 channels",
    ):
        Teacher.open(folder)


def test_a_teacher_of_classes_reads_no_prompts() -> None:
    with pytest.raises(ConfigError, match="digits: this teacher reads no prompts"):
        Teacher.open("digits").embed(["three"])
