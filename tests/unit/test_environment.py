import json
import subprocess
import sys
from importlib import metadata

import pytest

from edgedistill import environment, known_bad
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
    assert known_bad.fits(version, bounds) is expected


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
    (sentence,) = known_bad.known_bad()
    assert sentence == (
        "coremltools 9.0 with numpy 2.4.1: conversion to Core ML fails (apple/coremltools#2633); "
        'run: pip install "numpy<2.4"'
    )
    assert main(["env"]) == 1
    assert f"known to fail: {sentence}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"coremltools": "9.0", "numpy": "2.4.0"}, {"numpy": "2.3.5"}),
        ({"optimum-onnx": "0.1.0", "optimum-intel": "2.2.0"}, {"optimum-intel": "1.27.0"}),
        ({"optimum-onnx": "0.1.0", "optimum": "2.3.0"}, {"optimum": "2.1.0"}),
        ({"optimum-intel": "2.2.0", "optimum": "2.1.0"}, {"optimum": "2.3.1"}),
        ({"optimum-onnx": "0.1.0", "transformers": "4.58.0"}, {"transformers": "4.57.6"}),
        ({"optimum-intel": "1.27.0", "transformers": "5.0.0"}, {"transformers": "4.57.6"}),
        ({"optimum-intel": "2.2.0", "transformers": "5.6.0"}, {"transformers": "5.5.0"}),
        (
            {"openvino-tokenizers": "2026.4.1.0", "openvino": "2026.3.0"},
            {"openvino": "2026.4.2"},
        ),
        (
            {"openvino-genai": "2026.4.1.0", "openvino-tokenizers": "2025.4.0.0"},
            {"openvino-tokenizers": "2026.4.1.0"},
        ),
    ],
)
def test_each_bad_pair_is_known_and_its_good_neighbour_is_not(installed, bad, good):
    first, second = bad
    installed(**bad)
    (sentence,) = known_bad.known_bad()
    assert sentence.startswith(f"{first} {bad[first]} with {second} {bad[second]}: ")
    assert "; run: pip install" in sentence
    installed(**{**bad, **good})
    assert known_bad.known_bad() == []


def test_a_command_is_warned_of_the_pairs_that_it_uses(installed, capsys):
    installed(coremltools="9.0", numpy="2.4.0")
    known_bad.warn_known_bad(["onnx", "train"], "export")
    assert capsys.readouterr().err == ""
    known_bad.warn_known_bad(["coreml", "train"], "export")
    assert capsys.readouterr().err.startswith("edgedistill: known to fail: coremltools 9.0 with")
    known_bad.warn_known_bad(["coreml"], "quantize")
    assert "coremltools 9.0 with" in capsys.readouterr().err
    for command in ("sample", "parity"):  # which convert nothing
        known_bad.warn_known_bad(["coreml"], command)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("system", "xcrun", "expected"),
    [
        ("Linux", None, "Core ML itself compiles and runs them on a Mac alone"),
        ("Darwin", None, "`xcrun coremlcompiler` is not there"),
        ("Darwin", "/usr/bin/xcrun", None),
    ],
)
def test_what_is_untested_or_misses_its_compiler_is_a_note(
    installed, monkeypatch, capsys, system, xcrun, expected
):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("shutil.which", lambda _: xcrun)
    installed(**{"coremltools": "9.0", "torch": "2.13.0", "scikit-learn": "1.5.1"})
    untested, *compilers = known_bad.notes()
    assert untested.startswith("coremltools 9.0 with torch 2.13.0: its makers tested up to")
    assert [expected in sentence for sentence in compilers] == ([True] if expected else [])
    assert main(["env"]) == 0
    assert f"note: {untested}" in capsys.readouterr().out
    installed(numpy="2.3.5")
    assert known_bad.notes() == []


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
