"""Plans and what is said of the stock loaders: whose steps are the table's, and whose are not."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.files import read_json
from edgedistill.plans import Plan, portable, swift
from edgedistill.rows import analytic_row, ddim_row
from edgedistill.schedule import Schedule
from edgedistill.stock import LOADERS, genai_timesteps, loaders_for, objections, swift_spacing
from edgedistill.table import Blend, Condition, Next, SamplerTable
from edgedistill.validate import validate

# diffusers hands torch tensors to numpy 2 in a way that torch does not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (4, 8, 8)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PNDM = {"_class_name": "PNDMScheduler", "steps_offset": 1, **BETAS}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, **BETAS}
TWIN = {"_class_name": "SwiftDPMSolverMultistepScheduler"}


def against(scheduler: dict[str, Any], count: int, loader: str) -> tuple[str, ...]:
    return objections(scheduler, count)[loader]


def numbers(table: SamplerTable) -> np.ndarray:
    return np.array(
        [[row.feeds["timestep"], *row.x0, row.next.z, row.next.x0] for row in table.rows]
    )


def test_portable_plan_is_ddim_that_four_loaders_take() -> None:
    schedule = Schedule.from_config(DDIM)
    for count in (1, 2, 4, 8):
        plan = portable(PNDM, count, shape=SHAPE)
        assert plan.loaders[:4] == LOADERS[:4]
        assert ("swift" in plan.loaders) == (count == 1)
        times = [1000 * k // count - 1 for k in range(count, -1, -1)]
        expected = [ddim_row(schedule, t, s, "epsilon") for t, s in itertools.pairwise(times)]
        assert plan.table.rows == tuple(expected)
        assert validate(plan.table) == []


def test_swift_plan_is_the_packages_twin_and_diffusers_of_order_one() -> None:
    grids = {1: [999], 2: [999, 500], 3: [999, 666, 333]}
    for count, times in grids.items():
        plan = swift(PNDM, count, shape=SHAPE)
        assert plan.loaders == ("diffusers", "ort", "openvino", "swift")
        assert [row.feeds["timestep"] for row in plan.table.rows] == times
        twin = compile_scheduler(TWIN, count, shape=SHAPE)
        np.testing.assert_allclose(numbers(plan.table), numbers(twin), rtol=1e-12, atol=1e-12)
        assert validate(plan.table) == []


@pytest.mark.parametrize(("make", "count"), [(portable, 4), (swift, 3)])
def test_files_are_stock_ones(make: Any, count: int, tmp_path: Path) -> None:
    """diffusers builds the scheduler from the file without a word, and it has the table's timesteps."""
    diffusers = pytest.importorskip("diffusers")
    plan: Plan = make(PNDM, count, shape=SHAPE)
    plan.save(tmp_path)
    folder = tmp_path / "scheduler"
    name = read_json(folder / "scheduler_config.json")["_class_name"]
    scheduler = getattr(diffusers, name).from_pretrained(folder)
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == [row.feeds["timestep"] for row in plan.table.rows]
    assert all(
        scheduler.config[key] == value
        for key, value in plan.scheduler.items()
        if key != "_class_name"
    )


def test_plans_take_the_schedule_and_the_fields_of_a_table() -> None:
    cosine = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    plan = portable(
        {**cosine, "prediction_type": "v_prediction"}, 2, shape=SHAPE, network="net", clamp=(-1, 1)
    )
    assert (plan.table.networks, plan.table.clamp) == (("net",), (-1, 1))
    assert plan.scheduler["prediction_type"] == "v_prediction"
    assert plan.loaders == ("diffusers", "ort", "openvino")
    assert plan.objections["genai"] == (
        "`beta_schedule` of its DDIMScheduler must be 'linear' or 'scaled_linear', got 'squaredcos_cap_v2'",
    )
    latent = portable({"_class_name": "LCMScheduler"}, 1, shape=SHAPE)
    assert latent.scheduler["beta_end"] == 0.012


@pytest.mark.parametrize(
    ("make", "config", "count", "message"),
    [
        (portable, PNDM, 3, "1, 2, 4 or 8 steps, which divide the 1000 timesteps, got 3"),
        (portable, {**PNDM, "num_train_timesteps": 12}, 8, "divide the 12 timesteps"),
        (portable, {"_class_name": "EDMEulerScheduler"}, 2, "EDMEulerScheduler has no betas"),
        (swift, PNDM, 4, "1, 2 or 3 steps, got 4; .* ship SamplerTable.swift"),
        (swift, {**PNDM, "beta_end": 0.02}, 2, "`beta_end` must be 0.012 for the Swift package"),
        (swift, {**PNDM, "prediction_type": "sample"}, 2, "`prediction_type` must be 'epsilon'"),
        (swift, {**PNDM, "rescale_betas_zero_snr": True}, 2, "`rescale_betas_zero_snr` must be"),
    ],
)
def test_plans_refuse(make: Any, config: dict[str, Any], count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(config, count, shape=SHAPE)


def test_genai_rounds_its_timesteps_in_float32() -> None:
    trailing = {**DDIM, "timestep_spacing": "trailing"}
    wrong = [count for count in range(1, 33) if against(trailing, count, "genai")]
    assert wrong == [9, 11, 12, 16, 18, 21, 22, 30, 31, 32]
    assert against(trailing, 9, "genai") == (
        "its rounding makes timesteps 999, 888, 777, ... 221, 110, -1, and diffusers' 999, 888, 777, ... 332, 221, 110",
    )
    full = {**trailing, "steps_offset": 0}
    assert (len(genai_timesteps(full, 9)), len(genai_timesteps(full, 16))) == (10, 16)
    for cls in ("DDIMScheduler", "LCMScheduler"):
        leading = {**DDIM, "_class_name": cls, "timestep_spacing": "leading"}
        assert not any(against(leading, count, "genai") for count in range(1, 51)), cls
    # Its Euler tells the network whole timesteps, where diffusers tells it 499.5.
    euler = {**DDIM, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
    assert [count for count in range(1, 6) if against(euler, count, "genai")] == [3, 5]


def test_genai_names_what_it_cannot_run() -> None:
    lcm = {**DDIM, "_class_name": "LCMScheduler"}
    for config, words in (
        (
            {**lcm, "prediction_type": "sample"},
            "`prediction_type` of its LCMScheduler must be 'epsilon'",
        ),
        ({**lcm, "rescale_betas_zero_snr": True, "prediction_type": "sample"}, "rescale_betas"),
        ({**DDIM, "clip_sample": True}, "`clip_sample` of its DDIMScheduler must be False"),
        ({**DDIM, "_class_name": "TCDScheduler"}, "it has no TCDScheduler"),
        ({**DDIM, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "karras"),
    ):
        found = against(config, 4, "genai")
        assert words in " ".join(found), config
        assert objections(config, 4)["diffusers"] == ()


def test_swift_takes_diffusers_solver_where_grid_and_orders_agree() -> None:
    solver = {"_class_name": "DPMSolverMultistepScheduler", **BETAS}
    fits = [count for count in range(1, 26) if not against(solver, count, "swift")]
    assert fits == [1, 2, 15, 16, 17, 19, 20, 21, 22, 23, 25]
    assert "at step 1 its" in against(solver, 3, "swift")[0]
    for spacing in ("linspace", "leading", "karras"):
        table = compile_scheduler({**TWIN, "timestep_spacing": spacing}, 4, shape=SHAPE)
        assert swift_spacing(table) == spacing
    assert swift_spacing(compile_scheduler(DDIM, 4, shape=SHAPE)) is None


def test_a_table_that_is_not_the_files_is_found() -> None:
    other = portable(PNDM, 4, shape=SHAPE).table
    leading = {**DDIM, "timestep_spacing": "leading"}
    for loader in ("diffusers", "ort", "openvino", "genai"):
        (reason,) = objections(leading, 4, other)[loader]
        assert reason == "at step 0 its timestep is 750, and the table's 999"
    (reason,) = objections(leading, 2, other)["diffusers"]
    assert reason == "it takes 2 steps, and the table has 4"
    noisy = compile_scheduler({**DDIM, "timestep_spacing": "trailing"}, 4, shape=SHAPE, eta=1.0)
    assert "share of" in objections({**DDIM, "timestep_spacing": "trailing"}, 4, noisy)["ort"][0]


def test_a_step_may_be_split_up_in_any_way() -> None:
    made = portable(PNDM, 2, shape=SHAPE).table
    (stage,) = made.stages
    rows = []
    for row in stage.rows:
        (a_z, a_r), after = row.x0, row.next
        split = Next(z=after.z + after.x0 * a_z, raw=after.x0 * a_r)
        rows.append(replace(row, next=split))
    other = replace(made, stages=(replace(stage, rows=tuple(rows)),))
    assert objections(portable(PNDM, 2, shape=SHAPE).scheduler, 2, other)["genai"] == ()


def test_what_no_stock_pipeline_does_is_told_of_every_loader() -> None:
    made = portable(PNDM, 2, shape=SHAPE).table
    (stage,) = made.stages
    one, two = stage.rows
    schedule = Schedule.from_config(PNDM)
    image, mask = (
        Condition("image", "image", shape=SHAPE, value_range=(-1.0, 1.0)),
        Condition("mask", "mask", shape=(1, 8, 8)),
    )
    for rows, words in (
        ((analytic_row(schedule, 999, 499), two), "row 0 calls no network"),
        ((replace(one, feeds={"timestep": 999.0, "step": 3.0}), two), "row 0 feeds timestep, step"),
        ((one, replace(two, blend=Blend(1.0))), "row 1 blends"),
    ):
        table = replace(made, stages=(replace(stage, rows=rows),), conditions=(image, mask))
        found = objections(DDIM, 2, table)
        assert list(found) == list(LOADERS)
        assert all(words in reasons[0] for reasons in found.values())
    second = replace(stage, carry="identity", init_noise=(0.0, 1))
    table = replace(made, stages=(stage, second), noise_count=2)
    assert "2 stages" in objections(DDIM, 4, table)["swift"][0]


def test_who_runs_a_controlnet_before_the_denoiser() -> None:
    shapes = {"shape": SHAPE, "network": ("controlnet", "unet")}
    table = compile_scheduler(TWIN, 2, **shapes)
    found = objections(DDIM, 2, compile_scheduler(DDIM, 2, **shapes))
    for name in ("ort", "openvino", "genai"):
        assert found[name][0] == "it has no pipeline that calls controlnet beside the denoiser"
    assert loaders_for(table) == ("diffusers", "swift")
    assert found["diffusers"] == objections(TWIN, 2, table)["swift"] == ()
    guide = compile_scheduler(DDIM, 2, shape=SHAPE, network=("guide", "unet"))
    assert loaders_for(guide) == ()
    assert "calls guide beside" in objections(DDIM, 2, guide)["diffusers"][0]


def test_unknown_schedulers_are_known_to_no_loader() -> None:
    found = objections(PNDM, 4)
    assert all("PNDMScheduler" in reasons[0] for reasons in found.values())
