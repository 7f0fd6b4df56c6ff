"""A pipeline is exported with samplers that loaders follow, and with one that an unmodified Swift package takes."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.errors import ConfigError, ContractError
from edgedistill.files import read_json, write_json
from edgedistill.layout.checking import check_layout
from edgedistill.models.source import open_source
from edgedistill.plans import portable
from edgedistill.stock import objections, swift_spacing
from edgedistill.student import Student
from edgedistill.swift import SOURCES, golden
from export.assemble import export_student
from export.formats import ExportOptions, jobs
from export.loader_files import check_jobs
from export.samplers import CHOICE, with_samplers
from runtimes.verify import verify

SCHEDULER = "scheduler/scheduler_config.json"


def with_scheduler(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a pipeline and change its scheduler."""
    root = Path(shutil.copytree(source, target))
    config = {**read_json(root / SCHEDULER), **changes}
    write_json(root / SCHEDULER, config)
    index = read_json(root / "model_index.json")
    write_json(
        root / "model_index.json", {**index, "scheduler": ["diffusers", config["_class_name"]]}
    )
    return root


def planned(root: Path, steps: int, *formats: str, asked: str | None = None) -> Student:
    return with_samplers(open_source(root, num_steps=steps), formats, asked)


def told(student: Student) -> tuple[str, int, str | None]:
    notes = student.table.annotations
    return notes["scheduler"]["_class_name"], len(student.table.rows), notes.get(CHOICE)


def test_steps_that_every_loader_takes_stay(tiny_pipelines) -> None:
    for kind, name in (("sd", "DDIMScheduler"), ("lcm", "LCMScheduler"), ("sdxl", "EulerDisc")):
        source = open_source(tiny_pipelines / kind, num_steps=4)
        made = with_samplers(source, ["onnx", "openvino"])
        assert made == source
        assert made.table.annotations["scheduler"]["_class_name"].startswith(name)


def test_a_scheduler_that_loaders_disagree_on_gives_way(tiny_pipelines, tmp_path) -> None:
    solver = with_scheduler(
        tiny_pipelines / "sd", tmp_path / "dpm", _class_name="DPMSolverMultistepScheduler"
    )
    name, steps, why = told(planned(solver, 4))
    assert (name, steps) == ("DDIMScheduler", 4)
    assert "genai says: it has no DPMSolverMultistepScheduler" in str(why)
    table = planned(solver, 4).table
    assert not any(
        objections(table.annotations["scheduler"], 4, table)[k] for k in ("genai", "ort")
    )
    # Five steps have no portable plan, and what was asked for is kept with a word.
    assert told(planned(solver, 5))[:2] == ("DPMSolverMultistepScheduler", 5)
    assert "it has no" in str(told(planned(solver, 5))[2])
    assert told(planned(solver, 4, asked="own"))[0] == "DPMSolverMultistepScheduler"


def test_a_scheduler_that_is_not_compiled_gives_way_and_is_named(tiny_pipelines, tmp_path) -> None:
    root = with_scheduler(tiny_pipelines / "sd", tmp_path / "pndm", _class_name="PNDMScheduler")
    assert told(planned(root, 4)) == (
        "DDIMScheduler",
        4,
        "no table makes the steps of its PNDMScheduler",
    )
    with pytest.raises(ConfigError, match="no table makes the steps of its PNDMScheduler"):
        planned(root, 4, asked="own")


def test_what_was_distilled_for_its_sampler_keeps_it(tiny_pipelines, tmp_path) -> None:
    root = with_scheduler(
        tiny_pipelines / "lcm", tmp_path / "lcm", beta_schedule="squaredcos_cap_v2"
    )
    name, steps, why = told(planned(root, 2))
    assert (name, steps) == ("LCMScheduler", 2)
    assert "genai says: `beta_schedule`" in str(why)


def test_plans_that_are_asked_for_keep_guidance_and_conditions(tiny_pipelines) -> None:
    source = open_source(tiny_pipelines / "sdxl", num_steps=2, guidance_scale=3.0)
    made = with_samplers(source, (), "portable").table
    plan = portable(
        source.table.annotations["scheduler"],
        2,
        shape=(4, 8, 8),
        guidance=source.table.guidance,
        conditions=source.table.conditions,
    )
    assert made.stages == plan.table.stages
    for name in ("guidance", "conditions", "space", "decoder", "encoder", "clamp"):
        assert getattr(made, name) == getattr(source.table, name)
    assert swift_spacing(with_samplers(source, (), "swift").table) == "linspace"
    with pytest.raises(ConfigError, match="1, 2, 4 or 8 steps"):
        planned(tiny_pipelines / "sd", 3, asked="portable")
    with pytest.raises(ConfigError, match="1, 2 or 3 steps"):
        planned(tiny_pipelines / "sd", 4, asked="swift")


def test_core_ml_gets_steps_that_swift_takes(tiny_pipelines, tmp_path) -> None:
    for asked, steps in ((2, 2), (4, 3), (8, 3)):
        made = planned(tiny_pipelines / "sd", asked, "onnx", "coreml")
        assert [len(table.rows) for table in made.samplers.values()] == [asked, steps]
        assert swift_spacing(made.further["swift"]) == "linspace"
        assert made.further["swift"].guidance == made.table.guidance
    assert planned(tiny_pipelines / "sd", 2, "coreml", asked="swift").further == {}
    velocity = with_scheduler(tiny_pipelines / "sd", tmp_path / "v", prediction_type="v_prediction")
    assert planned(velocity, 2, "coreml").further == {}


def test_a_distilled_student_keeps_its_samplers(tiny_pipelines, tmp_path) -> None:
    source = open_source(tiny_pipelines / "sd", num_steps=2)
    student = dataclasses.replace(source, root=tmp_path)
    student.write_manifest()
    assert with_samplers(student, ["coreml"]) is student


@pytest.mark.parametrize(("steps", "fraction"), [(3, "499.5"), (5, "749.25")])
def test_a_fraction_of_a_timestep_is_refused_before_openvino_would_be_told_it(
    steps: int, fraction: str, tiny_pipelines: Path, tmp_path: Path
) -> None:
    euler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
    root = with_scheduler(tiny_pipelines / "sd", tmp_path / "euler", **euler)
    options = ExportOptions(layout="single-root")
    student = planned(root, steps)
    message = (
        rf"row 1 of the sampler 'default' tells the network the timestep {fraction}, .*1, 2, 4, 8"
    )
    with pytest.raises(ContractError, match=message):
        export_student(student, tmp_path / "out", ["openvino"], options)
    assert not (tmp_path / "out").exists()
    check_jobs(student, jobs(["onnx"], options))
    # Of eight steps some are fractions, too, and a plan that all loaders take stands in.
    check_jobs(planned(root, 8), jobs(["openvino"], options))
    with pytest.raises(ContractError, match="with --scheduler portable, or .* --layout bundle"):
        check_jobs(planned(root, 8, asked="own"), jobs(["openvino"], options))


@pytest.mark.slow
def test_export_says_which_samplers_and_swift_has_nothing_to_say(
    tiny_pipelines, tmp_path, capsys
) -> None:
    source = with_scheduler(tiny_pipelines / "sd", tmp_path / "pndm", _class_name="PNDMScheduler")
    target = tmp_path / "out"
    export = ["export", "coreml", "-m", str(source), str(target), "--num-inference-steps", "4"]
    assert main(export) == 0
    printed = capsys.readouterr().out
    assert (
        "Sampler default: 4 steps of DDIMScheduler: no table makes the steps of its PNDM" in printed
    )
    assert "Sampler swift: 3 steps of DPMSolverMultistepScheduler" in printed
    assert check_layout(target, ["swift"]) == []
    bundle = Bundle.open(target)
    assert {path.name for path in (target / "coreml/Swift").iterdir()} == {*SOURCES, "golden.json"}
    assert read_json(target / "coreml/Swift/golden.json") == golden(bundle.samplers)
    # Another format joins with the same samplers, and nothing is written twice.
    joined = ["export", "onnx", *export[2:], "--json"]
    assert main(joined) == 0
    samplers = json.loads(capsys.readouterr().out)["samplers"]
    assert {name: item["steps"] for name, item in samplers.items()} == {"default": 4, "swift": 3}
    found = verify([Bundle.open(target)], runtimes=["onnxruntime", "coreml"])
    assert {item.sampler for item in found.artifacts} == {"default", "swift"}
    assert found.failures == ()
