"""Text pipelines as one graph each: it draws what the loop draws, and holds the weights of its networks once."""

from collections.abc import Callable

import numpy as np
import pytest

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.models.source import open_network
from edgedistill.noise import noise_bank
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions

pytestmark = pytest.mark.slow
PROMPTS = ["a cat and a dog", "a ship in the rain"]
# By kind, the scale of its guidance, and in how many steps.
KINDS = {"sd": (None, [2]), "lcm": (4.5, [2]), "sdxl": (None, [2])}
FORMATS = {"openvino": "*.bin", "coreml": "weight.bin"}  # with the name of what holds weights


@pytest.fixture(scope="module")
def exported(
    opened: Callable[..., Student], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Student, Bundle]]:
    """Export a pipeline as one graph in both formats, once; gives the pipeline too."""
    place = tmp_path_factory.mktemp("graphs")
    held: dict[str, tuple[Student, Bundle]] = {}

    def call(kind: str) -> tuple[Student, Bundle]:
        if kind not in held:
            student = opened(kind, *KINDS[kind])
            options = ExportOptions(dtype="float32", single_graph="default")
            held[kind] = student, export_student(student, place / kind, FORMATS, options)
        return held[kind]

    return call


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_of_a_pipeline_draws_what_its_loop_draws(
    kind: str, form: str, exported: Callable[[str], tuple[Student, Bundle]]
) -> None:
    _, bundle = exported(kind)
    asked = {"prompt": PROMPTS, "noise": noise_bank(bundle.table, [5, 6])}
    graph, loop = (
        edgedistill.load(bundle, artifact=name)(**asked).array
        for name in (f"{form}-float32-graph", "torch-float32")
    )
    np.testing.assert_allclose(graph, loop, atol=1e-4)
    assert np.abs(loop[0] - loop[1]).max() > 0.05


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_of_a_pipeline_holds_the_weights_of_its_networks_once(
    kind: str, form: str, exported: Callable[[str], tuple[Student, Bundle]]
) -> None:
    student, bundle = exported(kind)
    weights = {
        name: sum(value.nbytes for value in open_network(student, name).parameters())
        for name in student.table.networks
    }
    (file,) = (bundle.root / form / "float32-graph").rglob(FORMATS[form])
    once = sum(weights.values())
    # Constants and the borders of tensors in the file take some room; a second UNet would take more.
    assert once < file.stat().st_size < once + 0.5 * weights["unet"]
