"""Pipelines without texts, by class or by nothing, as OpenVINO and Core ML files: they draw what torch draws."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from edgedistill.bundle import Bundle
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions

pytestmark = pytest.mark.slow
CLASSES = {"class_labels": [3, 1]}
# By a name, the pipeline: its kind, its guidance, in how many steps, and what its two samples are of.
KINDS: dict[str, tuple[str, float | None, Sequence[int], dict[str, Any]]] = {
    "unconditional": ("unconditional", None, (1, 2, 5), {}),
    "class": ("class", None, (2, 4), CLASSES),
    "dit-cfg": ("dit", 4.0, (1, 2), CLASSES),
}
BUNDLE = ExportOptions(dtype="float32")


@pytest.fixture(scope="module")
def exported(
    opened: Callable[..., Student], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """Export a pipeline to OpenVINO and Core ML, once."""
    place, held = tmp_path_factory.mktemp("classes"), {}

    def call(name: str) -> Bundle:
        if name not in held:
            student = opened(*KINDS[name][:3])
            held[name] = export_student(student, place / name, ["openvino", "coreml"], BUNDLE)
        return held[name]

    return call


@pytest.mark.parametrize("runtime", ["openvino", "coreml"])
@pytest.mark.parametrize("name", KINDS)
def test_what_takes_a_class_or_nothing_draws_what_torch_draws(
    name: str, runtime: str, exported: Callable[[str], Bundle], drawn: Callable[..., Any]
) -> None:
    bundle = exported(name)
    _, _, steps, asked = KINDS[name]
    for count in steps:
        ours, wanted = (drawn(bundle, it, f"steps{count}", **asked) for it in (runtime, "torch"))
        for found, reference in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(found, reference, atol=1e-4)
        assert np.abs(reference[0] - reference[1]).max() > 0.05
