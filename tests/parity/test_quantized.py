"""Quantized artifacts of the tiny student: what they cost in dB, what they save, what they were calibrated on."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgedistill.agreement import compare
from edgedistill.bundle import CALIBRATION, Bundle
from edgedistill.noise import noise_bank
from edgedistill.pipeline import Pipeline
from edgedistill.probes import load_probes
from edgedistill.sampler import run_row
from export.reference import CALIBRATION_SEEDS
from quantize.assemble import quantize_bundle
from quantize.config import PtqConfig, WeightOnlyConfig

# From 8 calibration samples on, more of them do not move the dB.
SUBSET = 16
FORMATS = ("onnx", "openvino")
PRECISIONS = ("int8-weights", "int8")


@pytest.fixture(scope="module")
def smaller(bundle, tmp_path_factory) -> Bundle:
    target = tmp_path_factory.mktemp("quantized") / "smaller"
    quantize_bundle(bundle, target, WeightOnlyConfig("int8"), only=FORMATS)
    return quantize_bundle(bundle, target, PtqConfig(subset_size=SUBSET), only=FORMATS)


def test_artifacts_and_the_reference_are_there(bundle, smaller):
    made = {f"{name}-{precision}" for name in FORMATS for precision in PRECISIONS}
    assert set(smaller.artifacts) == {"torch-float32", *made}
    assert (smaller.table, smaller.fingerprint) == (bundle.table, bundle.fingerprint)


# dB SNR over all calibration probes, measured on this student's random weights, less 3. A trained one of
# 0.16 million weights keeps 42 dB on its worst row with weights alone and 32 dB with activations.
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("precision", "floor"), [("int8-weights", 34.0), ("int8", 25.0)])
def test_answers_stay_near_the_source(bundle, smaller, name, precision, floor):
    networks = [
        Pipeline(opened, opened.artifact(f"{name}-{kind}")).networks["unet"]
        for opened, kind in ((bundle, "float32"), (smaller, precision))
    ]
    probes = load_probes(bundle.root / CALIBRATION)
    feeds = {key.removeprefix("unet."): value for key, value in probes.items()}
    wanted, got = (network(feeds)["out_sample"] for network in networks)
    assert compare(wanted, got).snr_db > floor
    told = smaller.artifact(f"{name}-{precision}").made_with["networks"]["unet"]["snr_db"]
    assert told == pytest.approx(compare(wanted, got).snr_db, abs=4)


# Bytes saved per byte of float32 weights, of 0.75 at most; measured, less a tenth. ONNX carries the scales
# and their names in the same file, and with activations a node for every scale.
@pytest.mark.parametrize(
    ("file", "share"),
    [
        ("onnx/int8-weights/unet.onnx", 0.52),
        ("onnx/int8/unet.onnx", 0.37),
        ("openvino/int8-weights/unet.bin", 0.61),
        ("openvino/int8/unet.bin", 0.55),
    ],
)
def test_files_shrink(bundle, smaller, file, share):
    source = re.sub("int8(-weights)?", "float32", file)
    saved = (bundle.root / source).stat().st_size - (smaller.root / file).stat().st_size
    assert saved > share * bundle.size(bundle.artifact("torch-float32"))


@pytest.mark.parametrize("name", FORMATS)
def test_default_scope_keeps_first_and_last_layers_in_float(smaller, name):
    counts = {
        precision: smaller.artifact(f"{name}-{precision}").made_with["networks"]["unet"]
        for precision in PRECISIONS
    }
    assert counts["int8-weights"]["float_weights"] == 0
    # conv_in, conv_out, and the three matrices of the time embedding.
    assert counts["int8"]["float_weights"] == 5


def test_activations_have_a_zero_point_of_their_own(smaller):
    """SiLU gives far more on the one side of zero than on the other."""
    graph = onnx.load(smaller.root / "onnx/int8/unet.onnx").graph
    held = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    points = [held[n.input[2]].item() for n in graph.node if n.op_type == "QuantizeLinear"]
    assert len(points) > 20
    assert sum(point < -100 for point in points) > len(points) / 2


def test_scales_have_the_one_dimension_that_onnx_asks_for(smaller):
    graph = onnx.load(smaller.root / "onnx/int8-weights/unet.onnx").graph
    dims = {item.name: list(item.dims) for item in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) > 20
    assert {len(dims[name]) for node in nodes for name in node.input[1:]} == {1}


def test_files_name_no_path_of_this_machine(smaller):
    folders = [str(smaller.root.parent), str(Path.home()), str(Path.cwd())]
    for path in smaller.root.rglob("unet.*"):
        held = path.read_bytes()
        assert not [folder for folder in folders if folder.encode() in held], path


def test_calibration_is_what_the_rows_feed(bundle):
    """One row of the table leads from each probe to the next, and no other timestep is there."""
    table = bundle.table
    noise = noise_bank(table, CALIBRATION_SEEDS)
    probes = load_probes(bundle.root / CALIBRATION)
    rows = [
        {
            key.removeprefix("unet."): value.reshape(len(table.rows), -1, *value.shape[1:])[index]
            for key, value in probes.items()
        }
        for index in range(len(table.rows))
    ]
    network = Pipeline(bundle, bundle.artifact("onnx-float32")).networks
    for row, now, then in zip(table.rows, rows, rows[1:], strict=False):
        assert (now["timestep"] == np.float32(row.feeds["timestep"])).all()
        after = run_row(table, row, network, now["sample"], noise, now).next
        assert compare(then["sample"], after).snr_db > 100


def test_the_same_work_gives_the_same_bytes(bundle, smaller, tmp_path):
    again = quantize_bundle(bundle, tmp_path / "again", WeightOnlyConfig("int8"), only=FORMATS)
    for name in ("onnx/int8-weights/unet.onnx", "openvino/int8-weights/unet.bin"):
        assert (again.root / name).read_bytes() == (smaller.root / name).read_bytes()
