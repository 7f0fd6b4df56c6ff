"""A single root whose files around the graphs an earlier release wrote otherwise: exported again, it gets those of today."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.bundle import Bundle
from edgedistill.drafts import write_manifest
from edgedistill.files import read_json, write_json

pytestmark = [
    # openvino-tokenizers' own: a tokenizer's regular expression, and what transformers says when it is read.
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
Change = Callable[[Path], None]


def _entry(**told: object) -> Change:
    return lambda path: write_json(path, {**read_json(path), **told})


def _line(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _other_layer(path: Path) -> None:
    path.write_text(path.read_text().replace("StringTensorUnpack", "StringTensorOther"))


OUTDATED: dict[str, Change] = {
    "scheduler/scheduler_config.json": _entry(timestep_spacing="linspace"),
    "model_index.json": _entry(unet=["diffusers", "UNet2DModel"]),
    "vae_decoder/config.json": _entry(scaling_factor=9.0),
    "tokenizer/merges.txt": _line,
    "tokenizer/tokenizer_config.json": _entry(model_max_length=9),
    "tokenizer/openvino_tokenizer.xml": _other_layer,
}


@pytest.fixture(scope="module")
def exported(tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgedistill.cli import main

    pytest.importorskip("openvino_tokenizers", reason="needs openvino-tokenizers")
    root = tmp_path_factory.mktemp("outdated") / "root"
    words = ["export", "openvino", "-m", str(tiny_pipelines / "sd"), str(root), "--steps", "1"]
    assert main(words) == 0
    return root


def _sealed_with(root: Path, changes: dict[str, Change]) -> None:
    """Change files of a bundle, in whose manifest they then stand, as an earlier release would have written it."""
    bundle = Bundle.open(root)
    for name, change in changes.items():
        change(root / name)
    write_manifest(bundle)


def test_files_of_loaders_are_those_that_the_export_would_write_and_others_stay(
    run, exported: Path, tiny_pipelines: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(exported, tmp_path / "root"))
    _sealed_with(root, OUTDATED)
    graph = (root / "unet/openvino_model.xml").stat().st_ino
    others = ("README.md", "coreml/Resources/Unet.mlmodelc/model.mil", "tokenizer/notes.txt")
    for name in others:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    command = ("export", "openvino", "-m", tiny_pipelines / "sd", root, "--steps", 1)
    status, told, noted = run(*command)
    assert (status, told.splitlines()[-1].startswith("Written")) == (0, True)
    (line,) = (line for line in noted.splitlines() if "replaces" in line)
    assert (
        line
        == f"{root}: replaces {', '.join(sorted(OUTDATED))}, which this release writes otherwise."
    )
    for name in {*OUTDATED} - {"tokenizer/openvino_tokenizer.xml"}:
        assert (root / name).read_bytes() == (exported / name).read_bytes()
    assert "StringTensorOther" not in (root / "tokenizer/openvino_tokenizer.xml").read_text()
    assert {(root / name).read_text() for name in others} == {"mine"}
    assert (root / "unet/openvino_model.xml").stat().st_ino == graph  # not even copied
    assert Bundle.open(root).artifacts.keys() == Bundle.open(exported).artifacts.keys()
    status, told, noted = run(*command)
    assert told.splitlines()[-1].startswith("Nothing to write")
    assert "replaces" not in noted


def test_another_version_of_a_package_alone_rewrites_nothing(
    run, exported: Path, tiny_pipelines: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(exported, tmp_path / "root"))
    older = _entry(_diffusers_version="0.1.0")
    _sealed_with(root, {"model_index.json": older, "scheduler/scheduler_config.json": older})
    status, told, noted = run("export", "openvino", "-m", tiny_pipelines / "sd", root, "--steps", 1)
    assert (status, told.splitlines()[-1].startswith("Nothing to write")) == (0, True)
    assert "replaces" not in noted


def test_what_quantize_made_smaller_is_not_taken_for_outdated(
    run, exported: Path, tiny_pipelines: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(exported, tmp_path / "root"))
    assert run("quantize", root, root, "--weight-format", "int8", "--networks", "unet")[0] == 0
    status, told, noted = run("export", "openvino", "-m", tiny_pipelines / "sd", root, "--steps", 1)
    assert (status, told.splitlines()[-1].startswith("Nothing to write")) == (0, True)
    assert "replaces" not in noted
    assert "openvino-int8-weights" in Bundle.open(root).artifacts
