"""ONNX and ONNX Runtime against PyTorch."""

import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgedistill
from edgedistill.agreement import snr_db
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import BundleError, CheckFailedError, ConfigError
from edgedistill.models import store
from export import to_onnx, weights
from export.checking import Expected, check_against
from export.frozen import Frozen, examples
from runtimes import ort
from runtimes.verify import verify

TINY = Signature(
    (TensorSpec("sample", (1, 1, 2, 2), "float32", "x"),),
    (TensorSpec("out_sample", (1, 1, 2, 2), "float32", "raw"),),
)


@pytest.fixture(scope="module")
def network(student):
    return store.load(student.root / "unet")


@pytest.fixture(scope="module")
def graph(bundle):
    return bundle.path(bundle.artifacts["onnx-float32"].networks["unet"].path)


def test_every_row_and_the_samples_are_the_references(bundle):
    (got,) = verify([bundle], artifacts=["onnx-float32"]).artifacts
    assert got.worst_forced[1] >= 100
    assert got.worst_free[1] >= 100
    assert got.image.snr_db >= 100
    assert [row.timestep for row in got.rows] == [999, 666, 332]


def test_the_graph_says_what_the_signature_says(graph, student):
    model = onnx.load(graph)
    signature = student.signatures["unet"].with_batch(1)
    for values, specs in (
        (model.graph.input, signature.inputs),
        (model.graph.output, signature.outputs),
    ):
        declared = [
            (
                value.name,
                tuple(size.dim_value for size in value.type.tensor_type.shape.dim),
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            )
            for value in values
        ]
        assert declared == [(spec.name, spec.shape, spec.dtype) for spec in specs]
    assert [item.version for item in model.opset_import] == [17]


def test_the_graph_does_not_tell_where_it_was_made(graph, tmp_path):
    written = graph.read_bytes()
    for trace in (sys.prefix, str(tmp_path.parent), ".py", "stack_trace", "/tmp/"):
        assert trace.encode() not in written
    assert not any(node.doc_string or node.metadata_props for node in onnx.load(graph).graph.node)


def test_a_free_batch_takes_any_batch(network, student, tmp_path):
    signature = student.signatures["unet"]
    path = tmp_path / "unet.onnx"
    made = to_onnx.write_onnx(network, signature, path)
    assert made["snr_db"] >= 100
    first = onnx.load(path).graph.output[0].type.tensor_type.shape.dim[0]
    assert first.dim_param == "batch"
    session = ort.open(path, signature, {})
    for batch in (1, 3):
        inputs = examples(signature.with_batch(batch))
        feeds = {s.name: t.numpy() for s, t in zip(signature.inputs, inputs, strict=True)}
        expected = Frozen(network, signature)(*inputs).numpy()
        assert snr_db(expected, session(feeds)["out_sample"]) >= 100


def test_large_weights_lie_in_one_file_beside_the_graph(network, student, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "EXTERNAL_ABOVE", 1000)
    made = to_onnx.write_onnx(
        network, student.signatures["unet"].with_batch(1), tmp_path / "unet.onnx"
    )
    assert made["snr_db"] >= 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unet.onnx", "unet.onnx_data"]
    assert (tmp_path / "unet.onnx_data").stat().st_size > (tmp_path / "unet.onnx").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, "batch"])
def test_the_newer_exporter_gives_the_same(network, student, tmp_path, batch):
    pytest.importorskip("onnxscript", reason='needs pip install "edgedistill[onnx]"')
    signature = student.signatures["unet"].with_batch(batch)
    made = to_onnx.write_onnx(network, signature, tmp_path / "unet.onnx", dynamo=True)
    assert made["snr_db"] >= 100
    assert made["opset"] == to_onnx.DYNAMO_OPSET
    written = (tmp_path / "unet.onnx").read_bytes()
    assert b".py" not in written
    assert b"stack_trace" not in written


class Moody(nn.Module):
    """Answers otherwise on every call, so that no graph can follow it."""

    calls = 0

    def forward(self, sample):
        Moody.calls += 1
        return sample * (1 + Moody.calls / 100)


def test_a_graph_that_strays_is_not_written(tmp_path):
    path = tmp_path / "deep" / "unet.onnx"
    with pytest.raises(CheckFailedError, match=r"unet\.onnx: \d\d\.\d dB SNR .* at least 100 dB"):
        to_onnx.write_onnx(Moody(), TINY, path)
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_is_not_onnx_is_not_written(network, student, tmp_path, monkeypatch):
    def trace(_frozen, path, **_options):
        node = onnx.helper.make_node("NoSuchOp", ["sample"], ["out_sample"])
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "x", [], [])), path)

    monkeypatch.setattr(to_onnx, "trace_onnx", trace)
    with pytest.raises(
        CheckFailedError, match=r"unet\.onnx: not valid ONNX of opset 17 \(.*NoSuchOp .*it was not"
    ):
        to_onnx.write_onnx(network, student.signatures["unet"], tmp_path / "unet.onnx")
    assert list(tmp_path.iterdir()) == []


def test_it_is_tried_at_the_noisiest_timestep_and_at_more_than_one_of_everything(student):
    """Float16 errs most there, and what is constant over the batch could hide a mixed-up input."""
    signature = student.signatures["unet"]
    for batch, timesteps in ((1, [999]), ("batch", [999, 0])):
        _, t, labels, w = examples(signature.with_batch(batch))
        assert t.tolist() == timesteps
        assert labels.tolist() == [0, 1][: len(t)]
        assert w.tolist() == [0.5, 1.5][: len(t)]


def test_the_check_measures_decibels():
    ones = {"sample": np.ones((1, 1, 2, 2), np.float32)}
    expected = Expected(ones, {"out_sample": ones["sample"]})
    off_by_a_thousandth = lambda feeds: {"out_sample": feeds["sample"] * np.float32(1.001)}  # noqa: E731
    assert check_against(expected, off_by_a_thousandth, 50, "x") == pytest.approx(60, abs=0.01)
    with pytest.raises(
        CheckFailedError, match="x: 60.0 dB SNR of `out_sample` against PyTorch, at least 61 dB"
    ):
        check_against(expected, off_by_a_thousandth, 61, "x")


def test_what_runs_on_a_device_needs_no_torch(bundle, sample_without_torch):
    alone = sample_without_torch(bundle, "onnxruntime")
    here = edgedistill.load(bundle, runtime="onnxruntime")(4, seed=7, guidance_scale=2.0).array
    np.testing.assert_array_equal(alone, here)


def test_a_sample_does_not_depend_on_its_batch(bundle):
    pipeline = edgedistill.load(bundle, runtime="ort")
    many = pipeline(5, seed=3, class_labels=4).array
    np.testing.assert_array_equal(pipeline(1, seed=5, class_labels=4).array, many[2:3])


def test_what_onnx_runtime_cannot_read_is_one_clear_error(tmp_path, graph, student):
    signature = student.signatures["unet"]
    (tmp_path / "x.onnx").write_bytes(b"not protobuf")
    with pytest.raises(
        BundleError, match=r"x\.onnx: ONNX Runtime .* cannot open it \(.*export it anew"
    ):
        ort.open(tmp_path / "x.onnx", signature, {})
    with pytest.raises(BundleError, match="its inputs are class_labels, sample, timestep, w, but"):
        ort.open(graph, TINY, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 11}, "has no option 'speed'; it takes: device, provider, threads"),
        ({"device": "tpu"}, "has no provider for 'tpu' here; it has: .*CPUExecutionProvider"),
        ({"provider": "XExecutionProvider"}, "has no provider for 'XExecutionProvider'"),
    ],
)
def test_options_that_cannot_be_are_refused(graph, student, options, message):
    with pytest.raises(ConfigError, match=message):
        ort.open(graph, student.signatures["unet"], options)


def test_it_says_what_it_is():
    assert ort.describe({}).startswith("ONNX Runtime 1.")
    assert ort.describe({"threads": 2}).endswith(" (CPU)")
    assert torch.__version__ not in ort.describe({})
