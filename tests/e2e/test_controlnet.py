"""Pipelines with a ControlNet: what is exported draws what diffusers' pipeline draws, on every runtime."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import edgedistill
from edgedistill.agreement import snr_db
from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.errors import BundleError, ConfigError, ContractError
from edgedistill.layout.checking import check_layout
from edgedistill.layout.graphs import read_graph
from edgedistill.models.run import sample_torch
from edgedistill.models.source import open_network, open_source
from edgedistill.models.variant import open_variant
from edgedistill.noise import noise_bank
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions
from export.single_root import resized
from runtimes.verify import verify

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
    pipeline = DiffusionPipeline.from_pretrained(root)
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


@pytest.fixture(scope="module")
def single(root: Path, tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single root of another pipeline, which got the ControlNet."""
    made = tmp_path_factory.mktemp("single") / "root"
    asked = ["--controlnet", str(root / "controlnet"), "--controlnet-conditioning-scale", "0.6"]
    asked += ["--num-inference-steps", str(STEPS), "--guidance-scale", "5"]
    assert main(["export", "all", "-m", str(tiny_pipelines / "sd"), str(made), *asked]) == 0
    return made


@pytest.fixture(scope="module")
def wanted(root: Path) -> np.ndarray:
    """What diffusers draws with it."""
    return expected(root, 5.0, 0.6, pictures())


def ours(bundle: Path, **chosen: str) -> np.ndarray:
    """Return what a bundle draws."""
    pipeline = edgedistill.load(bundle, **chosen)
    return pipeline(noise=[noise().numpy()], prompt=PROMPTS, image=pictures()).array


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_every_runtime_draws_what_diffusers_draws(
    runtime: str, single: Path, wanted: np.ndarray
) -> None:
    np.testing.assert_allclose(ours(single, runtime=runtime), wanted, atol=1e-4)
    with pytest.raises(ContractError, match="`image` is missing; give images of 3x16x16"):
        edgedistill.load(single, runtime)(1)


@pytest.mark.slow
def test_diffusers_opens_the_single_root_and_its_scale_lies_in_it(
    single: Path, wanted: np.ndarray
) -> None:
    assert Bundle.open(single).provenance["conditioning_scale"] == 0.6
    pipeline = DiffusionPipeline.from_pretrained(single)
    assert type(pipeline).__name__ == "StableDiffusionControlNetPipeline"
    np.testing.assert_allclose(expected(single, 5.0, 1.0, pictures()), wanted, atol=1e-4)


@pytest.mark.slow
def test_apples_packages_are_those_of_a_controlnet(single: Path, wanted: np.ndarray) -> None:
    assert snr_db(wanted, ours(single, runtime="coreml")) >= 45.0
    packages = single / "coreml/packages"
    parts = ("control-unet", "text_encoder", "vae_decoder", "vae_encoder")
    names = {f"Stable_Diffusion_version_sd_{part}.mlpackage" for part in parts}
    assert {path.name for path in packages.iterdir()} == {*names, "ControlNet_control.mlpackage"}
    script = (single / "coreml/compile_on_mac.sh").read_text(encoding="utf-8")
    assert "compile ControlNet_control controlnet/Control" in script
    side = read_graph(packages / "ControlNet_control.mlpackage")
    unet = read_graph(packages / "Stable_Diffusion_version_sd_control-unet.mlpackage")
    shared = ["sample", "timestep", "encoder_hidden_states"]
    assert [item.name for item in side.inputs] == [*shared, "controlnet_cond"]
    assert [item.name for item in unet.outputs] == ["noise_pred"]
    residuals = [f"additional_residual_{i}" for i in range(5)]
    assert [item.name for item in unet.inputs] == [*shared, *residuals]
    assert {item.name: item for item in unet.inputs[3:]} == {
        item.name: item for item in side.outputs
    }
    assert {item.shape[0] for item in (*side.inputs, *unet.inputs)} == {2}


@pytest.mark.slow
def test_apples_packages_reach_their_floors_and_rounding_is_taken_for_no_response(
    single: Path,
) -> None:
    report = verify([Bundle.open(single)], runtimes=["coreml"])
    assert report.failures == ()
    assert [item.sampler for item in report.artifacts] == ["default", "swift"]
    # Random weights hardly hear a prompt.
    assert all("input_ids" in item.faint for item in report.artifacts)


@pytest.mark.slow
def test_loaders_that_have_no_controlnets_are_named(single: Path) -> None:
    errors = [item for item in check_layout(single) if item.level == "error"]
    assert [item.loader for item in errors] == ["ort", "openvino", "genai"]
    assert {item.found for item in errors} == {"'StableDiffusionControlNetPipeline'"}


@pytest.mark.slow
def test_it_is_one_graph(root: Path, tmp_path: Path) -> None:
    asked = ["--num-inference-steps", str(STEPS), "--single-graph"]
    assert main(["export", "onnx", "-m", str(root), str(tmp_path / "out"), *asked]) == 0
    made = ours(tmp_path / "out", artifact="onnx-float32-graph")
    np.testing.assert_allclose(made, expected(root, 1.0, 1.0, pictures()), atol=1e-4)


@pytest.mark.slow
def test_plain_bundles_of_stable_diffusion_xl(tiny_pipelines: Path, tmp_path: Path) -> None:
    source = tiny_pipelines / "sdxl-controlnet"
    asked = ["--num-inference-steps", str(STEPS), "--guidance-scale", "5", "--dtype", "fp32"]
    for name in ("openvino", "coreml"):
        layout = ["--layout", "bundle"]
        assert main(["export", name, "-m", str(source), str(tmp_path), *asked, *layout]) == 0
    wanted = expected(source, 5.0, 1.0, pictures())
    assert np.abs(expected(source, 5.0, 1.0, 1 - pictures()) - wanted).max() > 0.02
    for runtime in ("openvino", "coreml"):
        np.testing.assert_allclose(ours(tmp_path, runtime=runtime), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "form", "further", "message"),
    [
        ("sdxl-controlnet", "coreml", [], "Apple's package has no ControlNets for Stable"),
        ("controlnet", "onnx", ["--dynamic"], "a ControlNet is exported at one size"),
    ],
)
def test_what_no_loader_could_run_is_refused_by_name(
    kind: str,
    form: str,
    further: list[str],
    message: str,
    tiny_pipelines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out"
    assert main(["export", form, "-m", str(tiny_pipelines / kind), str(target), *further]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_it_is_sampled_by_command(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "out"
    asked = ["--num-inference-steps", str(STEPS), "--guidance-scale", "5"]
    assert main(["export", "onnx", "-m", str(root), str(bundle), *asked]) == 0
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


@pytest.mark.slow
def test_another_size(root: Path, tmp_path: Path) -> None:
    student = resized(open_source(root, num_steps=STEPS, guidance_scale=5.0), 24, 40)
    options = ExportOptions(layout="single-root")
    bundle = export_student(student, tmp_path / "root", ["onnx"], options)
    image = np.random.default_rng(0).random((1, 3, 24, 40), dtype=np.float32)
    start = noise_bank(bundle.table, [0])
    pipeline = DiffusionPipeline.from_pretrained(bundle.root)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 5.0, "num_inference_steps": STEPS, "output_type": "np"}
    first = {"image": torch.from_numpy(image), "latents": torch.from_numpy(start[0])}
    wanted = pipeline(PROMPTS[0], **first, **settings).images.transpose(0, 3, 1, 2) * 2 - 1
    made = edgedistill.load(bundle, "onnxruntime")(prompt=PROMPTS[0], noise=start, image=image)
    np.testing.assert_allclose(made.array, wanted, atol=1e-4)


def test_a_scale_needs_a_controlnet(tiny_pipelines: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a finite number for a ControlNet, got 0.5"):
        open_variant(tiny_pipelines / "sd", tmp_path, conditioning_scale=0.5)


def test_a_pipeline_of_pixels_takes_none(root: Path, tiny_pipelines: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_pipelines / "class", tmp_path / "class"))
    shutil.copytree(root / "controlnet", other / "controlnet")
    with pytest.raises(BundleError, match="is for a UNet2DConditionModel, and unet/ is none"):
        open_source(other)
