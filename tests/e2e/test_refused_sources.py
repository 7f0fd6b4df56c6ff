"""Folders of diffusers' that cannot be taken are refused by name, before any weights are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.errors import BundleError
from edgedistill.models import store
from edgedistill.models.source import open_source


def _index(**entries: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


def _config(part: str, **values: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / old).rename(root / new)

    return change


def _two_variants(root: Path) -> None:
    plain = root / f"{UNET}.safetensors"
    shutil.copy2(plain, root / f"{UNET}.bf16.safetensors")
    plain.rename(root / f"{UNET}.fp16.safetensors")


def _index_of(part: str, weight_map: dict[str, str]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / part / store.WEIGHTS).unlink()
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (root / part / f"{store.WEIGHTS}.index.json").write_text(json.dumps(index))

    return change


UNET = "unet/diffusion_pytorch_model"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "remote code": (
        _index(unet=["my_unet", "MyUNet"]),
        r"model_index.json: asks for `unet` from my_unet.MyUNet; .* no code is run",
    ),
    "remote pipeline": (
        _index(_class_name=["pipeline", "MyPipeline"]),
        r"asks for the pipeline \['pipeline', 'MyPipeline'\]",
    ),
    "another class": (
        _config("unet", _class_name="UNet3DConditionModel"),
        "unet: is a UNet3DConditionModel; the network that draws is one of UNet2DModel",
    ),
    "another transformer": (
        _config("unet", _class_name="SD3Transformer2DModel"),
        "unet: is a SD3Transformer2DModel; the network that draws is one of",
    ),
    "further inputs": (
        _config("unet", encoder_hid_dim_type="text_proj"),
        "inputs are not known here: encoder_hid_dim_type",
    ),
    "two controlnets": (
        lambda root: (root / "controlnet_1").mkdir(),
        "controlnet_1: pipelines with this part are not known",
    ),
    "pickles": (
        _renamed(f"{UNET}.safetensors", f"{UNET}.bin"),
        "unet/.*: no such file. diffusion_pytorch_model.bin is a pickle",
    ),
    "no weights": (
        lambda root: (root / "vae/diffusion_pytorch_model.safetensors").unlink(),
        "vae/diffusion_pytorch_model.safetensors: no such file. Nor are there shards of it: get",
    ),
    "no networks": (
        lambda root: shutil.rmtree(root / "unet"),
        "config.json: no such file; a pipeline's folder has unet or transformer with one in it",
    ),
    "two variants": (
        _two_variants,
        "unet: holds the variants bf16, fp16 and no plain .*; say which with --variant",
    ),
    "a shard is missing": (
        _index_of("unet", {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}),
        "00001-of-00002.safetensors: no such file, and .*index.json says that it holds",
    ),
    "shards elsewhere": (
        _index_of("unet", {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}),
        "index.json: has no `weight_map` from tensors to files beside it",
    ),
    "no text encoder": (
        lambda root: shutil.rmtree(root / "text_encoder"),
        "its unet reads prompts, and there is no text_encoder/ beside it",
    ),
    "no tokenizer": (
        lambda root: shutil.rmtree(root / "tokenizer"),
        "tokenizer: holds neither tokenizer.json nor vocab.json with merges.txt",
    ),
    "no scheduler": (
        lambda root: shutil.rmtree(root / "scheduler"),
        "has no scheduler_config.json",
    ),
    "another autoencoder": (
        _config("vae", _class_name="AutoencoderDC"),
        "vae: is a AutoencoderDC; .* AutoencoderKL, AutoencoderTiny",
    ),
    "an inpainting model": (
        _config("unet", in_channels=9),
        "unet/ takes 9 channels and makes 4: .* mask and picture of an inpainting model",
    ),
    "further channels": (
        _config("unet", out_channels=5),
        "unet/ takes 4 channels and makes 5: what the further ones are is not known here",
    ),
    "no size": (
        _config("unet", sample_size=None),
        r"unet: no UNet2DConditionModel .*`sample_size` must be .*, got None; write it into config",
    ),
    "texts of several widths": (
        _config("unet", cross_attention_dim=[16, 16]),
        r"unet: .* inputs are not known here: cross_attention_dim \[16, 16\]",
    ),
    "strangers": (
        _config("vae", latent_channels=16),
        "vae/ makes latents of 16 channels, unet/ takes 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_is_named_before_weights_are_read(
    case: str, tiny_pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = REFUSED[case]
    root = Path(shutil.copytree(tiny_pipelines / "sd", tmp_path / "sd"))
    change(root)
    monkeypatch.setattr(store, "load_weights", lambda _: pytest.fail("weights were read"))
    with pytest.raises(BundleError, match=message):
        open_source(root)


ODD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "classes as times": (
        "class",
        _config("unet", class_embed_type="timestep"),
        "unet: .* inputs are not known here: class_embed_type 'timestep'",
    ),
    "classes as embeddings": (
        "class",
        _config("unet", class_embed_type="identity"),
        "unet: .* inputs are not known here: class_embed_type 'identity'",
    ),
    "no size": (
        "unconditional",
        _config("unet", sample_size=None),
        "unet: no UNet2DModel can be built from it .*`sample_size` must be .*, got None",
    ),
    "sizes that are no numbers": (
        "unconditional",
        _config("unet", sample_size=[8, None]),
        r"`sample_size` must be .*, got \[8, None\]",
    ),
    "a learned variance": (
        "unconditional",
        _config("unet", out_channels=6),
        "takes 3 channels and makes 6: a UNet that predicts a variance beside its mean",
    ),
    "sizes of no width": (
        "sdxl",
        _config("unet", addition_time_embed_dim=None),
        "unet: no UNet2DConditionModel .*`addition_time_embed_dim` must say how wide",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_networks_that_are_called_in_other_ways_are_refused_by_name(
    case: str, tiny_pipelines: Path, tmp_path: Path
) -> None:
    kind, change, message = ODD[case]
    root = Path(shutil.copytree(tiny_pipelines / kind, tmp_path / kind))
    change(root)
    with pytest.raises(BundleError, match=message):
        open_source(root)


PARTS = {
    "adapter": ["diffusers", "T2IAdapter"],
    "motion_adapter": ["diffusers", "MotionAdapter"],
    "low_res_scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "bert": ["transformers", "BertModel"],
    "anything": [None, "Something"],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_not_known_is_never_passed_over(
    name: str, tiny_pipelines: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_pipelines / "sd", tmp_path / "sd"))
    _index(**{name: PARTS[name]})(root)
    kind = PARTS[name][1]
    with pytest.raises(BundleError, match=rf"model_index.json: asks for `{name}`, a {kind}, and"):
        open_source(root)
    _index(**{name: [None, None]})(root)
    assert set(open_source(root).signatures) == set(open_source(tiny_pipelines / "sd").signatures)


def test_parts_that_pipelines_draw_without_are_passed_over(
    tiny_pipelines: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_pipelines / "sd", tmp_path / "sd"))
    _index(
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )(root)
    assert open_source(root).fingerprint == open_source(tiny_pipelines / "sd").fingerprint
