"""`edgedistill export --guidance-scale`: guidance that is an input becomes weights of a stock network."""

import importlib.util
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DModel

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.models import store
from edgedistill.table import Guidance
from export.assemble import export_student
from export.bake import Baking

REFUSED: dict[str, tuple[str, list[str], str]] = {
    "an unknown network": ("onnx", ["--networks", "decoder"], "decoder"),
    "a layout that loaders do not know": ("onnx", ["--layout", "single-root"], "loaders know no"),
    "a system that is not known": ("coreml", ["--min-deployment-target", "iOS3"], "iOS3"),
    "memory that is not allowed": ("onnx", ["--max-memory", "1MB"], "--max-memory"),
    "an unknown sampler": ("onnx", ["--single-graph", "--sampler", "other"], "other"),
    "a scale that was not trained for": ("onnx", ["--guidance-scale", "9"], "trained range"),
}


@pytest.fixture
def bundle_of_student(student, tmp_path) -> Bundle:
    return export_student(student, tmp_path / "embedded", ["onnx"])


def test_baked_guidance_is_the_embedded_one_and_a_stock_network(
    student, bundle_of_student, tmp_path, capsys
):
    target = tmp_path / "baked"
    command = ["export", "onnx", "-m", str(student.root), str(target), "--guidance-scale", "2.5"]
    assert main(command) == 0
    baked = Bundle.open(target)
    assert baked.table.guidance == Guidance("baked", default=2.5, range=(2.5, 2.5))
    network = UNet2DModel.from_pretrained(baked.path("torch/float32/unet"))
    assert type(network) is UNet2DModel
    assert [spec.name for spec in store.signature(network).inputs] == [
        "sample",
        "timestep",
        "class_labels",
    ]
    made = edgedistill.load(baked, "onnxruntime")(4, seed=1).array
    wanted = edgedistill.load(bundle_of_student, "onnxruntime")(4, seed=1, guidance_scale=2.5).array
    assert np.abs(made - wanted).max() < 1e-5
    assert main(command) == 0
    assert main([*command[:-1], "9"]) == 2
    assert "must lie in the trained range [1, 3], got 9" in capsys.readouterr().err
    assert main(["export", "onnx", "-m", str(student.root), str(target)]) == 2
    assert "holds a bundle of another student" in capsys.readouterr().err


@pytest.fixture
def never_baked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the work begins."""

    def merge(_: Baking) -> None:
        pytest.fail("it bakes before it refuses")

    monkeypatch.setattr(Baking, "merge", merge)


@pytest.mark.usefixtures("never_baked")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_exported_is_refused_before_guidance_is_baked(
    student, reason: str, tmp_path, capsys
) -> None:
    form, words, told = REFUSED[reason]
    command = ["export", form, "-m", str(student.root), str(tmp_path / "baked")]
    assert main([*command, "--guidance-scale", "2.5", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "baked").exists()


@pytest.mark.usefixtures("never_baked")
@pytest.mark.parametrize(
    ("form", "module", "more"),
    [
        ("onnx", "onnx", []),
        ("onnx", "onnxruntime", []),
        ("onnx", "onnxscript", ["--dynamo"]),
        ("openvino", "openvino", []),
        ("coreml", "coremltools", []),
    ],
)
def test_a_missing_package_is_named_before_guidance_is_baked(
    student, form: str, module: str, more: list[str], tmp_path, monkeypatch, capsys
) -> None:
    found = importlib.util.find_spec
    lacking: Any = lambda name, *rest: None if name == module else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    command = ["export", form, "-m", str(student.root), str(tmp_path / "baked"), *more]
    assert main([*command, "--guidance-scale", "2.5"]) == 2
    assert f"`{module}` is not installed; run: pip install" in capsys.readouterr().err


@pytest.mark.usefixtures("never_baked")
def test_a_bundle_of_another_student_is_refused_before_guidance_is_baked(
    student, bundle_of_student, capsys
) -> None:
    command = ["export", "onnx", "-m", str(student.root), str(bundle_of_student.root)]
    assert main([*command, "--guidance-scale", "2.5"]) == 2
    assert "another student" in capsys.readouterr().err
