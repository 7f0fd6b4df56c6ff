"""A tiny student with random weights, and its bundle, made once per session."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgedistill.bundle import Bundle
from edgedistill.table import Condition, Guidance, SamplerTable

# Threads of one small convolution wait for one another: on a busy machine that takes 300 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here is fetched; a loader that tries fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(["torch", "diffusers", "transformers", "onnx", "export", "quantize"]))
from edgedistill.cli import main
status = main(sys.argv[1:])
assert not any(name.startswith("openvino_telemetry.") for name in sys.modules), "it reports"
sys.exit(status)
"""
CLASSES = 10
KNOWN_KINDS = {"stable-diffusion-v1-5": "sd", "stable-diffusion-xl-base-1.0": "sdxl"}
SHAPE = (1, 8, 8)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def make_network(channels=(8, 16), seed=0):
    """Return a guided UNet whose every input moves its output."""
    import torch
    from diffusers import UNet2DModel

    from edgedistill.models.inputs import Inputs
    from edgedistill.models.unet import ExtendedUNet2DModel

    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=SHAPE[1],
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=CLASSES + 1,
    )
    network = ExtendedUNet2DModel(unet, Inputs({"w": 1000.0}))
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.1)
    return network.eval().requires_grad_(False)


def make_table(num_steps=3, eta=0.5) -> SamplerTable:
    """Return a DDIM table that draws noise on the way."""
    from edgedistill.compiler import compile_scheduler

    return compile_scheduler(
        SCHEDULER,
        num_steps,
        shape=SHAPE,
        eta=eta,
        guidance=Guidance("embedded", "w", 1.5, (1.0, 3.0)),
        conditions=(Condition("class_labels", "class", CLASSES),),
        clamp=(-1.0, 1.0),
    )


def make_student(folder: Path, seed=0, **table):
    """Write a student folder and open it."""
    from edgedistill.models import store
    from edgedistill.student import Student

    network = make_network(seed=seed)
    store.save(network, folder / "unet")
    signatures = {"unet": store.signature(network)}
    Student(folder, "tiny", make_table(**table), signatures, {"method": "none"}).write_manifest()
    return Student.open(folder)


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """A student folder; read it, never write to it."""
    return make_student(tmp_path_factory.mktemp("student") / "tiny")


@pytest.fixture(scope="session")
def other_student(tmp_path_factory):
    """A student with other weights; read it, never write to it."""
    return make_student(tmp_path_factory.mktemp("student") / "other", seed=1)


@pytest.fixture(scope="session")
def bundle(student, tmp_path_factory) -> Bundle:
    """The student's bundle with ONNX and OpenVINO; read it, never write to it."""
    from export.assemble import export_student

    target = tmp_path_factory.mktemp("bundle") / "tiny"
    return export_student(student, target, ["onnx", "openvino"])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def sample_without_torch(tmp_path):
    """Run `edgedistill sample` in a process where whatever a device lacks cannot be imported."""

    def sample(bundle: Bundle, runtime: str) -> np.ndarray:
        arguments = ["sample", bundle.root, "--runtime", runtime, "-n", "4", "--seed", "7"]
        arguments += [
            "--guidance-scale",
            "2",
            "-o",
            tmp_path / "x.png",
            "--npy",
            tmp_path / "x.npy",
        ]
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return np.load(tmp_path / "x.npy")

    return sample


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of random weights, by the names of the known architectures, which they are tiny ones of; and by kind."""
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    import make_tiny_pipeline
    from edgedistill.teacher import ARCHITECTURES

    root = tmp_path_factory.mktemp("pipelines")
    for kind in make_tiny_pipeline.KINDS:
        make_tiny_pipeline.write(kind, root / kind)
    for name, kind in KNOWN_KINDS.items():
        shutil.copytree(root / kind, root / name)
        scheduler = ARCHITECTURES / name / "scheduler"
        shutil.copytree(scheduler, root / name / "scheduler", dirs_exist_ok=True)
    for path in ARCHITECTURES.glob("edm-*"):
        make_tiny_pipeline.tiny_unet(path.name).save_pretrained(root / path.name / "unet")
        shutil.copytree(path / "scheduler", root / path.name / "scheduler")
    return root


@pytest.fixture
def with_small_autoencoder(tiny_pipelines: Path, tmp_path: Path):
    """A Stable Diffusion pipeline of 2 steps with an AutoencoderTiny, the class of TAESD, in the place of its own."""
    import torch
    from diffusers import AutoencoderTiny

    from edgedistill.models.variant import open_variant

    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
    blocks = {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}
    AutoencoderTiny(**widths, **blocks).save_pretrained(tmp_path / "small")
    (tmp_path / "place").mkdir()
    return open_variant(
        tiny_pipelines / "sd", tmp_path / "place", vae=tmp_path / "small", num_steps=2
    )
