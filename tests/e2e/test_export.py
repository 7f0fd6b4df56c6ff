"""`edgedistill export`: a student becomes a bundle, artifact by artifact, each whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgedistill.bundle import CALIBRATION, GOLDEN, Bundle
from edgedistill.cli import main
from edgedistill.errors import CheckFailedError, ConfigError, ContractError
from edgedistill.models import store
from edgedistill.parity import floor_of
from edgedistill.probes import GOLDEN_SAMPLES, load_probes
from edgedistill.student import Student
from export import assemble, budget, reference
from export.assemble import export_student
from export.formats import FORMATS, ExportOptions
from runtimes import torch_reference


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def copied(student, tmp_path) -> Student:
    """A student that a test may spoil."""
    return Student.open(shutil.copytree(student.root, tmp_path / "student"))


@pytest.fixture
def only_onnx(bundle, tmp_path) -> Path:
    """A bundle with ONNX alone, that a test may change."""
    target = tmp_path / "work" / "bundle"
    keep = ["torch-float32", "onnx-float32"]
    return assemble.write_bundle(target, bundle, lambda _: None, keep).root


def refusal(capsys, *arguments) -> str:
    """Run a command that must be refused in one line, with status 2."""
    assert main([str(item) for item in arguments]) == 2
    message = capsys.readouterr().err.strip().split("\r")[-1]
    assert message.startswith("edgedistill: ")
    assert "\n" not in message
    return message


def test_a_bundle_holds_the_reference_and_one_artifact_per_precision(bundle, student):
    assert list(bundle.artifacts) == [
        "torch-float32",
        "onnx-float32",
        "openvino-float32",
        "openvino-float16",
    ]
    assert bundle.fingerprint == student.fingerprint
    assert bundle.table == student.table
    reference = bundle.path(bundle.artifacts["torch-float32"].networks["unet"].path)
    assert snapshot(reference) == snapshot(student.root / "unet")
    for name, artifact in list(bundle.artifacts.items())[1:]:
        assert artifact.networks["unet"].signature == student.signatures["unet"].with_batch(1), name
        assert artifact.made_with["snr_db"] >= floor_of(artifact.precision).raw


def test_the_manifest_does_not_tell_where_it_was_made(bundle, student):
    manifest = (bundle.root / "edgedistill.json").read_text()
    for trace in (sys.prefix, str(student.root.parent), str(bundle.root), "/tmp/"):
        assert trace not in manifest


def test_golden_samples_replay_on_the_reference_and_cover_the_conditions(bundle):
    golden = load_probes(bundle.path(GOLDEN))
    np.testing.assert_array_equal(golden["condition.class_labels"], [0, 1, 2, 3, 1, 1, 3, 3])
    np.testing.assert_allclose(golden["condition.w"], [0.5, 0.5, 0.5, 0.5, 0.5, 2, 0.5, 2])
    np.testing.assert_array_equal(golden["noise.0"][:4], golden["noise.0"][4:])
    for row, spec in enumerate(bundle.table.rows):
        state, raw, x0, after = (
            golden[f"row.{row}.{k}"].astype(np.float64) for k in ("state", "raw", "x0", "next")
        )
        np.testing.assert_allclose(x0, spec.x0[0] * state + spec.x0[1] * raw, atol=1e-5)
        noise = 0 if spec.noise is None else spec.next.noise * golden[f"noise.{spec.noise}"]
        expected = spec.next.z * state + spec.next.x0 * x0 + spec.next.raw * raw + noise
        np.testing.assert_allclose(after, expected, atol=1e-5)
    np.testing.assert_array_equal(golden["output"], golden["row.2.next"].clip(-1, 1))


def test_calibration_is_what_the_network_is_fed_on_other_seeds(bundle, student):
    calibration, golden = (load_probes(bundle.path(name)) for name in (CALIBRATION, GOLDEN))
    rows, samples = len(bundle.table.rows), len(reference.CALIBRATION_SEEDS)
    assert {name: value.dtype.name for name, value in calibration.items()} == {
        f"unet.{spec.name}": spec.dtype for spec in student.signatures["unet"].inputs
    }
    assert {len(value) for value in calibration.values()} == {rows * samples}
    np.testing.assert_array_equal(calibration["unet.timestep"], np.repeat([999, 666, 332], samples))
    assert set(calibration["unet.class_labels"]) == set(range(10))
    w = calibration["unet.w"][:samples]
    assert (w[0], w[-1]) == (0, 2)
    assert (np.diff(w) > 0).all()
    assert not {*reference.CALIBRATION_SEEDS} & {*range(GOLDEN_SAMPLES)}
    first = {array.tobytes() for array in golden["noise.0"]}
    assert not first & {array.tobytes() for array in calibration["unet.sample"]}


def test_the_same_export_again_changes_nothing(only_onnx, student, capsys):
    before = {path: path.stat().st_mtime_ns for path in only_onnx.rglob("*")}
    command = ["export", "onnx", "-m", str(student.root), str(only_onnx), "--json"]
    assert main(command[:-1]) == 0
    assert "Nothing to write, every file is there and fits its hash" in capsys.readouterr().out
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in made["artifacts"]] == ["torch-float32", "onnx-float32"]
    assert made["fingerprint"] == student.fingerprint
    assert made["artifacts"][1]["snr_db"] >= 100
    assert {path: path.stat().st_mtime_ns for path in only_onnx.rglob("*")} == before


def test_a_format_is_added_and_the_others_stay(only_onnx, student, capsys):
    (only_onnx / "README.md").write_text("a card")
    (only_onnx / "coreml/Resources/Unet.mlmodelc").mkdir(parents=True)
    (only_onnx / "coreml/Resources/Unet.mlmodelc/model.mil").write_text("compiled on a Mac")
    before = snapshot(only_onnx)
    command = ["export", "openvino", "-m", student.root, "-o", only_onnx, "--dtype", "fp16"]
    assert main([str(item) for item in command]) == 0
    assert "openvino-float16  openvino" in capsys.readouterr().out
    after = snapshot(only_onnx)
    assert list(Bundle.open(only_onnx).artifacts)[-1] == "openvino-float16"
    assert {k: v for k, v in after.items() if k in before and k != "edgedistill.json"} == {
        k: v for k, v in before.items() if k != "edgedistill.json"
    }


def test_other_options_make_the_artifact_anew(only_onnx, student):
    options = ExportOptions(batch=4)
    made = export_student(student, only_onnx, ["onnx"], options).artifacts["onnx-float32"]
    assert made.networks["unet"].signature.batch == 4
    assert made.made_with["options"]["batch"] == 4


def test_another_students_bundle_is_replaced_only_on_request(only_onnx, other_student, capsys):
    before = snapshot(only_onnx)
    command = ["export", "onnx", "-m", other_student.root, only_onnx]
    assert "another student ('tiny'); choose another folder, or give --overwrite" in refusal(
        capsys, *command
    )
    assert snapshot(only_onnx) == before
    assert main([*map(str, command), "--overwrite"]) == 0
    assert Bundle.open(only_onnx).fingerprint == other_student.fingerprint


def test_a_damaged_bundle_is_not_added_to(only_onnx, student, capsys):
    weights = only_onnx / "onnx/float32/unet.onnx"
    *rest, last = weights.read_bytes()
    weights.write_bytes(bytes([*rest, last ^ 1]))
    command = ["export", "openvino", "-m", student.root, only_onnx]
    assert "unet.onnx: damaged" in refusal(capsys, *command)


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
    only_onnx, copied, capsys, spoil, message
):
    spoil(copied.root)
    before = snapshot(only_onnx.parent)
    command = ["export", "onnx", "-m", copied.root, only_onnx, "--overwrite"]
    assert message in refusal(capsys, *command)
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
    student, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    named = [str(student.root) if item == "STUDENT" else item for item in arguments]
    assert message in refusal(capsys, "export", *named)
    assert list(tmp_path.iterdir()) == []


def test_underscores_are_understood(only_onnx, student, capsys):
    command = ["export", "onnx", "--model", student.root, only_onnx, "--batch_size=1", "--json"]
    assert main([str(item) for item in command]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"


def test_a_full_disk_leaves_the_old_bundle(only_onnx, student, capsys, monkeypatch):
    before = snapshot(only_onnx.parent)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copy2", full)
    command = ["export", "onnx", "-m", student.root, only_onnx, "--overwrite"]
    assert "bundle: cannot be written (No space left on device); free some" in refusal(
        capsys, *command
    )
    assert snapshot(only_onnx.parent) == before


def stray(*_arguments):
    msg = "unet.xml: 12.0 dB SNR against PyTorch."
    raise CheckFailedError(msg)


def test_a_graph_that_strays_is_status_1_and_leaves_the_old_bundle(
    only_onnx, student, capsys, monkeypatch
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


def test_a_killed_export_leaves_the_old_bundle_and_can_be_run_again(only_onnx, student):
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


def test_a_network_may_be_written_in_a_process_of_its_own(student, tmp_path, bundle):
    options = ExportOptions(isolate="always")
    made = export_student(student, tmp_path / "b", ["onnx"], options).artifacts["onnx-float32"]
    assert made.made_with["snr_db"] >= 100
    assert 0.2 < made.made_with["peak_gb"] < 4
    assert made.made_with["seconds"] > 0
    alone = (tmp_path / "b/onnx/float32/unet.onnx").read_bytes()
    assert alone == bundle.path("onnx/float32/unet.onnx").read_bytes()


def test_what_will_not_fit_is_refused_before_any_work(student, only_onnx, tmp_path, capsys):
    limited = ["--max-memory", "100MB"]
    command = ["export", "onnx", "-m", student.root, tmp_path / "b", *limited]
    assert "all networks together, torch-float32: takes about 0.6 GB of memory" in refusal(
        capsys, *command
    )
    assert not (tmp_path / "b").exists()
    # Of the reference and ONNX nothing is to be written.
    assert main(["export", "onnx", "-m", str(student.root), str(only_onnx), *limited]) == 0
    capsys.readouterr()
    command = ["export", "openvino", "-m", student.root, only_onnx, *limited]
    assert "unet, openvino-float32: takes about 0.6 GB of memory" in refusal(capsys, *command)


def test_what_large_networks_take_is_said_first(student, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(budget, "LARGE", 1)
    assert main(["export", "onnx", "-m", str(student.root), str(tmp_path / "b")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "about" in line]
    assert [line.partition(": about")[0] for line in told] == [
        "all networks together, torch-float32",
        "unet, onnx-float32",
        "in all",
    ]


def test_progress_names_each_artifact(student, tmp_path):
    seen = []
    export_student(student, tmp_path / "b", ["onnx"], None, lambda *what: seen.append(what))
    assert seen == [("torch-float32", 0, 2), ("onnx-float32", 1, 2), ("", 2, 2)]


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


def test_help_teaches_and_loads_nothing():
    code = "import sys; from edgedistill.cli import main; main(sys.argv[1:])"
    for format_name in ("", *FORMATS, "all"):
        command = [sys.executable, "-X", "importtime", "-c", code, "export", format_name, "--help"]
        done = subprocess.run(
            [item for item in command if item], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "edgedistill export onnx -m student bundle" in done.stdout
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert not imported & {"numpy", "torch", "onnx", "openvino", "coremltools", "tqdm"}


def test_large_students_are_probed_with_few_samples_one_by_one(student, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "ALONE_ABOVE", 1)
    fed = []

    def watched(*told, opened=torch_reference.open):
        session = opened(*told)
        return lambda feeds: fed.append(len(feeds["sample"])) or session(feeds)

    monkeypatch.setattr(torch_reference, "open", watched)
    bundle = assemble.export_student(
        student, tmp_path / "bundle", ["onnx"], ExportOptions(isolate="never")
    )
    golden = load_probes(bundle.path("probes/golden.safetensors"))
    calibration = load_probes(bundle.path("probes/calibration.safetensors"))
    assert len(golden["output"]) == reference.FEW_GOLDEN
    rows = len(bundle.table.rows)
    assert len(calibration["unet.sample"]) == rows * len(reference.FEW_SEEDS)
    assert fed == [1] * (rows * reference.probing(student).samples)
