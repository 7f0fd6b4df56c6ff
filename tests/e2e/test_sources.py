"""Folders that diffusers wrote, opened as students: each samples what diffusers' own pipeline samples."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import edgedistill
from edgedistill.errors import BundleError, ConfigError
from edgedistill.models import store
from edgedistill.models.run import sample_torch
from edgedistill.models.source import open_network, open_source
from edgedistill.models.variant import Lora, open_variant
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions

# diffusers 0.39 converts tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS = ["a photo of the cat", "a ship in the rain"]
CLASSES = [3, 1]
TEXT = {"output_type": "np", "height": 16, "width": 16}
ASKED: dict[str, dict[str, Any]] = {
    "sd": {"prompt": PROMPTS, **TEXT},
    "sd2": {"prompt": PROMPTS, **TEXT},
    "lcm": {"prompt": PROMPTS, **TEXT},
    "sdxl": {"prompt": PROMPTS, **TEXT},
    "unconditional": {"batch_size": 2, "output_type": "np"},
    "class": {"batch_size": 2, "class_labels": CLASSES, "output_type": "np"},
    "dit": {"class_labels": CLASSES, "output_type": "np"},
}
CASES = [
    ("sd", 1.0, 4),
    ("sd", 5.0, 2),
    ("sd2", 1.0, 4),
    ("sd2", 5.0, 2),
    ("lcm", 8.5, 4),
    ("lcm", 3.0, 1),
    ("sdxl", 1.0, 2),
    ("sdxl", 4.0, 4),
    ("unconditional", None, 5),
    ("class", None, 4),
    ("dit", 1.0, 4),
    ("dit", 4.0, 2),
]


def samples(student: Student, noise: list[torch.Tensor]) -> np.ndarray:
    """Run a student's table in PyTorch for the prompts or classes that are asked for here."""
    modules = {name: open_network(student, name) for name in student.table.networks}
    asked: dict[str, Any] = {"text": PROMPTS, "class": CLASSES}
    given = {item.name: asked[item.kind] for item in student.table.conditions if item.kind in asked}
    return sample_torch(
        modules,
        student.table,
        2,
        noise=[array.numpy() for array in noise],
        tokenize=student.tokenize,
        **given,
    )


def drawn(student: Student) -> list[torch.Tensor]:
    """Return the noises that diffusers draws for two samples from seed 0, in the order of their use."""
    generator = torch.Generator().manual_seed(0)
    table = student.table
    return [
        torch.randn((2, *table.stages[0].shape), generator=generator)
        for _ in range(table.noise_count)
    ]


@pytest.mark.parametrize(("kind", "scale", "steps"), CASES)
def test_it_samples_what_the_pipeline_samples(
    kind: str, scale: float | None, steps: int, tiny_pipelines: Path
) -> None:
    student = open_source(tiny_pipelines / kind, num_steps=steps, guidance_scale=scale)
    made = samples(student, drawn(student))
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipelines / kind)
    pipeline.set_progress_bar_config(disable=True)
    guided = {} if scale is None else {"guidance_scale": scale}
    images = pipeline(
        **ASKED[kind],
        **guided,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    ).images
    np.testing.assert_allclose(made.transpose(0, 2, 3, 1) / 2 + 0.5, images, atol=1e-4)
    assert np.abs(images[0] - images[1]).max() > 0.05


@pytest.mark.parametrize(
    ("kind", "scale"), [("sd2", 5.0), ("sdxl", 4.0), ("lcm", 3.0), ("dit", 4.0)]
)
def test_it_is_exported_with_prompts_in_and_images_out(
    kind: str, scale: float, tiny_pipelines: Path, tmp_path: Path
) -> None:
    student = open_source(tiny_pipelines / kind, num_steps=2, guidance_scale=scale)
    bundle = export_student(student, tmp_path / "out", ["onnx"], ExportOptions(batch=None))
    noise = drawn(student)
    expected = samples(student, noise)
    given = {"class_labels": CLASSES} if kind == "dit" else {"prompt": PROMPTS}
    for runtime in ("torch", "onnxruntime"):
        made = edgedistill.load(bundle, runtime)(noise=[array.numpy() for array in noise], **given)
        np.testing.assert_allclose(made.array, expected, atol=1e-4)
        assert made.images[0].size == (16, 16)


def test_nothing_is_copied_and_the_fingerprint_is_of_weights_and_table(
    tiny_pipelines: Path, tmp_path: Path
) -> None:
    student = open_source(tiny_pipelines / "sd")
    assert student.root == tiny_pipelines / "sd"
    assert student.folders == {"vae_decoder": "vae", "vae_encoder": "vae"}
    assert set(student.signatures) == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    student.verify()
    copied = Path(shutil.copytree(student.root, tmp_path / "other"))
    assert open_source(copied).fingerprint == student.fingerprint
    assert open_source(copied, num_steps=2).fingerprint != student.fingerprint
    (copied / "unet" / "model.onnx").write_bytes(b"beside the weights")
    assert open_source(copied).fingerprint == student.fingerprint
    shutil.copy2(copied / "tokenizer" / "vocab.json", copied / "tokenizer" / "further.json")
    assert open_source(copied).fingerprint != student.fingerprint


def test_a_network_by_itself_and_a_scheduler_that_is_not_compiled(
    tiny_pipelines: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_pipelines / "class", tmp_path / "class")) / "unet"
    student = open_source(folder)
    assert student.folder("unet").samefile(folder)
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    made = open_source(folder, num_steps=4, scheduler=config).table
    assert [row.feeds["timestep"] for row in made.rows] == [999, 749, 499, 249]
    assert made.annotations["scheduler"]["_class_name"] == "DDIMScheduler"


def test_guidance_is_what_the_network_offers(tiny_pipelines: Path) -> None:
    modes = {
        (kind, scale): open_source(tiny_pipelines / kind, guidance_scale=scale).table.guidance
        for kind in ("sd", "lcm", "class", "dit")
        for scale in (None, 4.0)
    }
    assert {key: item.mode for key, item in modes.items()} == {
        ("sd", None): "none",
        ("sd", 4.0): "cfg",
        ("lcm", None): "embedded",
        ("lcm", 4.0): "embedded",
        ("class", None): "none",
        ("class", 4.0): "cfg",
        ("dit", None): "none",
        ("dit", 4.0): "cfg",
    }
    assert (modes["lcm", None].default, modes["lcm", 4.0].default) == (8.5, 4.0)
    assert (modes["class", 4.0].null, modes["dit", 4.0].null) == (
        {"class_labels": 7},
        {"class_labels": 1000},
    )
    with pytest.raises(ConfigError, match="guidance needs a network that takes a text or a class"):
        open_source(tiny_pipelines / "unconditional", guidance_scale=2.0)


def test_a_student_opens_as_what_it_was_trained_for(tmp_path: Path, student: Student) -> None:
    assert open_source(student.root).fingerprint == student.fingerprint
    with pytest.raises(ConfigError, match="a student has the steps, the guidance"):
        open_source(student.root, num_steps=2)
    with pytest.raises(BundleError, match="no such folder"):
        open_source(tmp_path / "nothing")


def test_words_of_other_exporters_mean_the_same(
    run: Callable[..., Any],
    tiny_pipelines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part = ("--steps", "1", "--networks", "vae_decoder", "--task", "text-to-image")
    command = ("export", "onnx", tmp_path / "out", *part)
    assert run(*command, "--model-version", tiny_pipelines / "sd")[0] == 0
    told = run(*command, "--model_name_or_path", tiny_pipelines / "sd")[1]
    assert told.splitlines()[-1].startswith("Nothing to write")
    status, _, told = run(*command, "-m", tiny_pipelines / "sd", "--latent-h", "16")
    assert (status, "asked for: 1 rows of 4x16x8" in told) == (2, True)
    status, _, told = run(*command, "-m", tiny_pipelines / "sd", "--trust-remote-code")
    assert (status, "no code is run that comes with a model" in told) == (2, True)
    with pytest.raises(SystemExit):
        run("export", "onnx", "--help")
    told = capsys.readouterr().out
    assert "--model-name-or-path MODEL\n" in told
    assert not [word for word in ("--model-version", "--task", "--latent-h") if word in told]


@pytest.fixture(scope="module")
def adapter(tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the UNet and the text encoder, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines / "sd")
    layers = {}
    for part, targets in (("unet", ["to_q", "to_out.0", "conv1"]), ("text_encoder", ["q_proj"])):
        network = getattr(pipeline, part)
        network.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
        torch.manual_seed(1)
        for name, value in network.named_parameters():
            if "lora_B" in name:
                value.data.normal_(std=0.3)
        layers[part] = get_peft_model_state_dict(network)
        layers[f"{part}_config"] = network.peft_config["default"].to_dict()
    pipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=layers["unet_config"],
        text_encoder_lora_adapter_metadata=layers["text_encoder_config"],
    )
    return folder / "pytorch_lora_weights.safetensors"


def images_of(pipeline: DiffusionPipeline) -> np.ndarray:
    """Return images (2, channels, height, width) of a pipeline in four steps from seed 0."""
    pipeline.set_progress_bar_config(disable=True)
    asked = {**ASKED["sd"], "guidance_scale": 1.0, "num_inference_steps": 4}
    made = pipeline(**asked, generator=torch.Generator().manual_seed(0)).images
    return made.transpose(0, 3, 1, 2) * 2 - 1


def test_a_lora_is_merged_at_its_scale(tiny_pipelines: Path, adapter: Path, tmp_path: Path) -> None:
    lora = Lora.parse(f"{adapter}:0.7")
    assert lora.scale == 0.7
    student = open_variant(tiny_pipelines / "sd", tmp_path, loras=[lora], num_steps=4)
    (told,) = student.provenance["lora"]
    assert (told["file"], told["scale"]) == (adapter.name, 0.7)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines / "sd")
    without = images_of(pipeline)
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    pipeline.fuse_lora(lora_scale=0.7)
    expected = images_of(pipeline)
    np.testing.assert_allclose(samples(student, drawn(student)), expected, atol=1e-4)
    assert np.abs(expected - without).max() > 0.02
    untouched = Path("vae") / store.WEIGHTS
    assert (student.root / untouched).samefile(tiny_pipelines / "sd" / untouched)


def test_what_can_be_refused_without_merging_is_refused_before(
    run: Callable[..., Any],
    tiny_pipelines: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("export", "onnx", "-m", tiny_pipelines / "sd", "--steps", "1")
    merged = (*command, "--lora", f"{adapter}:0.7")
    there = tmp_path / "there"
    assert run(*merged, there)[0] == 0
    assert run(*merged, there)[1].splitlines()[-1].startswith("Nothing to write")
    monkeypatch.setattr(
        "edgedistill.models.variant._change", lambda *_: pytest.fail("weights were merged")
    )
    for words, message in (
        ((*merged, adapter.parent), "exists and is not a bundle"),
        ((*merged, tmp_path / "text_encoder_1"), "a path itself holds `text_encoder`"),
        ((*merged, tmp_path / "new", "--max-memory", "1MB"), "of memory (an estimate)"),
        ((*merged, tmp_path / "new", "--networks", "decoder"), "no network 'decoder'"),
        ((*merged, there, "--steps", "2"), "holds 'sd' with other samplers"),
        ((*merged, there, "--opset", "18", "--networks", "unet"), "with other options"),
        ((*command, there, "--lora", f"{adapter}:0.5"), "holds a bundle of another student"),
    ):
        status, _, told = run(*words)
        assert (status, message in told) == (2, True), told


def test_a_lora_of_something_else_is_refused(
    tiny_pipelines: Path, adapter: Path, tmp_path: Path
) -> None:
    held = load_file(adapter)
    (tmp_path / "place").mkdir()

    def refused(message: str, tensors: dict[str, torch.Tensor], kind: str = "sd") -> None:
        save_file(tensors, tmp_path / "changed.safetensors")
        with pytest.raises(BundleError, match=message):
            open_variant(
                tiny_pipelines / kind,
                tmp_path / "place",
                loras=[Lora(tmp_path / "changed.safetensors")],
            )
        shutil.rmtree(tmp_path / "place")
        (tmp_path / "place").mkdir()

    first = next(name for name in held if ".lora_A." in name or ".lora.down." in name)
    refused("has one factor of its update", {first: held[first]})
    refused("is no update as diffusers", {"lora_unet_mid.lora_mid": held[first]})
    refused("has no text_encoder/, which a LoRA updates", held, "dit")
    wide = {name: torch.cat([value, value]) for name, value in held.items()}
    refused("which the network has as .*; the file is for another one", wide)
    with pytest.raises(ConfigError, match="FILE or FILE:SCALE, got 'a:b'"):
        Lora.parse("a:b")


def test_another_autoencoder_is_swapped_in(tiny_pipelines: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
    blocks = {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}
    small = AutoencoderTiny(**widths, **blocks).eval()
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "place").mkdir()
    student = open_variant(
        tiny_pipelines / "sd", tmp_path / "place", vae=tmp_path / "small", num_steps=4
    )
    assert (student.provenance["vae"], student.table.space["scale"]) == ("small", 1.0)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines / "sd", vae=small)
    made = samples(student, drawn(student))
    np.testing.assert_allclose(made, images_of(pipeline), atol=1e-4)
