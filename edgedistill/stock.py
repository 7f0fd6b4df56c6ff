"""Which stock loaders take the steps of a table, given a scheduler's configuration.

diffusers and optimum's pipelines build diffusers' own scheduler from the file; openvino-genai has
reimplemented some of them in float32; Apple's Swift package reads no file and has one fixed schedule. What
is said of them here was read in diffusers 0.39, openvino-genai 2026.4 and apple/ml-stable-diffusion e12202c.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgedistill.agreement import is_close
from edgedistill.compiler import FAMILIES, compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.schedule import check_num_steps
from edgedistill.table import Row, SamplerTable

Objections = Mapping[str, tuple[str, ...]]  # by loader; empty where it takes the table's steps

LOADERS = ("diffusers", "ort", "openvino", "genai", "swift")
"""diffusers, optimum-onnx, optimum-intel, openvino-genai, Apple's Swift package."""
WITH_CONTROLNETS = ("diffusers", "swift")
"""Those that have a pipeline with a ControlNet; Swift's is for Stable Diffusion 1 and 2."""
SWIFT_SCHEDULER = "SwiftDPMSolverMultistepScheduler"
SWIFT_SPACINGS = ("linspace", "leading", "karras")

GENAI_CLASSES = (
    "LCMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""What openvino-genai has; of three of them no table can be compiled, so their steps are not compared."""

_CONTROLNET = "controlnet"
_SHAPE = (4, 64, 64)
_BETAS = {"beta_schedule": ("linear", "scaled_linear")}
_OFF = (None, False)
_GENAI_VALUES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "DDIMScheduler": {**_BETAS, "clip_sample": (False,), "thresholding": _OFF},
    "EulerDiscreteScheduler": {
        **_BETAS,
        **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), _OFF),
    },
    "FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": _OFF},
    # It crashes with another prediction, and does not rescale.
    "LCMScheduler": {**_BETAS, "prediction_type": ("epsilon",), "rescale_betas_zero_snr": _OFF},
}
"""What values of a key openvino-genai runs; without None, the file has to say it."""


def objections(
    scheduler: Mapping[str, Any], num_steps: int, table: SamplerTable | None = None
) -> Objections:
    """Say for every loader why it does not take the steps of a table, if it does not.

    Fresh noise is the loader's own: two that agree on steps which add noise agree in distribution alone.

    Args:
        scheduler: The configuration in ``scheduler/scheduler_config.json``.
        num_steps: What the caller asks of the pipeline.
        table: The steps that are wanted; None: those that diffusers takes with this configuration.

    Returns:
        For each of `LOADERS` reasons in words, none where it takes the table's steps.
    """
    try:
        stock = compile_scheduler(scheduler, num_steps, shape=_SHAPE)
    except ConfigError as error:
        return dict.fromkeys(LOADERS, (f"its steps are not known: {error}",))
    wanted = table or stock
    if unusual := tuple(_unusual(wanted)):
        return dict.fromkeys(LOADERS, unusual)
    differs = tuple(_differences(wanted, stock))
    genai = tuple(_genai_problems(scheduler, num_steps, stock))
    found = dict.fromkeys(LOADERS, differs)
    found |= {"genai": (*genai, *differs), "swift": tuple(_swift_problems(wanted))}
    calls = f"it has no pipeline that calls {', '.join(_beside(wanted))} beside the denoiser"
    lacking = set(LOADERS) - set(loaders_for(wanted))
    return {name: (calls, *told) if name in lacking else told for name, told in found.items()}


def loaders_for(table: SamplerTable) -> tuple[str, ...]:
    """Return the loaders that have a pipeline for the networks that a table's rows call."""
    beside = _beside(table)
    if not beside:
        return LOADERS
    return WITH_CONTROLNETS if beside == [_CONTROLNET] else ()


def _beside(table: SamplerTable) -> list[str]:
    """Return the networks that are called before the one that predicts."""
    return sorted({name for row in table.rows for name in row.call[:-1]})


def swift_spacing(table: SamplerTable) -> str | None:
    """Return the ``timeStepSpacing`` with which the Swift package takes a table's steps, or None."""
    found = (spacing for spacing in SWIFT_SPACINGS if not any(_swift_differences(table, spacing)))
    return next(found, None)


def _unusual(table: SamplerTable) -> Iterator[str]:
    """Say what no stock pipeline does."""
    if len(table.stages) != 1:
        yield f"the table has {len(table.stages)} stages, and its pipelines one"
    for index, row in enumerate(table.rows):
        if not row.call:
            yield f"row {index} calls no network, and its pipelines call one at every step"
        elif len(row.feeds) != 1:
            yield f"row {index} feeds {', '.join(row.feeds)}, and its pipelines feed a timestep"
        if row.blend is not None:
            yield f"row {index} blends a known image as its pipelines do not"


def _differences(wanted: SamplerTable, found: SamplerTable) -> Iterator[str]:
    """Yield the first difference between the rows of two tables of one stage."""
    if len(wanted.rows) != len(found.rows):
        yield f"it takes {len(found.rows)} steps, and the table has {len(wanted.rows)}"
        return
    first, own = found.stages[0].init_noise[0], wanted.stages[0].init_noise[0]
    if not is_close(first, own):
        yield f"it scales the first noise by {first:.6g}, and the table by {own:.6g}"
    for index, rows in enumerate(zip(wanted.rows, found.rows, strict=True)):
        ours, theirs = map(_numbers, rows)
        for name in {**theirs, **ours}:
            here, there = ours.get(name, 0.0), theirs.get(name, 0.0)
            if not is_close(here, there):
                yield f"at step {index} its {name} is {there:.6g}, and the table's {here:.6g}"
                return


def _numbers(row: Row) -> dict[str, float]:
    """Return what a row does to the state, however it is split up where x0 is not clipped."""
    (a_z, a_r), after = row.x0, row.next
    shares = {"share of x0": after.x0, "x0 of the state": a_z, "x0 of the prediction": a_r}
    z, raw = after.z, after.raw
    if row.clip is None:
        shares, z, raw = {}, z + after.x0 * a_z, raw + after.x0 * a_r
    lists = {"clip": row.clip or (), "earlier estimate": after.previous}
    return {
        "timestep": next(iter(row.feeds.values())),
        "share of the state": z,
        "share of the prediction": raw,
        **shares,
        "share of noise": after.noise,
        "input scale": row.in_scale,
        **{f"{name} {i}": x for name, values in lists.items() for i, x in enumerate(values)},
    }


def _genai_problems(
    scheduler: Mapping[str, Any], num_steps: int, stock: SamplerTable
) -> Iterator[str]:
    name = str(scheduler.get("_class_name"))
    if name not in GENAI_CLASSES:
        yield f"it has no {name}; it runs {', '.join(GENAI_CLASSES)}"
        return
    full = {"prediction_type": "epsilon", **scheduler}
    for key, allowed in _GENAI_VALUES[name].items():
        if (value := full.get(key)) not in allowed:
            known = " or ".join(repr(item) for item in allowed if item is not None)
            yield f"`{key}` of its {name} must be {known}, got {value!r}"
    if name == "FlowMatchEulerDiscreteScheduler":
        return
    made = genai_timesteps({**FAMILIES[name].defaults, **scheduler}, num_steps)
    expected = [row.feeds["timestep"] for row in stock.rows]
    if made != expected:
        yield f"its rounding makes timesteps {_shown(made)}, and diffusers' {_shown(expected)}"


def _shown(times: Sequence[float]) -> str:
    shown = [f"{t:.6g}" for t in times]
    return (
        f"{', '.join(shown[:3])}, ... {', '.join(shown[-3:])}"
        if len(shown) > 8
        else ", ".join(shown)
    )


def genai_timesteps(full: Mapping[str, Any], num_steps: int) -> list[int]:
    """Return the timesteps of openvino-genai's DDIM, Euler and LCM schedulers.

    Args:
        full: The configuration, absent keys filled in.
        num_steps: What its caller asks for; with ``trailing`` spacing it may make one step more, at -1.

    Raises:
        ConfigError: If the number of steps is not possible.
    """
    T = int(full.get("num_train_timesteps", 1000))
    check_num_steps(num_steps, T)
    if "original_inference_steps" in full:
        original = int(full["original_inference_steps"])
        chosen = _float_range(original, num_steps).astype(np.int64)
        return [int((original - i) * (T // original) - 1) for i in chosen]
    if full["timestep_spacing"] == "trailing":
        return _trailing(T, num_steps)
    if full["timestep_spacing"] == "leading":
        return [i * (T // num_steps) + full["steps_offset"] for i in reversed(range(num_steps))]
    spread = _float_range(T - 1, num_steps - 1) if num_steps > 1 else np.zeros(0)
    return [_rounded(t) for t in (*([T - 1] if num_steps > 1 else []), *spread[::-1])] or [0]


def _trailing(T: int, num_steps: int) -> list[int]:
    """Count down in float32 until nothing is left, which may be after the last step."""
    times, left, step = [], np.float32(T), np.float32(T) / np.float32(num_steps)
    while left > 0:
        times.append(_rounded(float(left)) - 1)
        left = left - step
    return times


def _float_range(end: int, count: int) -> np.ndarray:
    """Return `count` float32 numbers from 0 up to `end`, which is left out."""
    return np.arange(count, dtype=np.float32) * (np.float32(end) / np.float32(count))


def _rounded(value: float) -> int:
    """Round a half up, as C++ rounds what is positive."""
    return int(float(value) + 0.5)


def _swift_problems(table: SamplerTable) -> Iterator[str]:
    if swift_spacing(table) is None:
        yield from _swift_differences(table, "linspace")


def _swift_differences(table: SamplerTable, spacing: str) -> Iterator[str]:
    config = {"_class_name": SWIFT_SCHEDULER, "timestep_spacing": spacing}
    try:
        twin = compile_scheduler(config, len(table.rows), shape=_SHAPE)
    except ConfigError as error:
        yield str(error)
        return
    yield from _differences(table, twin)
