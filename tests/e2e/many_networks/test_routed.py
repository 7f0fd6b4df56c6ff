"""Students that a router chooses by class: open one at a time, sample by sample, equal ones stored once."""

from collections.abc import Sequence

import numpy as np
import pytest

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.pipeline import Pipeline
from export.assemble import export_student
from quantize.assemble import quantize_bundle
from quantize.config import WeightOnlyConfig
from runtimes.verify import verify

pytestmark = pytest.mark.filterwarnings(
    # nncf asks an older module of torch for a name that it moved.
    "ignore:.*:DeprecationWarning:nncf"
)
LABELS = [0, 7, 2, 5, 1, 9, 4, 3]


def peak_of_open_sessions(bundle: Bundle, requests: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the most networks that were open at once, and how many are open in the end."""
    pipeline = Pipeline(bundle, bundle.artifact("onnx-float32"))
    networks = pipeline.networks
    opener, peak = networks._opener, [0]

    def counted(file):
        peak[0] = max(peak[0], len(networks.opened) + 1)
        return opener(file)

    networks._opener = counted
    for labels in requests:
        pipeline(class_labels=labels)
    return peak[0], len(networks.opened)


def test_open_networks_do_not_grow_with_the_number_of_students(build, tmp_path):
    one = [[label] for label in LABELS]
    for count in (1, 4):
        student = build("routed", tmp_path / f"k{count}", count=count)
        bundle = export_student(student, tmp_path / f"b{count}", ["onnx"])
        assert peak_of_open_sessions(bundle, one) == (1, 1), count
    assert peak_of_open_sessions(bundle, [[0, 1, 2], [3]]) == (3, 1)
    assert peak_of_open_sessions(bundle, [[0], [0, 4], [0]]) == (1, 1)
    assert Pipeline(bundle, bundle.artifact("onnx-float32")).networks.opened == ()


def test_a_request_is_each_sample_through_its_own_student(build, tmp_path):
    student = build("routed", tmp_path / "student", count=3)
    bundle = export_student(student, tmp_path / "bundle", ["onnx"])
    pipeline = edgedistill.load(bundle, "onnxruntime")
    together = pipeline(class_labels=LABELS, seed=3).array
    for i, label in enumerate(LABELS):
        alone = pipeline(class_labels=[label], seed=3 + i).array
        assert np.array_equal(together[i], alone[0])
        assert pipeline.networks.opened == (f"unet.{label % 3}",)


def test_equal_networks_are_stored_once(build, tmp_path):
    student = build("routed", tmp_path / "student", count=4, same=(1, 3))
    bundle = export_student(student, tmp_path / "bundle", ["onnx"])
    for artifact in bundle.artifacts.values():
        paths = [file.path for file in artifact.networks.values()]
        assert paths[0] == paths[1] == paths[3] != paths[2]
    whole = sum(path.stat().st_size for path in (bundle.root / "onnx").rglob("*.onnx"))
    assert bundle.size(bundle.artifacts["onnx-float32"]) == whole
    smaller = quantize_bundle(bundle, tmp_path / "smaller", WeightOnlyConfig("int8"))
    made = smaller.artifacts["onnx-int8-weights"].made_with["networks"]
    assert [item.get("same_as") for item in made.values()] == [None, "unet.0", None, "unet.0"]
    assert verify([bundle, smaller]).failures == ()
