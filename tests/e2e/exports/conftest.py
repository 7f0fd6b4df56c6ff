"""Students and bundles that the tests of exports may change, and what they look at."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.cli import main
from edgedistill.student import Student
from export import assemble


@pytest.fixture
def copied(student, tmp_path) -> Student:
    """A student that a test may spoil."""
    return Student.open(shutil.copytree(student.root, tmp_path / "student"))


@pytest.fixture
def only_onnx(bundle, tmp_path) -> Path:
    """A bundle with ONNX alone, that a test may change."""
    target = tmp_path / "work" / "bundle"
    keep = ["torch-float32", "onnx-float32"]
    return assemble.write_bundle(target, bundle, lambda _: None, keep).root


def _snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Read every file of a folder."""
    return _snapshot


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused in one line, with status 2."""

    def call(*arguments: object) -> str:
        assert main([str(item) for item in arguments]) == 2
        message = capsys.readouterr().err.strip().split("\r")[-1]
        assert message.startswith("edgedistill: ")
        assert "\n" not in message
        return message

    return call
