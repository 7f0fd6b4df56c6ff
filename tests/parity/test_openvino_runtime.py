"""OpenVINO against PyTorch."""

import sys

import numpy as np
import pytest

import edgedistill
from edgedistill.agreement import snr_db
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import BundleError, ConfigError
from edgedistill.models import store
from export.frozen import Frozen, examples
from export.to_openvino import write_openvino
from runtimes import ov
from runtimes.verify import verify

OTHER = Signature(
    (TensorSpec("z", (1, 1, 8, 8), "float32", "x"),),
    (TensorSpec("out_sample", (1, 1, 8, 8), "float32", "raw"),),
)


def model_path(bundle, name):
    return bundle.path(bundle.artifacts[name].networks["unet"].path)


@pytest.mark.parametrize(("precision", "floor"), [("float32", 100), ("float16", 55)])
def test_every_row_and_the_samples_are_the_references(bundle, precision, floor):
    (got,) = verify([bundle], artifacts=[f"openvino-{precision}"]).artifacts
    assert got.worst_forced[1] >= floor
    assert got.worst_free[1] >= floor
    assert got.image.snr_db >= floor


def test_float16_halves_the_weights(bundle):
    full, half = (
        model_path(bundle, f"openvino-{name}").with_suffix(".bin").stat().st_size
        for name in ("float32", "float16")
    )
    assert 0.5 <= half / full < 0.52


def test_the_model_says_what_the_signature_says(bundle, student):
    import openvino

    model = openvino.Core().read_model(model_path(bundle, "openvino-float16"))
    signature = student.signatures["unet"].with_batch(1)
    declared = [
        (port.get_names(), tuple(port.get_shape()), port.get_element_type().to_dtype().name)
        for port in [*model.inputs, *model.outputs]
    ]
    specs = [*signature.inputs, *signature.outputs]
    assert declared == [({spec.name}, spec.shape, spec.dtype) for spec in specs]


@pytest.mark.parametrize("name", ["openvino-float32", "openvino-float16"])
def test_the_model_does_not_tell_where_it_was_made(bundle, tmp_path, name):
    written = model_path(bundle, name).read_text()
    for trace in (
        sys.prefix,
        str(tmp_path.parent),
        ".py",
        "/tmp/",
        "conversion_parameters",
        ".onnx",
    ):
        assert trace not in written


def test_a_free_batch_takes_any_batch(student, tmp_path):
    network, signature = store.load(student.root / "unet"), student.signatures["unet"]
    assert write_openvino(network, signature, tmp_path / "unet.xml")["snr_db"] >= 100
    session = ov.open(tmp_path / "unet.xml", signature, {})
    for batch in (3, 1):
        inputs = examples(signature.with_batch(batch))
        feeds = {s.name: t.numpy() for s, t in zip(signature.inputs, inputs, strict=True)}
        expected = Frozen(network, signature)(*inputs).numpy()
        assert snr_db(expected, session(feeds)["out_sample"]) >= 100


def test_the_first_shapes_are_compiled_for_and_all_others_share_free_ones(
    student, tmp_path, monkeypatch
):
    import openvino

    network, signature = store.load(student.root / "unet"), student.signatures["unet"]
    write_openvino(network, signature, tmp_path / "unet.xml")
    shapes, compile_model = [], openvino.Core.compile_model

    def recorded(core, model, *rest):
        shapes.append(str(model.input("sample").partial_shape))
        return compile_model(core, model, *rest)

    monkeypatch.setattr(openvino.Core, "compile_model", recorded)
    session = ov.open(tmp_path / "unet.xml", signature, {})
    assert shapes == []
    for batch in (2, 3, 1, 2, 4):
        inputs = examples(signature.with_batch(batch))
        feeds = {s.name: t.numpy() for s, t in zip(signature.inputs, inputs, strict=True)}
        assert session(feeds)["out_sample"].shape[0] == batch
    _, *pixels = signature.inputs[0].shape
    sides = ",".join(map(str, pixels))
    assert shapes == [f"[2,{sides}]", f"[?,{sides}]"]


def test_an_answer_stays_what_it_was(bundle, student):
    signature = student.signatures["unet"].with_batch(1)
    session = ov.open(model_path(bundle, "openvino-float32"), signature, {"threads": 1})
    feeds = {s.name: t.numpy() for s, t in zip(signature.inputs, examples(signature), strict=True)}
    first = session(feeds)["out_sample"]
    kept = first.copy()
    session({**feeds, "sample": feeds["sample"] + 1})
    np.testing.assert_array_equal(first, kept)


def test_what_runs_on_a_device_needs_no_torch(bundle, sample_without_torch):
    alone = sample_without_torch(bundle, "openvino")
    here = edgedistill.load(bundle, runtime="openvino")(4, seed=7, guidance_scale=2.0).array
    np.testing.assert_array_equal(alone, here)


def test_what_openvino_cannot_read_is_one_clear_error(bundle, student, tmp_path):
    (tmp_path / "x.xml").write_text("<net>")
    with pytest.raises(BundleError, match=r"x\.xml: OpenVINO cannot compile it for CPU \(.*anew"):
        ov.open(tmp_path / "x.xml", student.signatures["unet"], {})
    with pytest.raises(BundleError, match="its inputs are .*, but the manifest says z"):
        ov.open(model_path(bundle, "openvino-float32"), OTHER, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 11}, "has no option 'speed'; it takes: device, precision, threads"),
        ({"device": "tpu"}, "finds no device 'TPU' here; it finds: .*CPU"),
        ({"precision": "f8"}, "must be one of f32, f16, bf16, auto, got 'f8'"),
    ],
)
def test_options_that_cannot_be_are_refused(bundle, student, options, message):
    with pytest.raises(ConfigError, match=message):
        ov.open(model_path(bundle, "openvino-float32"), student.signatures["unet"], options)


def test_a_full_disk_is_one_clear_error(student, tmp_path, monkeypatch):
    import openvino

    def full(_model, path, **_options):
        path.with_suffix(".bin").write_bytes(b"half")
        msg = "basic_ios::clear: iostream error"
        raise RuntimeError(msg)

    monkeypatch.setattr(openvino, "save_model", full)
    network, signature = store.load(student.root / "unet"), student.signatures["unet"]
    with pytest.raises(BundleError, match=r"unet\.xml: OpenVINO could not write it \(.*make room"):
        write_openvino(network, signature.with_batch(1), tmp_path / "unet.xml")
    assert list(tmp_path.iterdir()) == []


def test_precisions_that_are_not_written_are_refused(student, tmp_path):
    with pytest.raises(ConfigError, match="written in float32 or float16, got 'int8'"):
        write_openvino(None, student.signatures["unet"], tmp_path / "x.xml", precision="int8")


def test_it_says_what_it_is_where_and_in_what_precision():
    assert ov.describe({}).startswith("OpenVINO 20")
    assert ov.describe({}).endswith(" (CPU, f32)")
    assert ov.describe({"device": "gpu", "precision": "f16"}).endswith(" (GPU, f16)")
