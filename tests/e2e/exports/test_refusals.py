"""What cannot be exported is refused in one line, and the old bundle stays."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.errors import ConfigError, ContractError
from edgedistill.models import store
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions


def test_another_students_bundle_is_replaced_only_on_request(
    refusal, snapshot, only_onnx, other_student
):
    before = snapshot(only_onnx)
    command = ["export", "onnx", "-m", other_student.root, only_onnx]
    assert "another student ('tiny'); choose another folder, or give --overwrite" in refusal(
        *command
    )
    assert snapshot(only_onnx) == before
    assert main([*map(str, command), "--overwrite"]) == 0
    assert Bundle.open(only_onnx).fingerprint == other_student.fingerprint


def test_a_damaged_bundle_is_not_added_to(refusal, only_onnx, student):
    weights = only_onnx / "onnx/float32/unet.onnx"
    *rest, last = weights.read_bytes()
    weights.write_bytes(bytes([*rest, last ^ 1]))
    command = ["export", "openvino", "-m", student.root, only_onnx]
    assert "unet.onnx: damaged" in refusal(*command)


def nan_weights(root):
    state = load_file(root / "unet" / store.WEIGHTS)
    state["conv_in.weight"][0] = np.nan
    save_file(state, root / "unet" / store.WEIGHTS)


def pickled_weights(root):
    path = root / "unet" / store.WEIGHTS
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def no_weights(root):
    (root / "unet" / store.WEIGHTS).unlink()


def half_the_weights(root):
    path = root / "unet" / store.WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_manifest(root):
    (root / "student.json").unlink()


def newer_manifest(root):
    path = root / "student.json"
    path.write_text(path.read_text().replace('"schema_version": "1.1"', '"schema_version": "2.0"'))


def other_signature(root):
    path = root / "student.json"
    path.write_text(path.read_text().replace('"timestep"', '"time"'))


def one_bit(root):
    path = root / "unet" / store.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # of the last number's mantissa
    path.write_bytes(data)


def other_numbers(root):
    path = root / "sampler.json"
    data = json.loads(path.read_text())
    data["stages"][0]["rows"][1]["next"]["x0"] += 0.01
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_weights, "`conv_in.weight` holds NaN or infinity"),
        (pickled_weights, "is a pickle, which can run code when it is read"),
        (no_weights, f"{store.WEIGHTS}: no such file"),
        (half_the_weights, "not a whole safetensors file"),
        (no_manifest, "is a ExtendedUNet2DModel; the network that draws is one of UNet2DModel"),
        (newer_manifest, "version 2.0 is newer than 1.1"),
        (other_signature, "its inputs and outputs are not those of the student's manifest"),
        (other_numbers, "row 1: "),
        (one_bit, "damaged: its networks and table do not fit the fingerprint in student.json"),
    ],
)
def test_a_spoilt_student_is_refused_and_the_old_bundle_stays(
    refusal, snapshot, only_onnx, copied, spoil, message
):
    spoil(copied.root)
    before = snapshot(only_onnx.parent)
    command = ["export", "onnx", "-m", copied.root, only_onnx, "--overwrite"]
    assert message in refusal(*command)
    assert snapshot(only_onnx.parent) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onnx", "-m", "STUDENT"], "Name the folder to write once, as BUNDLE or with -o; got 0"),
        (
            ["onnx", "-m", "STUDENT", "B", "-o", "B"],
            "Name the folder to write once, as BUNDLE or with -o; got 2",
        ),
        (["onnx", "B"], "required: -m"),
        (["tflite", "-m", "STUDENT", "B"], "invalid choice: 'tflite'"),
        (["onnx", "-m", "STUDENT", "B", "--dtype", "fp16"], "onnx is written in float32 only"),
        (["onnx", "-m", "STUDENT", "B", "--batch-size", "0"], "`batch` must be 1 or more, got 0"),
        (["onnx", "-m", "STUDENT", "B", "--batch-size", "2", "--dynamic"], "not allowed with"),
        (["onnx", "-m", "STUDENT", "B", "--opset", "3"], "`opset` must lie from 13 to 26, got 3"),
        (["onnx", "-m", "NOWHERE", "B"], "NOWHERE: no such folder; give a student's folder"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    refusal, student, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    named = [str(student.root) if item == "STUDENT" else item for item in arguments]
    assert message in refusal("export", *named)
    assert list(tmp_path.iterdir()) == []


def test_what_will_not_fit_is_refused_before_any_work(
    refusal, student, only_onnx, tmp_path, capsys
):
    limited = ["--max-memory", "100MB"]
    command = ["export", "onnx", "-m", student.root, tmp_path / "b", *limited]
    assert "all networks together, torch-float32: takes about 0.6 GB of memory" in refusal(*command)
    assert not (tmp_path / "b").exists()
    # Of the reference and ONNX nothing is to be written.
    assert main(["export", "onnx", "-m", str(student.root), str(only_onnx), *limited]) == 0
    capsys.readouterr()
    command = ["export", "openvino", "-m", student.root, only_onnx, *limited]
    assert "unet, openvino-float32: takes about 0.6 GB of memory" in refusal(*command)


def test_what_cannot_be_exported_is_refused(student, copied, tmp_path):
    with pytest.raises(ConfigError, match="Unknown format 'tflite': choose one of onnx, openvino"):
        export_student(student, tmp_path / "b", ["tflite"])
    with pytest.raises(ConfigError, match="`dtype` must be one of float32, float16, got 'int8'"):
        ExportOptions(dtype="int8")
    manifest = copied.root / "student.json"
    manifest.write_text(manifest.read_text().replace('"unet": {', '"other": {'))
    with pytest.raises(
        ContractError, match="calls network 'unet', but the student holds only: oth"
    ):
        export_student(Student.open(copied.root), tmp_path / "b", ["onnx"])
    assert not (tmp_path / "b").exists()
