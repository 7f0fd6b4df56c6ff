"""Our own graphs of float16 mask attention with a number that float16 has."""

from pathlib import Path

import pytest

from edgedistill.layout.graphs import read_graph
from edgedistill.models.source import open_source
from export.assemble import export_student
from export.formats import ExportOptions


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("form", ["openvino", "coreml"])
def test_what_reads_prompts_in_float16_holds_nothing_that_float16_does_not(
    tiny_pipelines: Path, tmp_path: Path, kind: str, form: str
) -> None:
    student = open_source(tiny_pipelines / kind, num_steps=1)
    encoders = tuple(name for name in student.signatures if name.startswith("text_encoder"))
    options = ExportOptions(layout="single-root", dtype="float16", networks=encoders)
    made = export_student(student, tmp_path / "root", [form], options)
    files = made.artifacts[f"{form}-float16"].networks
    assert set(files) == set(encoders)
    for file in files.values():
        constants = read_graph(made.root / file.path).constants
        assert constants.in_half
        assert constants.beyond == ()
