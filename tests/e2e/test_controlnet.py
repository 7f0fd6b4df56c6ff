"""Pipelines with a ControlNet: what is exported draws what diffusers' pipeline draws, on every runtime."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.errors import BundleError, ConfigError, ContractError
from edgedistill.models.run import sample_torch
from edgedistill.models.source import open_network, open_source
from edgedistill.models.variant import open_variant
from edgedistill.student import Student
from export.single_root import resized

# diffusers 0.39 converts tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS = ["a photo of the cat", "a ship in the rain"]
SHAPE = (3, 16, 16)
STEPS = 2


@pytest.fixture(scope="module")
def root(tiny_pipelines: Path) -> Path:
    """A pipeline with a ControlNet, as diffusers writes it."""
    return tiny_pipelines / "controlnet"


def pictures() -> np.ndarray:
    """Return two control pictures in [0, 1]."""
    return np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)


def noise() -> torch.Tensor:
    """Return the first states."""
    return torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))


def expected(root: Path, guidance: float, scale: float, given: np.ndarray) -> np.ndarray:
    """Return what diffusers' pipeline draws, (2, channels, height, width) in [-1, 1]."""
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(root)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt=PROMPTS,
        image=torch.from_numpy(given),
        guidance_scale=guidance,
        controlnet_conditioning_scale=scale,
        num_inference_steps=STEPS,
        latents=noise(),
        output_type="np",
    ).images
    return made.transpose(0, 3, 1, 2) * 2 - 1


def drawn(student: Student, given: np.ndarray) -> np.ndarray:
    """Return what a student's table draws in PyTorch."""
    modules = {name: open_network(student, name) for name in student.table.networks}
    return sample_torch(
        modules,
        student.table,
        2,
        noise=[noise().numpy()],
        tokenize=student.tokenize,
        encoder_hidden_states=PROMPTS,
        image=given,
    )


@pytest.mark.parametrize(("guidance", "scale"), [(1.0, 1.0), (5.0, 0.6)])
def test_it_draws_what_diffusers_draws(
    guidance: float, scale: float, root: Path, tmp_path: Path
) -> None:
    student = open_variant(
        root, tmp_path, conditioning_scale=scale, num_steps=STEPS, guidance_scale=guidance
    )
    assert [row.call for row in student.table.rows] == [("controlnet", "unet")] * STEPS
    assert student.provenance["conditioning_scale"] == scale
    wanted = expected(root, guidance, scale, pictures())
    np.testing.assert_allclose(drawn(student, pictures()), wanted, atol=1e-4)
    assert np.abs(expected(root, guidance, scale, 1 - pictures()) - wanted).max() > 0.02
    assert np.abs(expected(root, guidance, 0.0, pictures()) - wanted).max() > 0.02


def test_it_is_exported_beside_another_pipeline_and_sampled_by_command(
    root: Path, tiny_pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "out"
    asked = ["--controlnet", str(root / "controlnet"), "--controlnet-conditioning-scale", "0.6"]
    asked += ["--num-inference-steps", str(STEPS), "--guidance-scale", "5"]
    source = str(tiny_pipelines / "sd")
    assert main(["export", "onnx", "-m", source, str(bundle), *asked]) == 0
    assert Bundle.open(bundle).provenance["conditioning_scale"] == 0.6
    wanted = expected(root, 5.0, 0.6, pictures())
    bank = [noise().numpy()]
    for runtime in ("torch", "onnxruntime"):
        pipeline = edgedistill.load(bundle, runtime)
        made = pipeline(noise=bank, prompt=PROMPTS, image=pictures())
        np.testing.assert_allclose(made.array, wanted, atol=1e-4)
        with pytest.raises(ContractError, match="`image` is missing; give images of 3x16x16"):
            pipeline(1)
    picture = (pictures()[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "edges.png")
    asked = ["--image", str(tmp_path / "edges.png"), "-o", str(tmp_path / "a.png"), "-n", "1"]
    asked += ["--npy", str(tmp_path / "a.npy"), "--runtime", "onnxruntime", "--prompt", PROMPTS[0]]
    capsys.readouterr()
    assert main(["sample", str(bundle), "--json", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1
    same = edgedistill.load(bundle, "onnxruntime")(
        1, seed=0, prompt=PROMPTS[0], image=picture.transpose(2, 0, 1) / np.float32(255)
    )
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), same.array, atol=1e-5)


def _changed(root: Path, place: Path, **values: object) -> Path:
    copied = Path(shutil.copytree(root, place))
    path = copied / "controlnet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return copied


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "controlnet: is a ControlNetUnionModel"),
        ({"global_pool_conditions": True}, "`global_pool_conditions` .* not known here"),
        ({"in_channels": 9}, "for another network: its `sample` is .*9, 8, 8"),
        ({"block_out_channels": [8, 8]}, "for another network: its `residual_3` is"),
        ({"layers_per_block": 2}, "for another network: its `residual_2` is"),
        ({"cross_attention_dim": 24}, "for another network: its `encoder_hidden_states` is"),
    ],
)
def test_what_is_for_another_network_is_refused_by_name(
    values: dict[str, object], message: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        open_source(_changed(root, tmp_path / "other", **values))


def test_another_size_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="a ControlNet is exported at the size"):
        resized(open_source(root), 32, 32)


def test_a_scale_needs_a_controlnet(tiny_pipelines: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a finite number for a ControlNet, got 0.5"):
        open_variant(tiny_pipelines / "sd", tmp_path, conditioning_scale=0.5)


def test_a_pipeline_of_pixels_takes_none(root: Path, tiny_pipelines: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_pipelines / "class", tmp_path / "class"))
    shutil.copytree(root / "controlnet", other / "controlnet")
    with pytest.raises(BundleError, match="is for a UNet2DConditionModel, and unet/ is none"):
        open_source(other)
