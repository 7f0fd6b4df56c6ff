"""`edgedistill export --networks`: a part of a pipeline is exported, says what it lacks, and is joined by the rest."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgedistill.bundle import Bundle
from edgedistill.errors import BundleError, ConfigError
from edgedistill.layout.checking import check_layout
from edgedistill.models import store
from edgedistill.models.source import open_source
from edgedistill.pipeline import load
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions
from runtimes.verify import verify

FIRST = ("text_encoder", "unet")


def options(*networks: str, **others) -> ExportOptions:
    return ExportOptions(layout="single-root", networks=networks, **others)


@pytest.fixture(scope="module")
def source(tiny_pipelines) -> Student:
    return open_source(tiny_pipelines / "sd", num_steps=1)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> Bundle:
    """A pipeline of which two networks became graphs."""
    return export_student(
        source, tmp_path_factory.mktemp("part") / "root", ["onnx"], options(*FIRST)
    )


@pytest.fixture
def part(made, tmp_path) -> Bundle:
    """The same, that a test may change."""
    return Bundle.open(shutil.copytree(made.root, tmp_path / "root"))


def picture(bundle: Bundle, runtime: str) -> np.ndarray:
    return load(bundle, runtime)(prompt="a cat", seed=3).array


def test_a_part_says_what_it_lacks_and_how_it_is_added(made: Bundle) -> None:
    artifact = made.artifacts["onnx-float32"]
    assert {*artifact.networks} == {*FIRST}
    assert made.lacking(artifact) == ("vae_decoder", "vae_encoder")
    command = (
        f"edgedistill export onnx -m MODEL {made.root} --dtype float32 --networks vae_decoder`"
    )
    with pytest.raises(BundleError, match=f"onnx-float32 has no graph of vae_decoder; .*{command}"):
        load(made, "onnxruntime")
    assert load(made).artifact.name == "torch-float32"
    report = verify([made])
    assert [item.verdict for item in report.artifacts] == ["ok", "skipped"]
    assert "--networks vae_decoder" in report.artifacts[1].skipped
    lost = [item for item in check_layout(made.root, ["ort"]) if item.level == "error"]
    assert {item.file for item in lost} == {"vae_decoder/model.onnx"}


def test_the_rest_joins_and_what_is_there_stays(part: Bundle, source, monkeypatch) -> None:
    there = part.root / "unet/model.onnx"
    before = there.read_bytes()
    read = []
    monkeypatch.setattr(
        store, "load", lambda folder, load=store.load: read.append(folder.name) or load(folder)
    )
    joined = export_student(source, part.root, ["onnx"], options("vae_decoder"))
    assert read == ["vae"]  # the weights of no other network
    assert joined.lacking(joined.artifacts["onnx-float32"]) == ("vae_encoder",)
    assert there.read_bytes() == before
    np.testing.assert_allclose(picture(joined, "onnxruntime"), picture(joined, "torch"), atol=1e-5)
    with pytest.raises(ConfigError, match="came without its encoder; export the encoder too"):
        load(joined, "onnxruntime")(image=np.zeros((1, 3, 16, 16), np.float32), strength=1.0)
    whole = export_student(source, part.root, ["onnx"], options())
    assert whole.lacking(whole.artifacts["onnx-float32"]) == ()
    assert there.read_bytes() == before


def test_what_is_there_is_not_written_again(part: Bundle, source) -> None:
    before = {path: path.stat().st_mtime_ns for path in part.root.rglob("*")}
    assert export_student(source, part.root, ["onnx"], options("unet")) == part
    assert {path: path.stat().st_mtime_ns for path in part.root.rglob("*")} == before


def test_what_cannot_be_a_part_is_refused(part: Bundle, source) -> None:
    with pytest.raises(
        ConfigError, match="no network 'decoder'; choose of unet, text_encoder, vae"
    ):
        export_student(source, part.root, ["onnx"], options("decoder"))
    with pytest.raises(
        BundleError, match=r"with other options \(opset None, not 18\); give the same"
    ):
        export_student(source, part.root, ["onnx"], options("vae_decoder", opset=18))
    with pytest.raises(ConfigError, match="A single graph is of all networks"):
        options("unet", single_graph="default")


def test_the_command_tells_what_lacks(run, tiny_pipelines, tmp_path: Path) -> None:
    pipeline, target = tiny_pipelines / "sd", tmp_path / "root"
    command = (
        "export",
        "openvino",
        "-m",
        pipeline,
        target,
        "--steps",
        1,
        "--networks",
        "vae_decoder",
    )
    status, told, _ = run(*command)
    assert status == 0
    assert "openvino-float32 has no graph of unet, text_encoder, vae_encoder;" in told
    _, told, _ = run(*command, "--json")
    artifacts = {item["name"]: item for item in json.loads(told)["artifacts"]}
    assert artifacts["openvino-float32"]["paths"] == ["vae_decoder/openvino_model.xml"]
    assert artifacts["openvino-float32"]["lacking"] == ["unet", "text_encoder", "vae_encoder"]
