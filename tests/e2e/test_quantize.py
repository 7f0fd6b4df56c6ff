"""`edgedistill quantize` from the command line: what it prints, what it refuses, and what a kill leaves."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgedistill.bundle import CALIBRATION, Bundle
from edgedistill.drafts import write_bundle, write_manifest
from edgedistill.errors import ContractError
from edgedistill.telemetry import require_silent
from export import weights
from export.assemble import export_student
from quantize import assemble, onnx_files

WEIGHTS = ("--weight-format", "int8", "--only", "onnx")
_INLINE = 1024  # bytes; smaller constants stay in the graph


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "work" / "smaller"


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _copy(bundle: Bundle, target: Path) -> Bundle:
    return write_bundle(target, bundle, lambda _: None, bundle.artifacts)


def test_table_says_what_was_gained_and_lost(run, bundle, target):
    status, out, err = run("quantize", bundle.root, target, *WEIGHTS)
    assert (status, err) == (0, "")
    (line,) = [text for text in out.splitlines() if text.startswith("onnx-int8-weights")]
    source, before, after, ratio, snr_db, compressed, kept = line.split()[1:]
    assert source == "onnx-float32"
    assert float(ratio) == pytest.approx(float(before) / float(after), abs=0.1)
    assert float(snr_db) > 30
    assert (compressed, kept) == ("40", "0")  # one convolution is four: it enlarges
    assert list(Bundle.open(target).artifacts) == ["torch-float32", "onnx-int8-weights"]


def test_a_clean_process_prints_json_alone_and_reports_to_nobody(bundle, target, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    words = ["quantize", bundle.root, "-o", target, *WEIGHTS, "--json"]
    code = "import sys; from edgedistill.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told["artifacts"][0]["artifact"] == "onnx-int8-weights"
    smaller = Bundle.open(target)
    assert told["artifacts"][0]["bytes_after"] == smaller.size(
        smaller.artifact("onnx-int8-weights")
    )
    # The usage reports of NNCF, OpenVINO and ONNX Runtime begin with a client id in the home folder.
    assert list(home.iterdir()) == []


def test_an_answer_too_far_off_is_status_1_and_writes_nothing(run, bundle, target, monkeypatch):
    monkeypatch.setattr(assemble, "LEAST_DB", 200.0)
    status, out, err = run("quantize", bundle.root, target, *WEIGHTS)
    assert (status, out) == (1, "")
    assert "onnx-int8-weights, network `unet`: " in err
    assert "dB SNR against onnx-float32 on a held-out call, at least 200 dB is required" in err
    assert "leave this network as it is: --networks names those to make smaller" in err
    assert list(target.parent.iterdir()) == []


def test_a_pattern_that_fits_nothing_is_refused(run, bundle, target):
    words = ("--quant-mode", "int8", "--num-samples", "1", "--only", "onnx")
    status, out, err = run("quantize", bundle.root, target, *words, "--ignored-scope", "nosuch")
    assert (status, out) == (2, "")
    assert "nosuch" in err
    assert f"{bundle.root}/onnx/float32/unet.onnx: NNCF refuses to quantize it" in err
    assert "change --ignored-scope" in err
    assert list(target.parent.iterdir()) == []


def test_an_answer_that_is_no_number_says_what_to_do(run, bundle, target, monkeypatch):
    def broken(*_):
        msg = "Network `unet` returned NaN or infinity in `out_sample`."
        raise ContractError(msg)

    monkeypatch.setattr(assemble, "_decibels", broken)
    words = ("--quant-mode", "int8", "--num-samples", "1", "--only", "onnx")
    status, _, err = run("quantize", bundle.root, target, *words)
    assert status == 1
    assert "onnx-int8, network `unet`: Network `unet` returned NaN" in err
    assert "Nothing was written. Calibrate on more samples, keep more of it in float" in err


def _numbers(graph: Path) -> dict[str, np.ndarray]:
    held = onnx.load(graph).graph.initializer
    return {item.name: onnx.numpy_helper.to_array(item) for item in held}


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        (("--weight-format", "int8"), "int8-weights"),
        (("--quant-mode", "int8", "--num-samples", "4"), "int8"),
    ],
)
def test_a_graph_whose_weights_lie_beside_it_becomes_the_same(
    run, student, bundle, target, tmp_path, monkeypatch, words, precision
):
    """As those of over 2 GB do: one message of protobuf can hold no more, and NNCF refuses it."""
    graph = f"onnx/{precision}/unet.onnx"
    assert run("quantize", bundle.root, target, *words, "--only", "onnx")[0] == 0
    assert not (target / f"{graph}_data").exists()
    nncf = require_silent("nncf", "quantize")

    def refuse_weights_inside(model):
        if any(len(item.raw_data) > _INLINE for item in model.graph.initializer):
            msg = "The protobuf of onnx model is too large (>2GB)."
            raise nncf.ValidationError(msg)

    backend = require_silent("nncf.onnx.quantization.quantize_model", "quantize")
    monkeypatch.setattr(backend, "check_model_protobuf_size", refuse_weights_inside)
    for module in (weights, onnx_files):
        monkeypatch.setattr(module, "EXTERNAL_ABOVE", _INLINE)
    large = export_student(student, tmp_path / "large", ["onnx"])
    assert (large.root / "onnx/float32/unet.onnx_data").is_file()
    smaller = target.with_name("of large")
    assert run("quantize", large.root, smaller, *words, "--only", "onnx")[0] == 0
    assert (smaller / f"{graph}_data").stat().st_size > 10 * _INLINE
    wanted, got = _numbers(target / graph), _numbers(smaller / graph)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)


def test_a_bundle_without_probes_is_refused(run, bundle, target, tmp_path):
    bare = shutil.copytree(bundle.root, tmp_path / "bare")
    (bare / CALIBRATION).unlink()
    write_manifest(dataclasses.replace(bundle, root=bare))
    status, _, err = run("quantize", bare, target, "--quant-mode", "int8", "--only", "onnx")
    assert status == 2
    assert "written without probes, export it anew" in err
    assert list(target.parent.iterdir()) == []


def test_a_bundle_can_be_added_to_in_place(run, bundle, target):
    _copy(bundle, target)
    (target / "README.md").write_text("a card")
    assert run("quantize", target, target, *WEIGHTS)[0] == 0
    added = Bundle.open(target)
    assert list(added.artifacts) == [*bundle.artifacts, "onnx-int8-weights"]
    assert (target / "README.md").read_text() == "a card"
    kept = _tree(bundle.root).items() - {
        ("edgedistill.json", _tree(bundle.root)["edgedistill.json"])
    }
    assert kept <= _tree(target).items()
    status, _, err = run("quantize", target, target, *WEIGHTS, "--overwrite")
    assert status == 2
    assert "cannot replace the bundle that it is made from; leave --overwrite out" in err
    assert list(Bundle.open(target).artifacts) == list(added.artifacts)


def test_another_student_is_replaced_only_when_told_to(run, bundle, target):
    other = _copy(dataclasses.replace(bundle, fingerprint="0" * 64, name="other"), target)
    before = _tree(target)
    status, _, err = run("quantize", bundle.root, target, *WEIGHTS)
    assert status == 2
    assert (
        "holds a bundle of another student ('other'); choose another folder, or give --overwrite"
        in err
    )
    assert _tree(target) == before
    assert run("quantize", bundle.root, target, *WEIGHTS, "--overwrite")[0] == 0
    assert Bundle.open(target).fingerprint == bundle.fingerprint != other.fingerprint


def test_a_kill_leaves_the_old_bundle_and_the_next_run_cleans_up(run, bundle, target):
    _copy(bundle, target)
    before = _tree(target)
    code = (
        "import os, signal, sys; from edgedistill.cli import main; from quantize import assemble\n"
        "assemble._worst_db = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])"
    )
    words = ["quantize", bundle.root, target, *WEIGHTS]
    killed = subprocess.run([sys.executable, "-c", code, *map(str, words)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert _tree(target) == before
    assert len(list(target.parent.iterdir())) == 2
    assert run(*words)[0] == 0
    assert list(target.parent.iterdir()) == [target]
