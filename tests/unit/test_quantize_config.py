"""Settings of quantization, the plan made from them, and the calibration batches."""

import argparse
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from edgedistill.bundle import CALIBRATION, Artifact, Bundle, NetworkFile
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import BundleError, ConfigError
from edgedistill.probes import save_probes
from edgedistill.table import Next, Row, SamplerTable, Stage
from edgedistill.telemetry import require_silent
from quantize import command, with_nncf
from quantize.assemble import plan
from quantize.calibration import calibration_batches
from quantize.config import PtqConfig, WeightOnlyConfig

TABLE = SamplerTable((Stage((1, 2, 2), (Row(("unet",), next=Next(x0=1.0)),)),), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subset_size": 0}, "`subset_size` must be at least 1, got 0"),
        ({"smooth_quant_alpha": 1.5}, "must lie from 0 to 1, got 1.5"),
        ({"ignored_scope": ("(",)}, r"'\(' is no regular expression"),
        ({"model_type": "cnn"}, "`model_type` must be one of transformer, None, got 'cnn'"),
        ({"preset": "best"}, "`preset` must be one of performance, mixed"),
        ({"activations_range": "max"}, "`activations_range` must be one of minmax"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PtqConfig(**settings)


def test_unknown_weight_format_is_refused():
    with pytest.raises(ConfigError, match="one of int8, palette6, palette4, got 'int4'"):
        WeightOnlyConfig("int4")


def _parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    return parser.parse_args(["quantize", "bundle", "smaller", *words])


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["--weight-format", "int8"], WeightOnlyConfig("int8")),
        (["--weight-format", "palette4"], WeightOnlyConfig("palette4")),
        (["--quantize-nbits", "8"], WeightOnlyConfig("int8")),
        (["--quantize-nbits", "6"], WeightOnlyConfig("palette6")),
        (["--quant-mode", "int8"], PtqConfig()),
        (["--act-precision", "int8", "--num-samples", "9"], PtqConfig(subset_size=9)),
        (
            ["--quant-mode", "int8", "--ignored-scope", "a", "b", "--smooth-quant-alpha", "0.5"],
            PtqConfig(ignored_scope=("a", "b"), smooth_quant_alpha=0.5),
        ),
    ],
)
def test_command_line_makes_the_settings(words, config):
    assert command._config(_parsed(*words)) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give either --weight-format .* or --quant-mode"),
        (["--weight-format", "int8", "--quant-mode", "int8"], "Give either"),
        (["--weight-format", "int8", "--quantize-nbits", "8"], "another word"),
        (["--quantize-nbits", "5"], "got 'palette5'"),
        (["--quant-mode", "int4"], "must be int8, got 'int4'"),
        (["--weight-format", "int8", "--subset-size", "3"], "--subset-size: only for --quant-mode"),
    ],
)
def test_command_line_that_contradicts_itself_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        command._config(_parsed(*words))


@pytest.mark.parametrize(
    ("config", "smooth", "corrects"),
    [
        (PtqConfig(), -1, False),
        (PtqConfig(smooth_quant_alpha=0.7, fast_bias_correction=True), 0.7, True),
    ],
)
def test_settings_reach_nncf(monkeypatch, config, smooth, corrects):
    nncf = require_silent("nncf", "quantize")
    seen = {}
    monkeypatch.setattr(nncf, "quantize", lambda *_, **given: seen.update(given))
    batches = with_nncf._Passes([{}] * 3, lambda items, _: items)
    with_nncf._quantize(nncf, None, config, batches, {"external_data_dir": "/where"})
    advanced = seen["advanced_parameters"]
    assert seen["subset_size"] == 3
    assert advanced.smooth_quant_alphas.matmul == smooth
    assert advanced.disable_bias_correction != corrects
    assert advanced.backend_params == {"external_data_dir": "/where"}


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from edgedistill.cli import main\n"
        "try: main(['quantize', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'numpy', 'torch', 'nncf', 'onnx', 'openvino'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"
    assert "examples:" in done.stdout


def _bundle(tmp_path, *artifacts: str) -> Bundle:
    networks = {name: NetworkFile(f"{name}/model.onnx", SIGNATURE) for name in ("unet", "vae")}
    held = {
        name: Artifact(name, "runtime", *name.split("-", maxsplit=1), networks=networks)
        for name in artifacts
    }
    return Bundle(tmp_path, "tiny", "f" * 64, TABLE, held)


@pytest.mark.parametrize(
    ("config", "made", "left_out"),
    [
        (
            WeightOnlyConfig("int8"),
            {
                "onnx-int8-weights": "onnx-float32",
                "openvino-int8-weights": "openvino-float32",
                "coreml-int8-weights": "coreml-float16",
            },
            set(),
        ),
        (
            PtqConfig(),
            {"onnx-int8": "onnx-float32", "openvino-int8": "openvino-float32"},
            {"coreml"},
        ),
        (WeightOnlyConfig("palette6"), {"coreml-palette6": "coreml-float16"}, {"onnx", "openvino"}),
    ],
    ids=lambda value: value.precision if hasattr(value, "precision") else "",
)
def test_each_format_is_made_of_its_best_float_artifact(tmp_path, config, made, left_out):
    names = ("torch-float32", "onnx-float32", "openvino-float16", "openvino-float32")
    bundle = _bundle(tmp_path, *names, "coreml-float32", "coreml-float16")
    planned = plan(bundle, config)
    assert {job.result.name: job.source.name for job in planned.jobs} == made
    assert set(planned.left_out) == left_out


def test_networks_that_are_not_asked_for_stay_as_they_are(tmp_path):
    bundle = _bundle(tmp_path, "onnx-float32")
    (job,) = plan(bundle, WeightOnlyConfig("int8"), networks=["vae"]).jobs
    assert job.kept == {"unet": "not asked for"}
    assert {name: file.path for name, file in job.result.networks.items()} == {
        "unet": "onnx/int8-weights/unet/model.onnx",
        "vae": "onnx/int8-weights/vae.onnx",
    }
    assert plan(bundle, WeightOnlyConfig("int8")).jobs[0].kept == {}
    with pytest.raises(ConfigError, match="no network 'decoder'; the bundle holds: unet, vae"):
        plan(bundle, WeightOnlyConfig("int8"), networks=["vae", "decoder"])


def test_core_ml_falls_back_to_float32(tmp_path):
    planned = plan(_bundle(tmp_path, "coreml-float32"), WeightOnlyConfig("palette4"))
    assert [job.source.name for job in planned.jobs] == ["coreml-float32"]


@pytest.mark.parametrize(
    ("held", "config", "only", "message"),
    [
        (["torch-float32"], PtqConfig(), [], "no format to make it of.*holds: torch-float32"),
        (["onnx-int8"], PtqConfig(), [], "onnx: the bundle holds no float32 artifact of it"),
        (["coreml-float16"], PtqConfig(), [], "coreml: Core ML quantizes activations on a Mac"),
        (["onnx-float32"], WeightOnlyConfig("palette6"), [], "onnx: look-up tables"),
        (["onnx-float32"], PtqConfig(), ["onnx", "openvino"], "openvino: the bundle holds no"),
        (["onnx-float32"], PtqConfig(), ["tflite"], "Unknown format 'tflite': choose of onnx"),
    ],
)
def test_nothing_to_do_is_refused(tmp_path, held, config, only, message):
    with pytest.raises(ConfigError, match=message):
        plan(_bundle(tmp_path, *held), config, only)


SIGNATURE = Signature(
    (
        TensorSpec("sample", ("batch", 1, 2, 2), "float32", "x"),
        TensorSpec("class_labels", ("batch",), "int32", "class"),
    ),
    (TensorSpec("out_sample", ("batch", 1, 2, 2), "float32", "raw"),),
)
COUNT = 12


@pytest.fixture
def probed(tmp_path):
    """A bundle whose calibration sample i is the number i everywhere."""
    numbers = np.arange(COUNT)
    states = np.broadcast_to(numbers[:, None, None, None], (COUNT, 1, 2, 2)).astype(np.float32)
    probes = {"unet.sample": states, "unet.class_labels": numbers.astype(np.int64)}
    save_probes(probes, tmp_path / CALIBRATION)
    return _bundle(tmp_path, "onnx-float32")


@pytest.mark.parametrize("batch", ["batch", 1, 4])
def test_every_probe_is_calibrated_on_once_and_inputs_stay_together(probed, batch):
    batches = calibration_batches(probed, "unet", SIGNATURE.with_batch(batch), 300)
    labels = np.concatenate([item["class_labels"] for item in batches])
    states = np.concatenate([item["sample"] for item in batches])
    assert sorted(labels) == list(range(COUNT))
    assert (states == labels[:, None, None, None]).all()
    assert labels.dtype == np.int32
    assert {len(item["sample"]) for item in batches} == {1 if batch == "batch" else batch}


def test_subset_is_spread_and_always_the_same(probed):
    signature = SIGNATURE.with_batch(1)
    first, second = (
        [int(item["class_labels"][0]) for item in calibration_batches(probed, "unet", signature, 4)]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 4
    assert max(first) - min(first) > COUNT // 2


def test_last_batch_is_filled_from_the_first(probed):
    batches = calibration_batches(probed, "unet", SIGNATURE.with_batch(5), 300)
    labels = np.concatenate([item["class_labels"] for item in batches])
    assert labels.shape == (15,)
    assert (labels[COUNT:] == labels[:3]).all()


def test_probes_of_another_network_are_not_taken(probed):
    with pytest.raises(BundleError, match=r"no calibration probes vae\.class_labels.*export"):
        calibration_batches(probed, "vae", SIGNATURE, 300)


def test_bundle_without_probes_says_to_export_again(tmp_path):
    bundle = dataclasses.replace(_bundle(tmp_path), root=tmp_path / "bare")
    with pytest.raises(BundleError, match="without probes, export it anew"):
        calibration_batches(bundle, "unet", SIGNATURE, 300)
