"""An export that fails, strays or is killed leaves what was whole."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.errors import CheckFailedError
from export.assemble import export_student
from export.formats import ExportOptions


def test_a_full_disk_leaves_the_old_bundle(refusal, snapshot, only_onnx, student, monkeypatch):
    before = snapshot(only_onnx.parent)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copy2", full)
    command = ["export", "onnx", "-m", student.root, only_onnx, "--overwrite"]
    assert "bundle: cannot be written (No space left on device); free some" in refusal(*command)
    assert snapshot(only_onnx.parent) == before


def stray(*_arguments):
    msg = "unet.xml: 12.0 dB SNR against PyTorch."
    raise CheckFailedError(msg)


def test_a_graph_that_strays_is_status_1_and_leaves_the_old_bundle(
    snapshot, only_onnx, student, capsys, monkeypatch
):
    before = snapshot(only_onnx.parent)

    monkeypatch.setattr("export.to_openvino.check_file", stray)
    assert main(["export", "openvino", "-m", str(student.root), str(only_onnx)]) == 1
    assert "12.0 dB" in capsys.readouterr().err
    assert snapshot(only_onnx.parent) == before
    assert [path.name for path in only_onnx.parent.iterdir()] == ["bundle"]


KILLED = """
import os, signal, sys
from export import to_openvino
to_openvino.check_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from edgedistill.cli import main
main(sys.argv[1:])
"""


def test_a_killed_export_leaves_the_old_bundle_and_can_be_run_again(snapshot, only_onnx, student):
    before = snapshot(only_onnx)
    command = ["export", "openvino", "-m", str(student.root), str(only_onnx)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command], capture_output=True, check=False
    )
    assert killed.returncode == -9
    assert len(list(only_onnx.parent.iterdir())) == 2
    assert snapshot(only_onnx) == before
    assert Bundle.open(only_onnx).name == "tiny"
    assert main(command) == 0
    assert [path.name for path in only_onnx.parent.iterdir()] == ["bundle"]
    assert "openvino-float16" in Bundle.open(only_onnx).artifacts


HALF = KILLED.replace(
    "lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "lambda *told, check=to_openvino.check_file, seen=[]: (seen.append(told), check(*told))[1] "
    "if not seen else os.kill(os.getpid(), signal.SIGKILL)",
)


def test_what_was_finished_before_a_kill_is_there_and_not_written_again(student, tmp_path):
    target = tmp_path / "work" / "bundle"
    command = ["export", "openvino", "-m", str(student.root), str(target)]
    killed = subprocess.run(
        [sys.executable, "-c", HALF, *command], capture_output=True, check=False
    )
    assert killed.returncode == -9
    assert list(Bundle.open(target).artifacts) == ["torch-float32", "openvino-float32"]
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*.*") if path.is_file()}
    assert main(command) == 0
    assert list(Bundle.open(target).artifacts)[2:] == ["openvino-float16"]
    kept = {path for path in before if path.suffix in (".xml", ".bin", ".safetensors")}
    assert len(kept) >= 4
    assert {path: path.stat().st_mtime_ns for path in kept} == {path: before[path] for path in kept}
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_what_strays_leaves_what_was_finished_before_it(student, tmp_path, monkeypatch):
    monkeypatch.setattr("export.to_openvino.check_file", stray)
    seen = []
    with pytest.raises(CheckFailedError):
        export_student(
            student, tmp_path / "b", ["onnx", "openvino"], None, lambda *what: seen.append(what)
        )
    assert list(Bundle.open(tmp_path / "b").artifacts) == ["torch-float32", "onnx-float32"]
    assert seen[-1] == ("openvino-float32", 2, 4)


def test_what_is_written_anew_stays_as_it_was_until_then(only_onnx, student, monkeypatch):
    monkeypatch.setattr("export.to_onnx.check_file", stray)
    before = (only_onnx / "onnx/float32/unet.onnx").read_bytes()
    with pytest.raises(CheckFailedError):
        export_student(student, only_onnx, ["openvino", "onnx"], ExportOptions(batch=4))
    held = Bundle.open(only_onnx).artifacts
    assert {*held} == {"torch-float32", "onnx-float32", "openvino-float32", "openvino-float16"}
    assert held["onnx-float32"].made_with["options"]["batch"] == 1
    assert (only_onnx / "onnx/float32/unet.onnx").read_bytes() == before
