"""The validator: a table that says what its annotations say, and every single number that does not."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.rows import ddim_row, jump_and_noise_row, renoise_row, return_x0_row
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, Guidance, Next, Row, SamplerTable, Stage
from edgedistill.validate import check, validate

SHAPE = (1, 8, 8)
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COMPILED = {
    "ddim": compile_scheduler(
        {"_class_name": "DDIMScheduler", **SCALED}, 4, shape=SHAPE, eta=0.5, clamp=(-1.0, 1.0)
    ),
    "lcm": compile_scheduler({"_class_name": "LCMScheduler"}, 4, shape=SHAPE),
    "tcd": compile_scheduler({"_class_name": "TCDScheduler"}, 4, shape=SHAPE, eta=0.3),
    "euler": compile_scheduler({"_class_name": "EulerDiscreteScheduler", **SCALED}, 4, shape=SHAPE),
    "dpm": compile_scheduler(
        {"_class_name": "DPMSolverMultistepScheduler", **SCALED},
        4,
        shape=SHAPE,
        prediction_type="v_prediction",
    ),
    "cfg": compile_scheduler(
        {"_class_name": "DDIMScheduler", "clip_sample": False},
        2,
        shape=SHAPE,
        guidance=Guidance("cfg", None, 2.0, (1.0, 4.0), {"class_labels": 10}),
        conditions=(Condition("class_labels", "class", 10),),
    ),
}


def method_table(**changes: Any) -> SamplerTable:
    schedule = Schedule.from_config(SCALED)
    rows = (
        ddim_row(schedule, 999, 749, "v_prediction"),
        jump_and_noise_row(schedule, 749, 249, 499, "v_prediction", 1),
        renoise_row(schedule, 499, 249, "v_prediction", 2),
        return_x0_row(schedule, 249, "v_prediction"),
    )
    annotations = {"method": "test", "scheduler": SCALED, "prediction_type": "v_prediction"}
    whole = {"rows": rows, "annotations": annotations, **changes}
    return SamplerTable((Stage(SHAPE, whole["rows"]),), 3, annotations=whole["annotations"])


TABLES = {**COMPILED, "method": method_table()}


def put(table: SamplerTable, index: int, **changes: Any) -> SamplerTable:
    stage = table.stages[0]
    row = dataclasses.replace(stage.rows[index], **changes)
    rows = (*stage.rows[:index], row, *stage.rows[index + 1 :])
    return dataclasses.replace(table, stages=(dataclasses.replace(stage, rows=rows),))


def mutations(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """Move each number of a row by a hundred-thousandth, one at a time."""

    def moved(value: float) -> float:
        return value + 1e-5 * max(1.0, abs(value))

    for name in row.feeds:
        yield f"feeds.{name}", {"feeds": {**row.feeds, name: row.feeds[name] + 1}}
    yield "in_scale", {"in_scale": moved(row.in_scale)}
    if row.guidance_scale is not None:
        yield "guidance_scale", {"guidance_scale": moved(row.guidance_scale)}
    for i in range(2):
        yield f"x0[{i}]", {"x0": tuple(moved(v) if i == j else v for j, v in enumerate(row.x0))}
        if row.clip is not None:
            clip = tuple(moved(v) if i == j else v for j, v in enumerate(row.clip))
            yield f"clip[{i}]", {"clip": clip}
    for name in ("z", "x0", "raw", *(["noise"] if row.noise is not None else [])):
        yield (
            name,
            {"next": dataclasses.replace(row.next, **{name: moved(getattr(row.next, name))})},
        )
    for i in range(len(row.next.previous)):
        previous = tuple(moved(v) if i == j else v for j, v in enumerate(row.next.previous))
        yield f"previous[{i}]", {"next": dataclasses.replace(row.next, previous=previous)}


@pytest.mark.parametrize("name", TABLES)
def test_a_made_table_is_right_and_stays_so_through_json(name: str) -> None:
    table = TABLES[name]
    assert validate(table) == []
    assert validate(SamplerTable.from_json(table.to_json())) == []


@pytest.mark.parametrize("name", TABLES)
def test_every_single_wrong_number_is_found(name: str) -> None:
    table = TABLES[name]
    seen = 0
    for index, row in enumerate(table.rows):
        for what, change in mutations(row):
            assert validate(put(table, index, **change)), f"row {index}: {what} passed"
            seen += 1
    assert seen >= 7 * len(table.rows)


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_note_is_found(name: str) -> None:
    table = TABLES[name]
    for index, row in enumerate(table.rows):
        for key in ("t", "s"):
            note = {**row.note, key: row.note[key] + 1}
            assert validate(put(table, index, note=note)), f"row {index}: note {key} passed"


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_first_noise_is_found(name: str) -> None:
    table = TABLES[name]
    stage = dataclasses.replace(
        table.stages[0], init_noise=(table.stages[0].init_noise[0] * 1.01, 0)
    )
    problems = validate(dataclasses.replace(table, stages=(stage,)))
    assert len(problems) == 1
    assert "the first noise is scaled by" in problems[0]


def test_another_schedule_or_prediction_type_is_found() -> None:
    for key, value in (
        ("scheduler", {**SCALED, "beta_end": 0.0121}),
        ("prediction_type", "epsilon"),
    ):
        annotations = {**method_table().annotations, key: value}
        assert validate(method_table(annotations=annotations))


def test_times_that_rise_are_found() -> None:
    schedule = Schedule.from_config(SCALED)
    rows = (ddim_row(schedule, 499, 249, "epsilon"), ddim_row(schedule, 749, -1, "epsilon"))
    annotations = {"scheduler": SCALED, "prediction_type": "epsilon"}
    table = SamplerTable((Stage(SHAPE, rows),), 1, annotations=annotations)
    assert validate(table) == ["times must fall from row to row, got [499.0, 749.0]"]


def test_a_clamp_that_is_not_the_pixels_range_is_found() -> None:
    (problem,) = validate(dataclasses.replace(TABLES["ddim"], clamp=(0.0, 1.0)))
    assert problem == "the output is clamped to (0.0, 1.0), and the pixels' range is (-1.0, 1.0)"


@pytest.mark.parametrize(
    ("annotations", "problem"),
    [
        ({}, "the annotations must hold the configuration of the `scheduler`"),
        ({"scheduler": SCALED, "prediction_type": "noise"}, "`prediction_type` must be one of"),
        ({"scheduler": SCALED}, "`prediction_type` must be one of"),
        (
            {"scheduler": {"beta_start": "low"}, "prediction_type": "epsilon"},
            "betas are not numbers",
        ),
    ],
)
def test_annotations_that_cannot_be_read_are_a_problem(
    annotations: dict[str, Any], problem: str
) -> None:
    found = validate(method_table(annotations=annotations))
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize("note", [{}, {"kind": "ddim"}, {"kind": [], "t": 1, "s": 0}])
def test_notes_that_cannot_be_read_are_a_problem(note: dict[str, Any]) -> None:
    assert validate(put(method_table(), 0, note=note))


def test_a_row_without_a_call_is_not_derived_from_a_note_that_calls() -> None:
    table = put(method_table(), 0, call=(), next=Next(z=1.0))
    assert any("calls one network" in item for item in validate(table))


def test_check_raises_with_the_first_problems() -> None:
    check(TABLES["ddim"])
    wrong = put(TABLES["ddim"], 0, x0=(1.0, -1.0))
    with pytest.raises(
        ConfigError, match=r"^sampler\.json: row 0: x0\[0\] is 1\.0, and .* again\.$"
    ):
        check(wrong, "sampler.json")
