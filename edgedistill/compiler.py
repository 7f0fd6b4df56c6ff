"""Sampler tables from diffusers scheduler configurations."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import numpy as np

from edgedistill.errors import ConfigError
from edgedistill.mixture import CallOptions
from edgedistill.prediction import prediction_of
from edgedistill.rows import Trail, consistency_row, ddim_row, jump_and_noise_row
from edgedistill.schedule import Schedule, check_num_steps
from edgedistill.solvers import (
    dpm_rows,
    edm_dpm_rows,
    edm_euler_rows,
    euler_rows,
    flow_rows,
    swift_rows,
)
from edgedistill.table import Condition, Guidance, SamplerTable, Stage

Build = Callable[[Mapping[str, Any], int, CallOptions], Trail]


class TableFields(TypedDict, total=False):
    """Fields of `SamplerTable` that a scheduler says nothing about."""

    state_input: str
    raw_output: str
    guidance: Guidance
    conditions: tuple[Condition, ...]
    clamp: tuple[float, float] | None
    space: Mapping[str, Any]
    decoder: str | None
    encoder: str | None


@dataclass(frozen=True)
class Family:
    """How one scheduler class is compiled.

    Fields:
        build: Makes the rows from the whole configuration, the number of steps and the call options.
        defaults: What diffusers assumes where the configuration is silent, and matters here.
        supported: Values that a key may have; other keys may have any.
    """

    build: Build
    defaults: Mapping[str, Any]
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def compile_scheduler(
    config: Mapping[str, Any],
    num_steps: int,
    *,
    shape: tuple[int, int, int],
    network: str | tuple[str, ...] = "unet",
    prediction_type: str | None = None,
    scheduler_class: str | None = None,
    eta: float = 0.0,
    **fields: Unpack[TableFields],
) -> SamplerTable:
    """Compile a sampler table that makes the same steps as a diffusers scheduler.

    Args:
        config: A diffusers scheduler configuration; ``_class_name`` says which scheduler.
        num_steps: Rows that call the network.
        shape: (channels, height, width) of the state.
        network: Name of the network, or several names in the order of their calls.
        prediction_type: What the network returns; None: what the configuration says.
        scheduler_class: Compile for this class instead of ``_class_name``.
        eta: DDIM's eta, TCD's gamma (its pipelines use 0.3); other schedulers have none.
        **fields: Further fields of the table. With guidance of mode ``cfg`` every row calls twice, at
            the default scale.

    Raises:
        ConfigError: If the scheduler, a key's value or the number of steps is not supported.
    """
    name = str(scheduler_class or config.get("_class_name"))
    if name not in FAMILIES:
        msg = f"Scheduler {name!r} cannot be compiled; choose one of {', '.join(FAMILIES)}."
        raise ConfigError(msg)
    family = FAMILIES[name]
    kind = str(prediction_type or prediction_of({**config, "_class_name": name}))
    full = {**family.defaults, **config, "_class_name": name, "prediction_type": kind, "eta": eta}
    for key, values in family.supported.items():
        if (value := full.get(key)) not in values:
            allowed = " or ".join(repr(item) for item in values if item is not None)
            msg = f"`{key}` of a {name} must be {allowed} to be compiled, got {value!r}."
            raise ConfigError(msg)
    guidance = fields.get("guidance", Guidance())
    scale = guidance.default if guidance.mode == "cfg" else None
    try:
        rows, first = family.build(full, num_steps, {"network": network, "guidance_scale": scale})
    except TypeError as error:
        msg = f"The configuration of the {name} is not as diffusers writes it ({error})."
        raise ConfigError(msg) from error
    return SamplerTable(
        stages=(Stage(shape, tuple(rows), init_noise=(first, 0)),),
        noise_count=1 + sum(row.noise is not None for row in rows),
        annotations={
            "scheduler": _plain(config, name),
            "prediction_type": kind,
            "num_steps": num_steps,
            "eta": eta,
        },
        **fields,
    )


def _plain(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the configuration as JSON data, without diffusers' private keys and infinite defaults."""
    public = {
        key: [float(item) for item in value]
        if key == "trained_betas" and value is not None
        else value
        for key, value in config.items()
        if not key.startswith("_") and not (isinstance(value, float) and math.isinf(value))
    }
    return {"_class_name": name, **public}


def _clipped(full: Mapping[str, Any], options: CallOptions) -> CallOptions:
    limit = float(full.get("clip_sample_range", 1.0))
    return {**options, "clip": (-limit, limit)} if full["clip_sample"] else options


def _ddim(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    schedule = Schedule.from_config(full)
    times = schedule.timesteps(num_steps, full["timestep_spacing"], full["steps_offset"])
    # diffusers always goes back by T // N, even where the next timestep lies elsewhere.
    back = schedule.num_train_timesteps // num_steps
    options = _clipped(full, options)
    kind, eta = full["prediction_type"], full["eta"]
    rows = [
        ddim_row(schedule, t, max(t - back, -1), kind, eta=eta, noise=index, **options)
        for index, t in enumerate(times, start=1)
    ]
    return rows, schedule.first_scale


def _lcm(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    schedule = Schedule.from_config(full)
    times = _distilled_times(full, num_steps, schedule.num_train_timesteps)
    options = _clipped(full, options)
    rows = [
        consistency_row(
            schedule,
            t,
            s,
            full["prediction_type"],
            index,
            timestep_scaling=full["timestep_scaling"],
            **options,
        )
        for index, (t, s) in enumerate(itertools.pairwise([*times, -1]), start=1)
    ]
    return rows, schedule.first_scale


def _tcd(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    """Build TCD's rows (Zheng et al. 2024, arXiv:2402.19159); the last one ends at timestep 0, not after it."""
    schedule = Schedule.from_config(full)
    times = _distilled_times(full, num_steps, schedule.num_train_timesteps)
    left = np.float32(1 - full["eta"])
    rows = [
        jump_and_noise_row(
            schedule, t, int(left * np.float32(s)), s, full["prediction_type"], index, **options
        )
        for index, (t, s) in enumerate(itertools.pairwise([*times, 0]), start=1)
    ]
    return rows, schedule.first_scale


def _distilled_times(full: Mapping[str, Any], num_steps: int, T: int) -> list[int]:
    """Choose evenly from the timesteps that the model was distilled on."""
    original = full["original_inference_steps"]
    check_num_steps(original, T)
    check_num_steps(num_steps, original)
    trained = np.arange(original, 0, -1) * (T // original) - 1
    chosen = np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(np.int64)
    return [int(t) for t in trained[chosen]]


_KINDS = ("epsilon", "sample", "v_prediction")
_DISTILLED = {
    "clip_sample": False,
    "original_inference_steps": 50,
    "thresholding": False,
    "timestep_scaling": 10.0,
}
_DESCENT = {
    "beta_schedule": "linear",
    "final_sigmas_type": "zero",
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_PLAIN = {"prediction_type": _KINDS, "thresholding": (None, False)}
_PLAIN_DESCENT = {
    **_PLAIN,
    "final_sigmas_type": ("zero", "sigma_min"),
    "use_beta_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
}

_DPM = {
    "algorithm_type": "dpmsolver++",
    "euler_at_final": False,
    "lower_order_final": True,
    "solver_order": 2,
    "solver_type": "midpoint",
}
_PLAIN_DPM = {
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint",),
}
# Apple's pipelines have one schedule; the class is named here, no file of diffusers names it.
_SWIFT = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "timestep_spacing": "linspace",
}
_EDM = {
    "final_sigmas_type": "zero",
    "rho": 7.0,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "sigma_schedule": "karras",
}
_PLAIN_EDM = {
    "final_sigmas_type": ("zero", "sigma_min"),
    "prediction_type": ("edm",),
    "thresholding": (None, False),
}

FAMILIES: Mapping[str, Family] = {
    "DDIMScheduler": Family(
        _ddim,
        {"clip_sample": True, "steps_offset": 0, "timestep_spacing": "leading"},
        _PLAIN,
    ),
    "LCMScheduler": Family(_lcm, _DISTILLED, _PLAIN),
    "TCDScheduler": Family(_tcd, _DISTILLED, _PLAIN),
    "EulerDiscreteScheduler": Family(
        euler_rows,
        {**_DESCENT, "interpolation_type": "linear", "timestep_type": "discrete"},
        {**_PLAIN_DESCENT, "interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    ),
    "DPMSolverMultistepScheduler": Family(
        dpm_rows,
        {**_DESCENT, **_DPM, "lambda_min_clipped": -math.inf},
        {
            **_PLAIN_DESCENT,
            **_PLAIN_DPM,
            "use_flow_sigmas": (None, False),
            "use_lu_lambdas": (None, False),
            "variance_type": (None, "fixed_small"),
        },
    ),
    "SwiftDPMSolverMultistepScheduler": Family(
        swift_rows,
        _SWIFT,
        {
            **{key: (value,) for key, value in _SWIFT.items()},
            "prediction_type": ("epsilon",),
            "rescale_betas_zero_snr": (None, False),
            "timestep_spacing": ("linspace", "leading", "karras"),
            "trained_betas": (None,),
        },
    ),
    "EDMEulerScheduler": Family(edm_euler_rows, _EDM, _PLAIN_EDM),
    "EDMDPMSolverMultistepScheduler": Family(
        edm_dpm_rows, {**_EDM, **_DPM}, {**_PLAIN_EDM, **_PLAIN_DPM}
    ),
    "FlowMatchEulerDiscreteScheduler": Family(
        flow_rows,
        {"shift": 1.0},
        {
            "prediction_type": ("flow",),
            **dict.fromkeys(
                (
                    "shift_terminal",
                    "stochastic_sampling",
                    "use_beta_sigmas",
                    "use_exponential_sigmas",
                    "use_karras_sigmas",
                ),
                (None, False),
            ),
        },
    ),
}
