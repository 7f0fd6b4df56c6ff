"""The demo as its user runs it: everything is made, everything is green, within its time."""

import json
import re
from pathlib import Path

import pytest

from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.evaluation.students import BARS

pytestmark = [
    pytest.mark.slow,
    # nncf and coremltools warn about their own dependencies when they are first imported in this process.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PRECISIONS = {
    ("torch", "float32"),
    ("onnxruntime", "float32"),
    ("onnxruntime", "int8"),
    ("onnxruntime", "int8-weights"),
    ("openvino", "float32"),
    ("openvino", "float16"),
    ("openvino", "int8"),
    ("openvino", "int8-weights"),
    ("coreml", "float32"),
    ("coreml", "float16"),
    ("coreml", "int8-weights"),
    ("coreml", "palette6"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "demo"
    assert main(["demo", "-o", str(root)]) == 0
    return root


def test_every_student_clears_its_bar_and_every_artifact_its_floor(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    assert (report["ok"], report["problems"]) == (True, [])
    full = {item["nfe"]: item for item in report["students"] if "small" not in item["name"]}
    for nfe, bar in BARS["guided"].items():
        assert full[nfe]["to_naive"] <= bar.to_naive
        assert full[nfe]["to_teacher"] <= bar.to_teacher
        assert full[nfe]["mse_to_naive"] <= bar.mse_to_naive
        assert full[nfe]["report"]["recall"] >= (bar.recall or 0)
    small = next(item for item in report["students"] if "small" in item["name"])
    assert small["parameters"] < 0.8 * full[4]["parameters"]
    artifacts = report["parity"]["artifacts"]
    assert {(item["runtime"], item["precision"]) for item in artifacts} == PRECISIONS
    assert {item["verdict"] for item in artifacts} == {"ok"}


def test_float32_rows_reach_100_db_and_core_ml_float16_rows_50(demo: Path) -> None:
    artifacts = json.loads((demo / "report.json").read_text())["parity"]["artifacts"]
    floors = {"float32": 100.0, ("coreml", "float16"): 50.0}
    checked = 0
    for item in artifacts:
        floor = floors.get(item["precision"]) or floors.get((item["runtime"], item["precision"]))
        for row in item["rows"] if floor else []:
            measured = row["teacher_forced"]["raw"]["snr_db"], row["free_running"]["next"]["snr_db"]
            assert min(measured) >= floor, (item["name"], row["index"])
            checked += 1
    assert checked == 5 * 4


def test_the_page_stands_alone(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert "all green" in page
    assert page.count("data:image/png;base64,") >= 8 + 12
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_bundles_open_and_name_no_place_of_this_machine(demo: Path) -> None:
    for name in ("bundle", "compressed", "small-bundle"):
        root = Bundle.open(demo / name).root
        for path in root.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                assert str(demo.parent).encode() not in data, path
                assert str(Path.home()).encode() + b"/" not in data, path


def test_a_second_run_trains_nothing_again(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = demo / "student/unet/diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(["demo", "-o", str(demo), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert weights.stat().st_mtime_ns == before
    assert record["seconds"]["distill digits_guided"] < 5
