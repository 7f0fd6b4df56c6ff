"""The compiler: what ends up in the table, and what it refuses (the numbers: tests/property/test_schedulers.py)."""

import json
import math
from typing import Any

import pytest

from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.rows import ddim_row
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, Guidance, Next, SamplerTable

SHAPE = (3, 8, 8)
DDIM = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.39.0",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def test_ddim_rows_are_those_of_the_row_builder() -> None:
    schedule = Schedule.from_config(DDIM)
    table = compile_scheduler(DDIM, 2, shape=SHAPE, network="student", clamp=(-1.0, 1.0))
    assert table.rows == tuple(
        ddim_row(schedule, t, s, "v_prediction", network="student")
        for t, s in ((999, 499), (499, -1))
    )
    assert (table.nfe, table.noise_count, table.clamp) == (2, 1, (-1.0, 1.0))
    assert table.stages[0].shape == SHAPE


def test_annotations_hold_what_the_table_was_made_from_as_json() -> None:
    config = {**DDIM, "lambda_min_clipped": -math.inf, "trained_betas": None}
    table = compile_scheduler(config, 4, shape=SHAPE, prediction_type="sample", eta=0.5)
    public = {
        k: v for k, v in config.items() if k not in ("_diffusers_version", "lambda_min_clipped")
    }
    assert table.annotations == {
        "scheduler": public,
        "prediction_type": "sample",
        "num_steps": 4,
        "eta": 0.5,
    }
    text = json.dumps(table.to_json(), allow_nan=False)
    assert SamplerTable.from_json(json.loads(text)) == table


def test_guidance_makes_every_row_call_twice() -> None:
    guidance = Guidance("cfg", None, 2.5, (1.0, 4.0), {"class_labels": 10})
    conditions = (Condition("class_labels", "class", 10),)
    table = compile_scheduler(DDIM, 4, shape=SHAPE, guidance=guidance, conditions=conditions)
    assert [row.guidance_scale for row in table.rows] == [2.5] * 4
    assert table.nfe == 8


def test_each_sampler_asks_for_the_noise_that_it_uses() -> None:
    for name, eta, count in (
        ("DDIMScheduler", 0.0, 1),
        ("DDIMScheduler", 1.0, 4),
        ("LCMScheduler", 0.0, 4),
        ("TCDScheduler", 0.0, 1),
        ("TCDScheduler", 0.3, 4),
        ("EulerDiscreteScheduler", 0.0, 1),
        ("DPMSolverMultistepScheduler", 0.0, 1),
    ):
        table = compile_scheduler({}, 4, shape=SHAPE, scheduler_class=name, eta=eta)
        assert table.noise_count == count, name


def test_solvers_look_back_as_far_as_their_order_says() -> None:
    for order, expected in ((1, [0, 0, 0, 0, 0]), (2, [0, 1, 1, 1, 0]), (3, [0, 1, 2, 1, 0])):
        for name in ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"):
            config = {"_class_name": name, "solver_order": order}
            table = compile_scheduler(config, 5, shape=SHAPE)
            assert [len(row.next.previous) for row in table.rows] == expected


def test_edm_rows_scale_and_tell_what_the_network_was_trained_on() -> None:
    table = compile_scheduler({"_class_name": "EDMEulerScheduler"}, 4, shape=SHAPE)
    assert table.annotations["prediction_type"] == "edm"
    levels = (80.0, 9.723, 0.4700, 0.002)
    for row, level in zip(table.rows, levels, strict=True):
        assert row.feeds["timestep"] == pytest.approx(math.log(level) / 4, rel=1e-3)
        assert row.in_scale == pytest.approx(1 / math.sqrt(level**2 + 0.25), rel=1e-3)
        assert row.x0[0] == pytest.approx(0.25 / (level**2 + 0.25), rel=2e-3)
    assert table.rows[-1].next == Next(z=0.0, x0=1.0)
    assert [table.rows[0].note["t"], table.rows[-1].note["t"]] == [999.0, 0.0]


def test_a_flow_walks_straight_from_noise_to_data() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 10}
    table = compile_scheduler(config, 10, shape=SHAPE)
    for row, sigma in zip(table.rows, range(10, 0, -1), strict=True):
        assert row.feeds == {"timestep": pytest.approx(sigma, rel=1e-6)}
        assert row.x0 == pytest.approx((1.0, -sigma / 10), rel=1e-6)
        assert row.next.z == pytest.approx((sigma - 1) / sigma, rel=1e-6)
        assert row.note["t"] == pytest.approx(sigma - 1, abs=1e-6)


def test_a_table_may_call_several_networks_in_order() -> None:
    table = compile_scheduler(DDIM, 2, shape=SHAPE, network=("guide", "unet"))
    assert [row.call for row in table.rows] == [("guide", "unet")] * 2
    assert table.networks == ("guide", "unet")


def test_a_first_order_solver_is_ddim_where_their_timesteps_agree() -> None:
    dpm = {**DDIM, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}
    for ours, theirs in zip(
        compile_scheduler(dpm, 4, shape=SHAPE).rows,
        compile_scheduler(DDIM, 4, shape=SHAPE).rows,
        strict=True,
    ):
        assert ours.x0 == pytest.approx(theirs.x0, abs=1e-6)
        assert (ours.next.z, ours.next.x0) == pytest.approx(
            (theirs.next.z, theirs.next.x0), abs=1e-6
        )


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({}, 4, "Scheduler 'None' cannot be compiled; choose one of DDIMScheduler, "),
        ({"_class_name": "PNDMScheduler"}, 4, "Scheduler 'PNDMScheduler' cannot be compiled"),
        ({**DDIM, "thresholding": True}, 4, "`thresholding` of a DDIMScheduler must be False"),
        ({**DDIM, "prediction_type": "flow_prediction"}, 4, "must be 'epsilon' or 'sample' or"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, 4, "must be epsilon"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}, 4, r"must be 0\.5, got 1\.0"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True},
            4,
            "`stochastic_sampling` of a FlowMatchEulerDiscreteScheduler must be False",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 1001, r"lie in \[1, 1000\], got 1001"),
        ({"_class_name": "EDMEulerScheduler"}, 0, r"lie in \[1, 1000\], got 0"),
        ({**DDIM, "timestep_spacing": "even"}, 4, "`timestep_spacing` must be one of"),
        (
            {"_class_name": "DDIMScheduler", "steps_offset": "one"},
            4,
            "is not as diffusers writes it",
        ),
        (DDIM, 0, r"number of steps must lie in \[1, 1000\]"),
        (DDIM, 1001, r"number of steps must lie in \[1, 1000\]"),
        ({"_class_name": "LCMScheduler"}, 51, r"number of steps must lie in \[1, 50\], got 51"),
        (
            {"_class_name": "LCMScheduler", "original_inference_steps": 1001},
            4,
            r"number of steps must lie in \[1, 1000\], got 1001",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True},
            4,
            "`use_exponential_sigmas` of a EulerDiscreteScheduler must be False",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "one"},
            4,
            "`final_sigmas_type` .* must be 'zero' or 'sigma_min'",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            4,
            "`timestep_type` .* must be 'discrete'",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4},
            4,
            "`solver_order` of a DPMSolverMultistepScheduler must be 1 or 2 or 3",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            4,
            r"`algorithm_type` .* must be 'dpmsolver\+\+'",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "leading"},
            1000,
            "do not fall at every row; take fewer steps",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "even"},
            4,
            "`timestep_spacing` must be leading",
        ),
    ],
)
def test_refusals(config: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_scheduler(config, steps, shape=SHAPE)


def test_epsilon_at_zero_terminal_snr_is_refused() -> None:
    config = {**DDIM, "rescale_betas_zero_snr": True, "prediction_type": "epsilon"}
    with pytest.raises(ConfigError, match="At timestep 999 alpha is 0"):
        compile_scheduler(config, 4, shape=SHAPE)
