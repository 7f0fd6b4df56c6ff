"""Bad input: one line that says what and what to do, status 2, and nothing written."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgedistill
from edgedistill import manifest
from edgedistill.bundle import GOLDEN
from edgedistill.errors import BundleError, ContractError
from edgedistill.tables import TABLE

NETWORK = "fake/float32/0.txt"


@pytest.fixture
def refused(run, tmp_path):
    """Run a command line that must be refused; gives its one line on stderr."""

    def call(*arguments: object) -> str:
        before = _tree(tmp_path)
        status, out, err = run(*arguments)
        (line,) = err.splitlines()
        assert (status, out) == (2, "")
        assert line.startswith("edgedistill: ")
        assert _tree(tmp_path) == before
        return line

    return call


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _reseal(root: Path, change) -> None:
    """Change a manifest as somebody would who can also compute its seal."""
    data = json.loads((root / manifest.MANIFEST).read_text())
    change(data)
    data["seal"] = manifest.seal(data)
    (root / manifest.MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runtime", "onxruntime"], "Unknown runtime 'onxruntime'.*did you mean 'onnxruntime'"),
        (["--runtime", "torch"], "no artifact for runtime 'torch'; the bundle holds: fake-float32"),
        (["--artifact", "x"], "no artifact 'x'; the bundle holds: fake-float32"),
        (["--class", "3"], "`class_labels` must be whole numbers from 0 up to 2, got"),
        (["--class", "-1"], "`class_labels` must be whole numbers from 0 up to 2, got"),
        (["--class", "0", "1", "2", "-n", "2"], "--class names 3 classes for 2 samples"),
        (["--class", "three"], "invalid int value: 'three'; see `edgedistill sample --help`"),
        (["--guidance-scale", "9"], r"must lie in the trained range \[1, 4\], got 9"),
        (["--guidance-scale", "nan"], r"must lie in the trained range \[1, 4\], got nan"),
        (["-n", "0"], "must be a whole number of at least 1, got '0'"),
        (["-n", "many"], "must be a whole number of at least 1, got 'many'"),
        (["--seed", "-1"], r"must be a whole number from 0 to 2\*\*127 - 1, got '-1'"),
        (["--stepz", "3"], "Unrecognized arguments: --stepz 3; see `edgedistill --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words(refused, handmade, tmp_path, words, message):
    line = refused("sample", handmade, "-o", tmp_path / "g.png", *words)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grid.jpg", "the name must end in .png, got .jpg"),
        ("grid", "the name must end in .png, got no suffix"),
        ("missing/grid.png", "missing; make it first."),
    ],
)
def test_a_target_that_cannot_be(refused, handmade, tmp_path, name, message):
    assert message in refused("sample", handmade, "-o", tmp_path / name)


def test_a_folder_where_the_picture_should_go(refused, handmade, tmp_path):
    (tmp_path / "x.png").mkdir()
    assert "it is a folder; name a file" in refused("sample", handmade, "-o", tmp_path / "x.png")


def test_a_page_that_is_no_page(refused, handmade, tmp_path):
    assert "must end in .html" in refused("parity", handmade, "--report", tmp_path / "p.pdf")


def test_no_target_at_all(refused, handmade):
    assert "required: -o/--output" in refused("sample", handmade)


def test_a_read_only_folder(refused, handmade, tmp_path, monkeypatch):
    """Root may write anywhere, so the answer of the system is put in its mouth."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    line = refused("sample", handmade, "-o", tmp_path / "g.png")
    assert f"{tmp_path} cannot be written; choose another place" in line


@pytest.mark.parametrize("command", ["sample", "parity"])
def test_a_full_disk(refused, handmade, tmp_path, monkeypatch, command):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    target = tmp_path / ("g.png" if command == "sample" else "p.html")
    line = refused(command, handmade, "-o" if command == "sample" else "--report", target)
    assert "No space left on device" in line
    assert str(target) in line


@pytest.mark.parametrize("command", ["sample", "parity"])
def test_a_bundle_that_is_not_there(refused, tmp_path, command):
    words = ["-o", tmp_path / "g.png"] if command == "sample" else []
    line = refused(command, tmp_path / "none", *words)
    assert "none: not a bundle: no such folder; make one with `edgedistill export`" in line


@pytest.mark.parametrize(
    ("command", "victim"),
    [
        *((command, name) for command in ("sample", "parity") for name in (NETWORK, TABLE)),
        ("parity", GOLDEN),  # which `sample` does not read
    ],
)
def test_one_corrupted_byte(refused, handmade, tmp_path, command, victim):
    data = bytearray((handmade / victim).read_bytes())
    data[len(data) // 2] ^= 1
    (handmade / victim).write_bytes(data)
    line = refused(command, handmade, *(["-o", tmp_path / "g.png"] if command == "sample" else []))
    assert f"{victim}: damaged" in line


def test_one_corrupted_byte_of_the_manifest(refused, handmade):
    path = handmade / manifest.MANIFEST
    path.write_text(path.read_text().replace('"handmade"', '"handmada"'))
    assert "damaged: its contents do not fit its seal" in refused("parity", handmade)


def test_a_newer_major_version_of_the_manifest(refused, handmade):
    _reseal(handmade, lambda data: data.update(schema_version="2.0"))
    assert "version 2.0 is newer than 1.0" in refused("parity", handmade)


def test_a_newer_major_version_of_the_table(refused, handmade):
    table = json.loads((handmade / TABLE).read_text())
    table["spec_version"] = "2.0"
    (handmade / TABLE).write_text(json.dumps(table))
    held = (handmade / TABLE).read_bytes()

    def admit(data):
        from hashlib import sha256

        data["files"][TABLE] = {"sha256": sha256(held).hexdigest(), "bytes": len(held)}

    _reseal(handmade, admit)
    assert "version 2.0 is newer than 1.2" in refused("parity", handmade)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd"])
def test_a_manifest_that_points_outside(refused, handmade, path):
    (handmade.parent / "secret").write_text("weights")

    def point(data):
        data["artifacts"]["fake-float32"]["networks"]["denoiser"]["path"] = path

    _reseal(handmade, point)
    assert "lies outside of the folder" in refused("parity", handmade)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("one.safetensors", "is one file, which diffusers opens with `from_single_file`; give a"),
        ("owner/model", "no such folder; give a student's folder, .* Nothing is fetched here"),
        ("empty", "config.json: no such file; a pipeline's folder has unet or transformer"),
    ],
)
def test_a_model_that_is_no_folder_of_networks(refused, tmp_path, model, message):
    (tmp_path / "one.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    line = refused("export", "onnx", "-m", tmp_path / model, tmp_path / "made")
    assert re.search(message, line)


@pytest.mark.parametrize("scale", ["-1", "nan", "much"])
def test_a_guidance_scale_that_cannot_be(refused, tmp_path, scale):
    line = refused("export", "onnx", "-m", "any", tmp_path / "made", "--guidance-scale", scale)
    assert f"--guidance-scale: must be a number of at least 0, got '{scale}'" in line


def test_a_runtime_that_is_not_installed(refused, make, tmp_path):
    bundle = make({"gone": ("absent", "float32")})
    line = refused("sample", bundle, "-o", tmp_path / "g.png")
    assert line.endswith(
        '`no_such_package` is not installed; run: pip install "edgedistill[absent]".'
    )


def test_bundles_of_two_students(refused, make):
    first, second = make({"a": ("fake", "float32")}, "x"), make({"a": ("fake", "float32")}, "y")
    _reseal(second, lambda data: data.update(fingerprint="0" * 64))
    assert "Only bundles of one student can be compared" in refused("parity", first, second)


def test_a_precision_without_a_floor(refused, make):
    line = refused("parity", make({"a": ("fake", "int3")}))
    assert "No parity floor for precision 'int3'; there is one for: float32" in line


def test_a_bundle_without_golden_tensors(refused, handmade):
    (handmade / GOLDEN).unlink()
    _reseal(handmade, lambda data: data["files"].pop(GOLDEN))
    assert "golden.safetensors" in refused("parity", handmade)


def test_shapes_that_do_not_fit_are_refused_by_the_python_face(handmade):
    pipeline = edgedistill.load(handmade, runtime="fake")
    noise = [np.zeros((1, 1, 8, 8), np.float32)] * 2
    with pytest.raises(ContractError, match="Noise 1 must be float32 1x1x8x8, got float32 1x1x8x7"):
        pipeline(noise=[noise[0], noise[1][..., :7]])
    with pytest.raises(ContractError, match="Noise 0 must be float32 1x1x8x8, got float64"):
        pipeline(noise=[array.astype(np.float64) for array in noise])
    with pytest.raises(ContractError, match="must hold 2 arrays, got 1"):
        pipeline(noise=noise[:1])
    with pytest.raises(ContractError, match="must agree, got n=3"):
        pipeline(3, seed=[1, 2])
    with pytest.raises(ContractError, match="Unknown condition color"):
        pipeline(color=1)
    with pytest.raises(BundleError, match="no artifact for runtime 'openvino'"):
        edgedistill.load(handmade, runtime="ov")


@pytest.mark.parametrize("hiding", ["runtimes.py", "runtimes/__init__.py"])
def test_a_file_of_the_users_that_hides_a_wing(tmp_path, hiding):
    """`python -m` looks into the current folder first; what lies there is named and not executed."""
    path = tmp_path / hiding
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit('executed')")
    words = [sys.executable, "-m", "edgedistill", "sample", "b", "-o", "g.png"]
    made = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout) == (2, "")
    (line,) = made.stderr.splitlines()
    assert line.startswith(f"edgedistill: {path} hides the package `runtimes` of edgedistill")
    assert line.endswith("rename it or run from another folder.")
