"""The validator: a table that says what its annotations say, and every single number that does not."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.router import Router
from edgedistill.rows import (
    analytic_row,
    boundary_row,
    ddim_row,
    jump_and_noise_row,
    jump_label,
    multistep_row,
    renoise_row,
    return_x0_row,
)
from edgedistill.schedule import Schedule
from edgedistill.solvers import multistep_rows
from edgedistill.table import Blend, Condition, Guidance, Next, Row, SamplerTable, Stage
from edgedistill.validate import check, validate

SHAPE = (1, 8, 8)
PICTURE = Condition("image", "image", shape=SHAPE, value_range=(-1.0, 1.0))
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


EDM = {"_class_name": "EDMEulerScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
COMPILED |= {
    "edm euler": compile_scheduler(EDM, 4, shape=SHAPE),
    "edm dpm": compile_scheduler(
        {"_class_name": "EDMDPMSolverMultistepScheduler", "solver_order": 3}, 5, shape=SHAPE
    ),
    "flow": compile_scheduler(FLOW, 4, shape=SHAPE),
    "guide": compile_scheduler(
        {"_class_name": "EulerDiscreteScheduler"}, 4, shape=SHAPE, network=("guide", "unet")
    ),
}


def wrapped(
    config: dict[str, Any], kind: str, rows: Iterable[Row], noises: int = 1, **fields: Any
) -> SamplerTable:
    """Wrap rows as a training method does."""
    first = Schedule.from_config(config).first_scale
    stage = {"init_noise": (first, 0), **fields.pop("stage", {})}
    annotations = {"scheduler": config, "prediction_type": kind, **fields.pop("annotations", {})}
    stages = (Stage(SHAPE, tuple(rows), **stage),)
    return SamplerTable(stages, noises, annotations=annotations, **fields)


def gamma_table() -> SamplerTable:
    """CTM: jumps that tell the network where they go."""
    schedule = Schedule.from_config(EDM)
    times = schedule.polynomial(5)
    rows = [
        jump_and_noise_row(schedule, t, jump_label(schedule, s, 0.3), s, "edm", i, target_feed="s")
        for i, (t, s) in enumerate(itertools.pairwise(times), start=1)
    ]
    return wrapped(EDM, "edm", rows, noises=4)


def stamps_table() -> SamplerTable:
    """SFD-v: a row without a call, then rows that tell the network how many there are."""
    schedule = Schedule.from_config(EDM)
    a, b, c, d = schedule.polynomial(4, sigma_min=0.006)
    told = {"feeds": {"step": 4.0}}
    rows = [
        analytic_row(schedule, a, b),
        ddim_row(schedule, b, c, "edm", **told),
        ddim_row(schedule, c, d, "edm", **told),
    ]
    return wrapped(EDM, "edm", rows)


def boundary_table() -> SamplerTable:
    """CoDi."""
    schedule = Schedule.from_config(SCALED)
    times = itertools.pairwise((980, 720, 460, 200, 0))
    return wrapped(
        SCALED, "v_prediction", [boundary_row(schedule, t, s, "v_prediction") for t, s in times]
    )


def encoding_table() -> SamplerTable:
    """From an image to the noise that it comes from."""
    schedule = Schedule.from_config(SCALED)
    times = itertools.pairwise((0, 250, 500, 999))
    return wrapped(
        SCALED,
        "epsilon",
        [ddim_row(schedule, t, s, "epsilon") for t, s in times],
        stage={"init_noise": (0.0, 0), "init_image": (1.0, "image")},
        annotations={"direction": "encode"},
        conditions=(PICTURE,),
    )


def edit_table() -> SamplerTable:
    """From a noised image, with its known part put back after every row."""
    schedule = Schedule.from_config(FLOW)
    alpha, sigma = schedule.alpha_sigma(600)
    known = schedule.alpha_sigma(200)
    rows = [
        replace(ddim_row(schedule, 600, 200, "flow"), blend=Blend(*known, index=1)),
        replace(ddim_row(schedule, 200, 0, "flow"), blend=Blend(1.0)),
    ]
    return wrapped(
        FLOW,
        "flow",
        rows,
        noises=2,
        stage={"init_noise": (sigma, 0), "init_image": (alpha, "image")},
        conditions=(PICTURE, Condition("mask", "mask", shape=SHAPE)),
    )


def stages_table(*, noised: bool) -> SamplerTable:
    """Two resolutions: the small picture is a network input, or is noised and gone on with."""
    schedule = Schedule.from_config(FLOW)
    small = [ddim_row(schedule, 999, -1, "flow", feeds={"r": 0.5})]
    t = 500 if noised else 999
    large = (
        renoise_row(schedule, t, 300, "flow", 2 if noised else 3, feeds={"r": 1.0}),
        ddim_row(schedule, 300, -1, "flow", feeds={"r": 1.0}),
    )
    alpha, sigma = schedule.alpha_sigma(t)
    told: dict[str, Any] = {"carry_to": "image", "carry_noise": (0.1, 2)}
    carry = {"init_noise": (sigma, 1), "carry_scale": alpha} if noised else told
    stages = (
        Stage((1, 4, 4), tuple(small)),
        Stage(SHAPE, large, **{"init_noise": (1.0, 1), "carry": "up_nearest", **carry}),
    )
    annotations = {"scheduler": FLOW, "prediction_type": "flow"}
    return SamplerTable(stages, 3 if noised else 4, annotations=annotations)


def routed_table() -> SamplerTable:
    return wrapped(
        SCALED,
        "epsilon",
        [ddim_row(Schedule.from_config(SCALED), 999, -1, "epsilon")],
        router=Router("class_table", "class_labels", 2, (0, 1)),
        conditions=(Condition("class_labels", "class", 2),),
    )


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


TABLES = {
    **COMPILED,
    "method": method_table(),
    "gamma": gamma_table(),
    "stamps": stamps_table(),
    "boundary": boundary_table(),
    "multistep": wrapped(
        EDM, "edm", multistep_rows(Schedule.from_config(EDM), (999, 700, 500, 200, 9), "edm")
    ),
    "encoding": encoding_table(),
    "edit": edit_table(),
    "stages": stages_table(noised=False),
    "noised stages": stages_table(noised=True),
    "routed": routed_table(),
}


def put(table: SamplerTable, index: int, **changes: Any) -> SamplerTable:
    rows = list(table.rows)
    rows[index] = replace(rows[index], **changes)
    stages = [replace(stage, rows=tuple(rows.pop(0) for _ in stage.rows)) for stage in table.stages]
    return replace(table, stages=tuple(stages))


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
    used = {"z": True, "x0": row.call, "raw": row.call, "noise": row.noise is not None}
    for name in (name for name, is_used in used.items() if is_used):
        yield (
            name,
            {"next": replace(row.next, **{name: moved(getattr(row.next, name))})},
        )
    for i in range(len(row.next.previous)):
        previous = tuple(moved(v) if i == j else v for j, v in enumerate(row.next.previous))
        yield f"previous[{i}]", {"next": replace(row.next, previous=previous)}
    for name in () if row.blend is None else ("known", "noise")[: 1 + bool(row.blend.noise)]:
        yield f"blend.{name}", {"blend": replace(row.blend, **{name: moved(vars(row.blend)[name])})}


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
    assert seen >= 7 * sum(bool(row.call) for row in table.rows)


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_note_is_found(name: str) -> None:
    table = TABLES[name]
    for index, row in enumerate(table.rows):
        for key in ("t", "k", "s"):
            if key not in row.note:
                continue
            note = {**row.note, key: row.note[key] + 1}
            assert validate(put(table, index, note=note)), f"row {index}: note {key} passed"


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_start_is_found(name: str) -> None:
    table = TABLES[name]
    for place, stage in enumerate(table.stages):
        changes: list[dict[str, Any]] = [
            {"init_noise": (stage.init_noise[0] + 0.01, stage.init_noise[1])}
        ]
        if stage.init_image is not None:
            changes.append({"init_image": (stage.init_image[0] * 0.99, "image")})
        if stage.carry is not None and stage.carry_to is None:
            changes.append({"carry_scale": stage.carry_scale * 0.99})
        for change in changes:
            stages = list(table.stages)
            stages[place] = replace(stage, **change)
            problems = validate(replace(table, stages=tuple(stages)))
            assert len(problems) == 1
            assert "the first noise is scaled by" in problems[0]


def test_a_state_may_start_with_the_noise_of_its_time() -> None:
    """A sampler that starts below the last label of EDM starts from less noise."""
    schedule = Schedule.from_config(EDM)
    rows = [ddim_row(schedule, 700, -1, "edm")]
    start = {"init_noise": (float(schedule.sigmas[700]), 0)}
    assert validate(wrapped(EDM, "edm", rows, stage=start)) == []


def test_a_row_that_looks_back_on_other_rows_is_found() -> None:
    schedule = Schedule.from_config(EDM)
    rows = [
        ddim_row(schedule, 900, 700, "edm"),
        multistep_row(schedule, 700, 500, "edm", past=(800,)),
    ]
    assert validate(wrapped(EDM, "edm", rows)) == [
        "a row at t=700.0 looks back on [800], and the rows before it are at [900.0]"
    ]


def test_a_row_that_calls_other_networks_is_found() -> None:
    for name in ("guide", "boundary"):
        table = put(TABLES[name], 1, call=("unet", "guide"))
        assert any("call the same networks" in item for item in validate(table))


def test_an_encoder_must_say_so_and_rise() -> None:
    table = encoding_table()
    decoding = replace(table, annotations={**table.annotations, "direction": "decode"})
    assert any("s <= t" in item for item in validate(decoding))
    (problem,) = validate(replace(table, clamp=(-1.0, 1.0)))
    assert problem == "a table that encodes returns noise, which is not clamped"
    turned = replace(table.stages[0], rows=table.rows[::-1])
    assert any("times must rise" in item for item in validate(replace(table, stages=(turned,))))


def test_another_target_of_the_jump_is_found() -> None:
    row = gamma_table().rows[0]
    feeds = {**row.feeds, "s": float(Schedule.from_config(EDM).feeds[row.note["s"]])}
    (problem,) = validate(put(gamma_table(), 0, feeds=feeds))
    assert "row 0: feeds.s is" in problem


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
    (problem,) = validate(replace(TABLES["ddim"], clamp=(0.0, 1.0)))
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


@pytest.mark.parametrize(
    "note",
    [
        {},
        {"kind": "ddim"},
        {"kind": [], "t": 1, "s": 0},
        {"kind": "ddim", "t": 5000, "s": 0},
        {"kind": "multistep", "t": 999, "s": 749, "past": 3},
        {"kind": "ddim", "t": 999, "s": 749, "feeds": 3},
        {"kind": "ddim", "t": 999, "s": 749, "target_feed": "timestep"},
    ],
)
def test_notes_that_cannot_be_read_are_a_problem(note: dict[str, Any]) -> None:
    assert validate(put(method_table(), 0, note=note))


def test_a_row_without_a_call_is_not_derived_from_a_note_that_calls() -> None:
    table = put(method_table(), 0, call=(), next=Next(z=1.0))
    assert any("of kind 'ddim' calls a network, got []" in item for item in validate(table))


def test_check_raises_with_the_first_problems() -> None:
    check(TABLES["ddim"])
    wrong = put(TABLES["ddim"], 0, x0=(1.0, -1.0))
    with pytest.raises(
        ConfigError, match=r"^sampler\.json: row 0: x0\[0\] is 1\.0, and .* again\.$"
    ):
        check(wrong, "sampler.json")
