"""`edgedistill export`: a student becomes a bundle, artifact by artifact, each whole or not at all."""

import json
import subprocess
import sys

import numpy as np

from edgedistill.bundle import CALIBRATION, GOLDEN, Bundle
from edgedistill.cli import main
from edgedistill.parity import floor_of
from edgedistill.probes import GOLDEN_SAMPLES, load_probes
from export import assemble, budget, reference
from export.assemble import export_student
from export.formats import FORMATS, ExportOptions
from runtimes import torch_reference


def test_a_bundle_holds_the_reference_and_one_artifact_per_precision(snapshot, bundle, student):
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


def test_a_format_is_added_and_the_others_stay(snapshot, only_onnx, student, capsys):
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


def test_underscores_are_understood(only_onnx, student, capsys):
    command = ["export", "onnx", "--model", student.root, only_onnx, "--batch_size=1", "--json"]
    assert main([str(item) for item in command]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"


def test_a_network_may_be_written_in_a_process_of_its_own(student, tmp_path, bundle):
    options = ExportOptions(isolate="always")
    made = export_student(student, tmp_path / "b", ["onnx"], options).artifacts["onnx-float32"]
    assert made.made_with["snr_db"] >= 100
    assert 0.2 < made.made_with["peak_gb"] < 4
    assert made.made_with["seconds"] > 0
    alone = (tmp_path / "b/onnx/float32/unet.onnx").read_bytes()
    assert alone == bundle.path("onnx/float32/unet.onnx").read_bytes()


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
