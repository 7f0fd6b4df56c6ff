"""What `check-layout` says of time steps that a graph cannot be told."""

from pathlib import Path

import pytest

from edgedistill.compiler import compile_scheduler
from edgedistill.files import write_json
from edgedistill.layout.folder import Folder
from edgedistill.layout.scheduler_checks import whole_steps

EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
GRAPH = """<net><layers><layer id="0" name="timestep" type="Parameter"><output>
<port id="0" precision="{}" names="timestep"><dim>-1</dim></port></output></layer></layers><edges/></net>"""


def folder(root: Path, precision: str, steps: int) -> Folder:
    """Write a pipeline with an OpenVINO graph that takes a timestep of a precision, and the table of so many steps."""
    (root / "unet").mkdir()
    parts = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    write_json(root / "model_index.json", parts)
    (root / "unet" / "openvino_model.xml").write_text(GRAPH.format(precision))
    compile_scheduler(EULER, steps, shape=(4, 8, 8)).save(root / "sampler.json")
    return Folder(root)


@pytest.mark.parametrize(
    ("precision", "steps", "found"), [("I64", 3, ["499.5"]), ("I64", 2, []), ("FP32", 3, [])]
)
def test_a_graph_that_takes_whole_steps_is_told_whole_ones(
    precision: str, steps: int, found: list[str], tmp_path: Path
) -> None:
    made = list(whole_steps(folder(tmp_path, precision, steps), "openvino"))
    assert [(item.file, item.found, item.level) for item in made] == [
        ("sampler.json", time, "error") for time in found
    ]
    assert all("whole time steps, all that unet/openvino_model.xml" in i.expected for i in made)
