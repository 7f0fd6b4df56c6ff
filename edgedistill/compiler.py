"""Sampler tables from diffusers scheduler configurations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from edgedistill.errors import ConfigError
from edgedistill.rows import CallOptions, ddim_row
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, Guidance, Row, SamplerTable, Stage

Trail = tuple[list[Row], float]  # the rows, and the scale of the first noise
Build = Callable[[Mapping[str, Any], int, CallOptions], Trail]


class TableFields(TypedDict, total=False):
    """Fields of `SamplerTable` that a scheduler says nothing about."""

    state_input: str
    raw_output: str
    guidance: Guidance
    conditions: tuple[Condition, ...]
    clamp: tuple[float, float] | None
    space: Mapping[str, Any]


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
    network: str = "unet",
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
        network: Name of the network.
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
    kind = prediction_type or config.get("prediction_type") or "epsilon"
    full = {**family.defaults, **config, "_class_name": name, "prediction_type": kind, "eta": eta}
    for key, values in family.supported.items():
        if full.get(key) not in values:
            msg = f"`{key}` of a {name} must be {' or '.join(map(repr, values))} here, got {full[key]!r}."
            raise ConfigError(msg)
    guidance = fields.get("guidance", Guidance())
    scale = guidance.default if guidance.mode == "cfg" else None
    rows, first = family.build(full, num_steps, {"network": network, "guidance_scale": scale})
    return SamplerTable(
        stages=(Stage(shape, tuple(rows), init_noise=(first, 0)),),
        noise_count=1 + sum(row.noise is not None for row in rows),
        annotations={
            "scheduler": _plain(config, name),
            "prediction_type": str(kind),
            "num_steps": num_steps,
            "eta": eta,
        },
        **fields,
    )


def _plain(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the configuration as JSON data, without diffusers' private keys."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    if public.get("trained_betas") is not None:
        public["trained_betas"] = [float(beta) for beta in public["trained_betas"]]
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
    return rows, 1.0


FAMILIES: Mapping[str, Family] = {
    "DDIMScheduler": Family(
        build=_ddim,
        defaults={
            "clip_sample": True,
            "timestep_spacing": "leading",
            "steps_offset": 0,
            "thresholding": False,
        },
        supported={"thresholding": (False,)},
    ),
}
