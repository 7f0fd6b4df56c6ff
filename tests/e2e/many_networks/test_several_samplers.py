"""A bundle of one network with three samplers: 4 steps, 2, and 1."""

import shutil

import numpy as np
import pytest
from PIL import Image

import edgedistill
from edgedistill.bundle import CALIBRATION, Bundle
from edgedistill.cli import main
from edgedistill.errors import BundleError, ConfigError, ContractError
from edgedistill.probes import load_probes
from export.assemble import export_student
from runtimes.verify import verify


@pytest.fixture(scope="module")
def several(build, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("several")
    return export_student(build("several", folder / "student"), folder / "bundle", ["onnx"])


def test_samplers_are_chosen_by_name(several):
    assert list(several.samplers) == ["default", "1-step", "2-step"]
    assert Bundle.open(several.root).samplers == several.samplers
    pipeline = edgedistill.load(several, "onnxruntime")
    rows = []
    pipeline(1, sampler="2-step", observe=lambda trace: rows.append(trace.index))
    assert rows == [0, 1]
    assert np.array_equal(pipeline(2).array, pipeline(2, sampler="default").array)
    with pytest.raises(ConfigError, match="No sampler '3-step'; there is: default, 1-step, 2-step"):
        pipeline(1, sampler="3-step")


def test_parity_has_a_line_per_artifact_and_sampler(several, capsys):
    assert main(["parity", str(several.root)]) == 0
    shown = capsys.readouterr().out
    for name in ("torch-float32", "onnx-float32"):
        assert all(f"\n{name}{rest} " in shown for rest in ("", ", 1-step", ", 2-step"))
    report = verify([several])
    assert [len(item.rows) for item in report.artifacts] == [4, 1, 2] * 2
    assert report.failures == ()


def test_calibration_meets_the_rows_of_every_sampler(several):
    probes = load_probes(several.path(CALIBRATION))
    times = {row.feeds["timestep"] for table in several.samplers.values() for row in table.rows}
    assert set(np.unique(probes["unet.timestep"])) == times
    assert len(probes["unet.timestep"]) == 7 * 32


def test_the_command_line_chooses_a_sampler_and_edits(several, tmp_path, capsys):
    pipeline = edgedistill.load(several, "onnxruntime")
    picture, mask = tmp_path / "three.png", tmp_path / "mask.png"
    pipeline(1, class_labels=3).images[0].save(picture)
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save(mask)
    array = tmp_path / "x.npy"
    common = [
        "sample",
        str(several.root),
        "--runtime",
        "onnxruntime",
        "-n",
        "2",
        "-o",
        str(tmp_path / "x.png"),
        "--npy",
        str(array),
    ]
    assert main([*common, "--sampler", "1-step", "--json"]) == 0
    assert '"nfe": 1' in capsys.readouterr().out
    assert np.array_equal(np.load(array), pipeline(2, sampler="1-step").array)
    with Image.open(picture) as opened:
        wanted = pipeline(2, image=opened, strength=0.5, class_labels=[8, 8]).array
    edit = ["--image", str(picture), "--class", "8"]
    assert main([*common, *edit, "--strength", "0.5"]) == 0
    assert np.array_equal(np.load(array), wanted)
    assert main([*common, *edit, "--mask", str(mask)]) == 0
    kept = np.load(array)[..., :4]
    known = pipeline(1, class_labels=3).array[..., :4]
    assert np.abs(kept - known).max() <= 1 / 255 + 1e-6
    assert main([*common, *edit]) == 2
    assert "say with `strength` how far to go" in capsys.readouterr().err


def test_pictures_that_do_not_fit_are_refused(several):
    pipeline = edgedistill.load(several, "onnxruntime")
    with pytest.raises(
        ContractError, match="`image` must be 1x1x8x8, got 1x1x9x9; images are not re"
    ):
        pipeline(image=np.zeros((1, 9, 9)), strength=0.5)
    with pytest.raises(ContractError, match=r"`image` must lie in \[-1, 1\]"):
        pipeline(image=np.full((1, 8, 8), 255), strength=0.5)
    with pytest.raises(ContractError, match="`image` is missing"):
        pipeline(mask=np.ones((1, 8, 8)))
    with pytest.raises(ContractError, match="Unknown condition picture"):
        pipeline(picture=np.ones((1, 8, 8)))


def test_a_changed_sampler_is_damage(several, tmp_path):
    root = shutil.copytree(several.root, tmp_path / "bundle")
    path = root / "samplers" / "1-step.json"
    path.write_text(path.read_text().replace("1-step", "2-step") + " ")
    with pytest.raises(BundleError, match=r"1-step\.json: damaged"):
        Bundle.open(root)
