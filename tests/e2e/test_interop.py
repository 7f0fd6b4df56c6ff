"""What is exported opens in the loaders of others and answers there as it does here.

optimum's generic loaders want a folder of ``model.onnx`` or ``openvino_model.xml`` beside the ``config.json`` of some
transformers model, of which they read the type alone. optimum-intel's needs ``dynamic_shapes=False``: without it, it
frees the second axis of every input, and timestep, class and guidance weight have one axis only.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgedistill.agreement import snr_db
from edgedistill.bundle import Bundle
from edgedistill.contract import Feeds
from edgedistill.pipeline import Pipeline
from edgedistill.probes import load_probes

pytestmark = [
    # Both are the loaders' own: torch.jit.script where optimum is imported, "\." in a pattern of optimum-intel.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]
LEAST_DB = 100.0


@pytest.fixture
def feeds(bundle) -> Feeds:
    """One sample in the middle of the table, guidance and class included."""
    probes = load_probes(bundle.path("probes/calibration.safetensors"))
    return {name.removeprefix("unet."): value[40:41] for name, value in probes.items()}


def answer(bundle: Bundle, artifact: str, feeds: Feeds) -> np.ndarray:
    return Pipeline(bundle, bundle.artifacts[artifact]).networks["unet"](feeds)["out_sample"]


def foreign_folder(bundle: Bundle, artifact: str, folder: Path, stem: str) -> Path:
    """Lay an artifact's files out as optimum wants them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    graph = bundle.path(bundle.artifacts[artifact].networks["unet"].path)
    for part in graph.parent.glob("unet.*"):
        shutil.copy(part, folder / f"{stem}{part.suffix}")
    return folder


def test_the_onnx_file_opens_in_optimum(bundle, feeds, tmp_path):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra `interop`")
    folder = foreign_folder(bundle, "onnx-float32", tmp_path / "model", "model")
    there = optimum.ORTModelForCustomTasks.from_pretrained(folder)(**feeds)
    assert list(there) == ["out_sample"]
    assert snr_db(answer(bundle, "onnx-float32", feeds), there["out_sample"]) >= LEAST_DB


def test_the_openvino_model_opens_in_optimum_intel(bundle, feeds, tmp_path):
    optimum = pytest.importorskip("optimum.intel", reason="needs the extra `interop`")
    folder = foreign_folder(bundle, "openvino-float32", tmp_path / "model", "openvino_model")
    there = optimum.OVModelForCustomTasks.from_pretrained(
        folder,
        export=False,
        dynamic_shapes=False,
        ov_config={"INFERENCE_PRECISION_HINT": "f32"},
    )(**feeds)
    assert list(there) == ["out_sample"]
    assert snr_db(answer(bundle, "openvino-float32", feeds), there["out_sample"]) >= LEAST_DB


def test_a_student_with_baked_guidance_opens_in_diffusers(student, feeds, tmp_path):
    import torch
    from diffusers import UNet2DModel

    from edgedistill.models import store
    from edgedistill.models.unet import bake_guidance

    guided = store.load(student.root / "unet")
    w = float(feeds["w"][0])
    store.save(bake_guidance(guided, w), tmp_path / "unet")
    there = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with torch.no_grad():
        wanted = store.call(guided, inputs).numpy()
        del inputs["w"]
        got = store.call(there, inputs).numpy()
    assert w > 0
    assert snr_db(wanted, got) >= LEAST_DB
