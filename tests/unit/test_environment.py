import json
import subprocess
import sys
from importlib import metadata

import pytest

from edgedistill import environment
from edgedistill.cli import main


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these packages are there."""

    def pretend(**packages: str) -> None:
        def version(name: str) -> str:
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(metadata, "version", version)

    return pretend


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("2.3.5", ">=1.26,<2.4", True),
        ("2.4.0", ">=1.26,<2.4", False),
        ("2.4.0rc1", "<2.4", False),
        ("10.0", ">=9.0", True),
        ("9.0", "<=9.0", True),
        ("2.13.0+cpu", ">=2.4", True),
        ("2024.6", ">=2024.6", True),
        ("1.0", "!=1.0", False),
        ("0.1", "", True),
    ],
)
def test_bounds(version, bounds, expected):
    assert environment.fits(version, bounds) is expected


def test_extras_are_those_of_the_distribution():
    found = environment.extras()
    assert {"core", "onnx", "openvino", "coreml", "quantize", "train"} <= set(found)
    assert not {"all", "dev"} & set(found)
    assert {item.package for item in found["core"]} == {"numpy", "pillow", "safetensors", "tqdm"}
    assert {item.package for item in found["onnx"]} >= {"onnx", "onnxruntime"}
    assert ("numpy", "<2.4") in [(item.package, item.bounds) for item in found["coreml"]]


def test_missing_and_unsupported_packages_are_told_apart(installed):
    installed(numpy="2.5.0", torch="2.13.0+cpu", coremltools="7.2")
    verdicts = {item.package: item.verdict for item in environment.extras()["coreml"]}
    assert verdicts == {
        "coremltools": "unsupported",
        "numpy": "unsupported",
        "scikit-learn": "missing",
        "tokenizers": "missing",
        "torch": "ok",
    }


def test_a_known_bad_pair_is_named_with_its_way_out_and_fails(installed, capsys):
    installed(coremltools="9.0", numpy="2.4.1")
    (sentence,) = environment.known_bad()
    assert sentence == (
        "coremltools 9.0 with numpy 2.4.1: conversion to Core ML fails (apple/coremltools#2633); "
        'run: pip install "numpy<2.4"'
    )
    assert main(["env"]) == 1
    assert f"known to fail: {sentence}" in capsys.readouterr().out


@pytest.mark.parametrize("numpy", ["2.3.5", "1.26.4"])
def test_a_good_pair_is_not_named(installed, numpy):
    installed(coremltools="9.0", numpy=numpy)
    assert environment.known_bad() == []


def test_the_text_says_how_to_install_what_is_missing(installed, capsys):
    installed(numpy="2.3.5", pillow="12", safetensors="0.8", tqdm="4.70")
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "core: ready" in lines
    assert (
        'openvino: openvino missing, tokenizers missing; run: pip install "edgedistill[openvino]"'
        in lines
    )


def test_json_holds_versions_and_verdicts(capsys):
    assert main(["env", "--json"]) in (0, 1)
    data = json.loads(capsys.readouterr().out)
    assert data["versions"]["numpy"] == metadata.version("numpy")
    assert data["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(data["versions"]["cpus"]) > 0
    assert {"package", "bounds", "version", "verdict"} == set(data["extras"]["core"][0])


def test_env_imports_no_package_that_it_reports():
    code = (
        "import sys; from edgedistill.cli import main; status = main(['env', '--json']); "
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime', 'openvino', 'coremltools', 'diffusers'}; "
        "sys.stderr.write(repr(sorted(heavy & set(sys.modules))))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stderr == "[]"
