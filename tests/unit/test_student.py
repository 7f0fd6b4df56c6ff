"""The student folder: what its fingerprint stands for, and what is refused."""

import dataclasses
import json
import shutil

import pytest

from edgedistill.errors import BundleError
from edgedistill.student import MANIFEST, Student
from edgedistill.tables import TABLE


@pytest.fixture
def copied(student, tmp_path) -> Student:
    """A student that a test may change."""
    return Student.open(shutil.copytree(student.root, tmp_path / "student"))


def test_a_student_survives_the_round_trip(student, copied):
    copied.write_manifest()
    assert dataclasses.replace(Student.open(copied.root), root=student.root) == student


def test_the_fingerprint_is_of_weights_and_table_alone(student, copied):
    dataclasses.replace(copied, name="other", provenance={"method": "other"}).write_manifest()
    assert copied.fingerprint == student.fingerprint
    for path in (copied.root / "unet" / "diffusion_pytorch_model.safetensors", copied.root / TABLE):
        held = path.read_bytes()
        path.write_bytes(held + b" ")
        assert copied.fingerprint != student.fingerprint, path
        path.write_bytes(held)
    assert copied.fingerprint == student.fingerprint


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", "2.0", "version 2.0 is newer than 1.1"),
        ("signatures", [], "malformed"),
        ("signatures", {"../unet": {"inputs": [], "outputs": []}}, "lies outside of the folder"),
        ("name", None, "malformed"),
    ],
)
def test_a_manifest_that_cannot_be_is_one_error(copied, key, value, message):
    data = json.loads((copied.root / MANIFEST).read_text())
    if value is None:
        del data[key]
    else:
        data[key] = value
    (copied.root / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        Student.open(copied.root)
