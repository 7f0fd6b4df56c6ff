"""Schedulers: settings that loaders ignore or do otherwise, and the steps of the sampler tables."""

import pytest

from edgedistill.layout.checking import check_layout
from edgedistill.layout.folder import INDEX, SCHEDULER
from edgedistill.stock import LOADERS

NOT_COMPILED = ("PNDM", "EulerAncestralDiscrete", "LMSDiscrete")

# Keys that change the steps of DDIM and LCM, another value, and what is told of it; then those of LCM alone.
ACTING = (
    ("num_train_timesteps", 500, "its timestep is 499, and the table's 999"),
    ("beta_start", 0.001, "share of the state"),
    ("beta_end", 0.02, "share of the state"),
    ("beta_schedule", "linear", "share of the state"),
    ("prediction_type", "v_prediction", "share of the state"),
    ("rescale_betas_zero_snr", True, "alpha is 0"),
)
ACTING_IN_LCM = (
    ("original_inference_steps", 40, "share of the state"),
    ("timestep_scaling", 0.01, "share of the state"),
    ("clip_sample", True, "share of the state"),
    ("thresholding", True, "`thresholding` of a LCMScheduler must be False"),
)


def named(name, **keys):
    """Return the change to another class of scheduler."""
    return {SCHEDULER: {"_class_name": name, **keys}, INDEX: {"scheduler": ["diffusers", name]}}


# fmt: off
ERRORS = [
    ({SCHEDULER: {"clip_sample": True}}, "sd", LOADERS[:4], SCHEDULER, "`clip_sample` false", "True"),
    ({SCHEDULER: {"clip_sample": ...}}, "sd", LOADERS[:4], SCHEDULER, "`clip_sample` false", "which is true"),
    ({SCHEDULER: {"thresholding": True}}, "sd", ["genai"], SCHEDULER, "`thresholding` false", "True"),
    ({SCHEDULER: {"beta_schedule": "squaredcos_cap_v2"}}, "sd", ["genai"], SCHEDULER, "scaled_linear", "'squaredcos_cap_v2'"),
    ({SCHEDULER: {"timestep_spacing": "karras"}}, "sd", ["genai"], SCHEDULER, "trailing", "'karras'"),
    *((named(f"{name}Scheduler"), "sd", ["genai"], SCHEDULER, "`_class_name` to be one of LCMScheduler", f"'{name}Scheduler'") for name in ("DDPM", "DPMSolverMultistep", "UniPCMultistep", "TCD", "HeunDiscrete")),
    *(({SCHEDULER: {"prediction_type": kind}}, "lcm", ["genai"], SCHEDULER, "'epsilon' with LCMScheduler", f"'{kind}'") for kind in ("v_prediction", "sample")),
    (named("DDIMScheduler"), "lcm", LOADERS[:3], SCHEDULER, "LCMScheduler in a", "'DDIMScheduler'"),
    ({SCHEDULER: {"timestep_spacing": "leading"}}, "sd", LOADERS[:4], SCHEDULER, "the 2 steps of sampler.json", "the table's 999"),
    *(({SCHEDULER: {key: value}}, kind, LOADERS[:4], SCHEDULER, f"the {steps} steps of sampler.json", found) for kind, steps in (("sd", 2), ("lcm", 4)) for key, value, found in ACTING),
    *(({SCHEDULER: {key: value}}, "lcm", LOADERS[:4], SCHEDULER, "the 4 steps of sampler.json", found) for key, value, found in ACTING_IN_LCM),
    ({SCHEDULER: {"set_alpha_to_one": False}}, "sd", LOADERS[:4], SCHEDULER, "the 2 steps of sampler.json", "at step 1 its share of the state"),
    *(({SCHEDULER: {key: value}}, "sd", ["swift"], SCHEDULER, f"`{key}`", repr(value)) for key, value in (("beta_start", 0.001), ("beta_end", 0.02), ("beta_schedule", "linear"), ("num_train_timesteps", 500), ("prediction_type", "v_prediction"))),
    ({"samplers/swift.json": "{"}, "sd", LOADERS, "samplers/swift.json", "whole", "not a JSON file"),
]
WARNINGS = [
    *(({SCHEDULER: {key: ...}}, kind, LOADERS[:4], SCHEDULER, f"`{key}`", "no such key") for kind in ("sd", "lcm") for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")),
    *((named(f"{name}Scheduler"), "sd", LOADERS[:4], SCHEDULER, "the 2 steps of sampler.json", "not known") for name in NOT_COMPILED),
    ({"samplers": ...}, "sd", ["swift"], "sampler.json", "linspace with 1, 2, 3 steps", "none"),
]
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_a_scheduler_or_a_table_that_a_loader_does_not_follow_is_found(assert_found, case):
    assert_found("error", case)


@pytest.mark.parametrize("case", WARNINGS)
def test_what_is_not_known_of_a_scheduler_is_found(assert_found, case):
    assert_found("warning", case)


@pytest.mark.parametrize("steps", [9, 11, 12, 18, 21, 22, 30])
def test_a_number_of_steps_that_genai_spaces_below_zero_is_found(assert_found, table, steps):
    changes = {"sampler.json": table(steps)}
    assert_found("error", (changes, "sd", ["genai"], SCHEDULER, f"the {steps} steps", "-1"))


def test_a_table_between_whole_time_steps_is_found(assert_found, table):
    further = ("clip_sample", "set_alpha_to_one", "steps_offset", "thresholding")
    keys = {"timestep_spacing": "linspace", **dict.fromkeys(further, ...)}
    changes = named("EulerDiscreteScheduler", **keys)
    changes["sampler.json"] = table(5, **changes[SCHEDULER])
    assert_found("error", (changes, "sd", ["swift"], "sampler.json", "whole time steps", "749.25"))


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_a_scheduler_that_genai_has_is_no_error(folder, name):
    root = folder(named(f"{name}Scheduler"))
    assert [item for item in check_layout(root, LOADERS) if item.level == "error"] == []
