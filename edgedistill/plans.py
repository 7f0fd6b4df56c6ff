"""Plans: a stock scheduler's file and our table that take the same steps, chosen so that loaders agree."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from edgedistill.compiler import TableFields, compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.files import write_json
from edgedistill.prediction import prediction_of
from edgedistill.schedule import Schedule
from edgedistill.stock import Objections, objections
from edgedistill.table import SamplerTable

PORTABLE_STEPS = (1, 2, 4, 8)
PORTABLE = {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "trailing",
}
"""What makes a stock scheduler of a noise schedule that every loader of pipelines samples alike."""
SWIFT_STEPS = (1, 2, 3)
FILE = "scheduler/scheduler_config.json"

_BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
_SWIFT_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_DEFAULT_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class Plan:
    """A sampler that loaders know.

    Fields:
        scheduler: The configuration of a stock diffusers scheduler, plain JSON data.
        table: The same steps as rows.
        objections: By loader, why it does not take these steps; nothing where it does.
    """

    scheduler: Mapping[str, Any]
    table: SamplerTable
    objections: Objections

    @property
    def loaders(self) -> tuple[str, ...]:
        """Names of the loaders that take these steps."""
        return tuple(name for name, reasons in self.objections.items() if not reasons)

    def save(self, root: Path) -> None:
        """Write the scheduler's file to its place in a pipeline's folder."""
        write_json(root / FILE, self.scheduler)


def portable(
    config: Mapping[str, Any],
    num_steps: int,
    *,
    shape: tuple[int, int, int],
    network: str | tuple[str, ...] = "unet",
    **fields: Unpack[TableFields],
) -> Plan:
    """Plan deterministic DDIM on ``trailing`` timesteps, which diffusers, optimum and openvino-genai share.

    Args:
        config: A scheduler's configuration, for its noise schedule and prediction.
        num_steps: One of `PORTABLE_STEPS`, and a divisor of the schedule's timesteps: diffusers steps back
            by their whole quotient.
        shape: (channels, height, width) of the state.
        network: As for `compile_scheduler`.
        **fields: As for `compile_scheduler`.

    Raises:
        ConfigError: If the schedule is not one of betas, or the number of steps cannot be.
    """
    T = Schedule.from_config(config).num_train_timesteps
    if num_steps not in PORTABLE_STEPS or T % num_steps:
        msg = f"A portable sampler has {_listed(PORTABLE_STEPS)} steps, which divide the {T} timesteps, got {num_steps}; at others openvino-genai's timesteps or DDIM's steps are off."
        raise ConfigError(msg)
    scheduler = {**PORTABLE, **_noise_schedule(config, T)}
    return _plan(scheduler, num_steps, shape, network, fields)


def swift(
    config: Mapping[str, Any],
    num_steps: int,
    *,
    shape: tuple[int, int, int],
    network: str | tuple[str, ...] = "unet",
    **fields: Unpack[TableFields],
) -> Plan:
    """Plan the steps that an unmodified Swift package takes with ``dpmSolverMultistepScheduler`` and ``linspace``.

    Up to three steps they are DDIM's, and a file for diffusers of solver order 1 says the same. From four
    on the package takes second-order steps that no stock file says; compile its twin instead.

    Args:
        config: A scheduler's configuration; its noise schedule must be the one that the package has.
        num_steps: One of `SWIFT_STEPS`.
        shape: (channels, height, width) of the state.
        network: As for `compile_scheduler`.
        **fields: As for `compile_scheduler`.

    Raises:
        ConfigError: If the package has another schedule or prediction, or the number of steps cannot be.
    """
    if num_steps not in SWIFT_STEPS:
        msg = f"A sampler for the Swift package has {_listed(SWIFT_STEPS)} steps, got {num_steps}; at others its solver is not diffusers': ship SamplerTable.swift with the table."
        raise ConfigError(msg)
    T = Schedule.from_config(config).num_train_timesteps
    schedule = _noise_schedule(config, T)
    fixed = {**_SWIFT_BETAS, "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    fixed |= {"trained_betas": None, "rescale_betas_zero_snr": False}
    for key, value in fixed.items():
        if schedule[key] != value:
            msg = f"`{key}` must be {value!r} for the Swift package, whose schedule is fixed, got {schedule[key]!r}."
            raise ConfigError(msg)
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        **schedule,
        "algorithm_type": "dpmsolver++",
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "solver_order": 1,
        "solver_type": "midpoint",
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
    }
    return _plan(scheduler, num_steps, shape, network, fields)


def _plan(
    scheduler: Mapping[str, Any],
    num_steps: int,
    shape: tuple[int, int, int],
    network: str | tuple[str, ...],
    fields: TableFields,
) -> Plan:
    table = compile_scheduler(scheduler, num_steps, shape=shape, network=network, **fields)
    return Plan(scheduler, table, objections(scheduler, num_steps, table))


def _noise_schedule(config: Mapping[str, Any], T: int) -> dict[str, Any]:
    """Return the betas and the prediction as a stock file says them, defaults of diffusers filled in.

    Raises:
        ConfigError: If the schedule is not one of betas.
    """
    name = str(config.get("_class_name") or "DDPMScheduler")
    if name.startswith(("EDM", "FlowMatch")):
        msg = f"A {name} has no betas, which the schedulers of this plan need; sample it by its table."
        raise ConfigError(msg)
    latent = name in ("LCMScheduler", "TCDScheduler")
    given = {key: config[key] for key in _BETAS if key in config}
    return {
        **(_SWIFT_BETAS if latent else _DEFAULT_BETAS),
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
        **given,
        "num_train_timesteps": T,
        "prediction_type": str(prediction_of(config)),
    }


def _listed(numbers: tuple[int, ...]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}"
