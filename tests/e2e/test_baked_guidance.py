"""`edgedistill export --guidance-scale`: guidance that is an input becomes weights of a stock network."""

import numpy as np
import pytest
from diffusers import UNet2DModel

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.models import store
from edgedistill.table import Guidance
from export.assemble import export_student


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
