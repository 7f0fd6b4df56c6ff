"""Students of several networks, each kind of them: parity, one graph, compression, calibration, Core ML."""

import numpy as np
import pytest

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.errors import ConfigError
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions
from quantize.assemble import quantize_bundle
from quantize.config import PtqConfig, WeightOnlyConfig
from runtimes.verify import verify

pytestmark = pytest.mark.filterwarnings(
    # nncf asks an older module of torch for a name that it moved.
    "ignore:.*:DeprecationWarning:nncf"
)


@pytest.fixture(scope="module", params=["routed", "guided", "cascade", "worded", "latent"])
def bundle(request, build, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    student = build(request.param, folder / request.param)
    return export_student(student, folder / "bundle", ["onnx", "openvino"])


def test_every_artifact_reaches_its_floors(bundle):
    report = verify([bundle])
    assert report.failures == ()
    assert [item.name for item in report.artifacts] == list(bundle.artifacts)
    assert all(
        gain == pytest.approx(1, abs=0.02)
        for a in report.artifacts
        for gain in a.sensitivity.values()
    )


def test_latents_come_out_as_images(build, tmp_path):
    bundle = export_student(build("latent", tmp_path / "student"), tmp_path / "bundle", ["onnx"])
    pipeline = edgedistill.load(bundle, "onnxruntime")
    states = []
    made = pipeline(2, observe=lambda trace: states.append(trace.next)).array
    assert made.shape == (2, 1, 16, 16)
    by_hand = pipeline.networks["vae_decoder"]({"latent_sample": states[-1] / 0.5 + 0.25})
    assert np.allclose(made, by_hand["sample"].clip(-1, 1), atol=1e-6)
    with pytest.raises(ConfigError, match="autoencoder came without its encoder"):
        pipeline(image=np.zeros((1, 8, 8)), strength=0.5)


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("guided", ["noise_0", "class_labels", "w"]),
        ("cascade", ["noise_0", "noise_1", "noise_2"]),
        ("latent", ["noise_0", "class_labels"]),
    ],
)
def test_many_networks_become_one_graph(build, kind, taken, tmp_path):
    student = build(kind, tmp_path / kind)
    options = ExportOptions(single_graph="default")
    bundle = export_student(student, tmp_path / "bundle", ["onnx"], options)
    (report,) = verify([bundle], artifacts=["onnx-float32-graph"]).artifacts
    assert (report.failures, report.rows) == ((), ())
    assert report.image.snr_db >= 100
    (graph,) = bundle.artifacts["onnx-float32-graph"].networks.values()
    assert [spec.name for spec in graph.signature.inputs] == taken


def test_every_network_is_made_smaller(bundle, tmp_path):
    smaller = quantize_bundle(bundle, tmp_path / "smaller", WeightOnlyConfig("int8"))
    assert verify([smaller], artifacts=["onnx-int8-weights"]).failures == ()
    assert [*smaller.artifacts["onnx-int8-weights"].networks] == [
        *bundle.artifacts["onnx-float32"].networks
    ]


@pytest.mark.parametrize("bundle", ["routed", "worded"], indirect=True)
def test_every_network_is_calibrated_on_what_it_is_fed(bundle, tmp_path):
    config = PtqConfig(subset_size=16)
    smaller = quantize_bundle(bundle, tmp_path / "smaller", config, only=["openvino"])
    assert verify([smaller], artifacts=["openvino-int8"]).failures == ()


@pytest.mark.slow
def test_core_ml_reaches_its_floors(bundle, tmp_path):
    student = Student.open(bundle.root.parent / bundle.name)
    made = export_student(student, tmp_path / "bundle", ["coreml"])
    report = verify([made], artifacts=["coreml-float32", "coreml-float16"])
    assert report.failures == ()
    assert len(report.artifacts) == 2


def test_the_networks_of_a_cascade_share_their_weights(build, tmp_path):
    bundle = export_student(build("cascade", tmp_path / "student"), tmp_path / "bundle", ["onnx"])
    reference = bundle.artifacts["torch-float32"].networks
    assert reference["unet_4"].path == reference["unet_8"].path
    shapes = [
        file.signature.inputs[0].shape
        for file in bundle.artifacts["onnx-float32"].networks.values()
    ]
    assert shapes == [(1, 1, 4, 4), (1, 1, 8, 8)]
    assert bundle.table.effective_nfe == 2 / 4 + 2
    assert edgedistill.load(bundle, "onnxruntime")(3).array.shape == (3, 1, 8, 8)
