"""A small bundle whose files hold their own names, and what is done to bundles."""

import json
from types import SimpleNamespace

import pytest

from edgedistill import drafts
from edgedistill.bundle import Artifact, Bundle, NetworkFile
from edgedistill.contract import Signature, TensorSpec
from edgedistill.drafts import write_bundle
from edgedistill.files import write_json
from edgedistill.manifest import MANIFEST, seal
from edgedistill.table import Row, SamplerTable, Stage

SIGNATURE = Signature(
    (TensorSpec("sample", ("batch", 1, 2, 2), "float32", "x"),),
    (TensorSpec("out_sample", ("batch", 1, 2, 2), "float32", "raw"),),
)
FILES = [
    "onnx/float32/unet.onnx",
    "onnx/float32/unet.onnx_data",
    "probes/golden.safetensors",
    "sampler.json",
    "torch/float32/unet/config.json",
    "torch/float32/unet/diffusion_pytorch_model.safetensors",
]


def artifact(form: str, path: str) -> Artifact:
    return Artifact(
        f"{form}-float32",
        {"onnx": "onnxruntime"}.get(form, form),
        form,
        "float32",
        {"unet": NetworkFile(path, SIGNATURE)},
        {"options": {"batch": 1}},
    )


def fill(draft: drafts.Draft) -> None:
    for name in FILES:
        if name != "sampler.json":
            (draft.root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.root / name).write_text(name)
    draft.add(artifact("torch", "torch/float32/unet"))
    draft.add(artifact("onnx", "onnx/float32/unet.onnx"))


def reseal(root, change) -> None:
    """Change the manifest as someone would who knows how it is sealed."""
    data = json.loads((root / MANIFEST).read_text())
    change(data)
    write_json(root / MANIFEST, {**data, "seal": seal(data)})


def snapshot(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def parts() -> SimpleNamespace:
    """What small bundles are made of and changed with."""
    return SimpleNamespace(
        files=FILES,
        signature=SIGNATURE,
        artifact=artifact,
        fill=fill,
        reseal=reseal,
        snapshot=snapshot,
    )


@pytest.fixture(params=FILES)
def listed(request: pytest.FixtureRequest) -> str:
    """Every file of a small bundle, one after another."""
    return request.param


@pytest.fixture
def small(tmp_path) -> Bundle:
    table = SamplerTable((Stage((1, 2, 2), (Row(("unet",), x0=(0.0, 1.0)),)),), noise_count=1)
    base = Bundle(tmp_path, "small", "f" * 64, table, {}, {"method": "none"})
    return write_bundle(tmp_path / "small", base, fill)


@pytest.fixture(params=[*FILES, MANIFEST])
def listed_or_manifest(request: pytest.FixtureRequest) -> str:
    """The same and the manifest itself."""
    return request.param
