"""One call of a network and the mixture it leaves: what all rows that call have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from edgedistill.errors import ConfigError
from edgedistill.prediction import PredictionType, eps_coefficients, x0_coefficients
from edgedistill.schedule import Schedule
from edgedistill.table import Next, Row

Range = tuple[float, float]


class CallOptions(TypedDict, total=False):
    """How a row calls its network.

    Fields:
        network: Name of the network, or several names in the order of their calls, such as
            ``("guide", "unet")``; left out: ``"unet"``.
        clip: Range that x0 is clipped to; left out: none.
        guidance_scale: g of a row that calls twice; left out: a single call.
        feeds_name: The network input that takes t; left out: ``"timestep"``.
        feeds: Further numbers to feed by input name, such as ``{"step": 4.0}``; left out: none.
        target_feed: The input that is told the time the network jumps to (k of a row that adds noise
            back, else s; label 0 for the end) as t is; left out: none.
    """

    network: str | tuple[str, ...]
    clip: Range | None
    guidance_scale: float | None
    feeds_name: str
    feeds: Mapping[str, float]
    target_feed: str | None


@dataclass(frozen=True)
class Mixture:
    """The state after a row.

    Fields:
        x0, eps, noise: Shares of the estimate of x, of the eps that goes with it, and of fresh noise.
        index: Of the fresh noise in the bank.
    """

    x0: float
    eps: float = 0.0
    noise: float = 0.0
    index: int | None = None


def mixture_row(
    schedule: Schedule,
    prediction_type: str,
    after: Mixture,
    note: Mapping[str, Any],
    **options: Unpack[CallOptions],
) -> Row:
    """Build the row that calls a network at ``note["t"]`` and leaves the mixture `after`.

    Where x0 is clipped, eps is that of the x0 before the clip, as in diffusers; hence the term in raw.

    Raises:
        ConfigError: If the prediction leaves x0 or eps undefined, or noise comes without an index.
    """
    t, kind, clip = note["t"], PredictionType(prediction_type), options.get("clip")
    alpha, sigma = _defined(schedule, t, kind)
    if after.noise and after.index is None:
        msg = f"The row at t={t} adds noise and needs an index into the noise bank; give `noise`."
        raise ConfigError(msg)
    if clip is None:
        z, raw, x0 = after.eps / sigma, 0.0, after.x0 - after.eps * alpha / sigma
    else:
        z, raw = (after.eps * item for item in eps_coefficients(kind, alpha, sigma))
        x0 = after.x0
    return Row(
        call=networks_of(options),
        feeds=_feeds(schedule, note, options),
        in_scale=float(schedule.in_scales[t]),
        guidance_scale=options.get("guidance_scale"),
        x0=x0_coefficients(kind, alpha, sigma),
        clip=clip,
        next=Next(z=z, x0=x0, raw=raw, noise=after.noise),
        noise=after.index if after.noise else None,
        note={**note, **_told(options)},
    )


def networks_of(options: CallOptions) -> tuple[str, ...]:
    """Return the names of the networks that a row calls, in order."""
    network = options.get("network", "unet")
    return (network,) if isinstance(network, str) else tuple(network)


def _told(options: CallOptions) -> dict[str, Any]:
    """Return what a note says of the numbers fed beside t."""
    told = {"feeds": dict(options.get("feeds", {})), "target_feed": options.get("target_feed")}
    return {key: value for key, value in told.items() if value}


def _feeds(
    schedule: Schedule, note: Mapping[str, Any], options: CallOptions
) -> Mapping[str, float]:
    feeds = {options.get("feeds_name", "timestep"): float(schedule.feeds[note["t"]])}
    if target := options.get("target_feed"):
        feeds[target] = float(schedule.feeds[max(note.get("k", note["s"]), 0)])
    return {**feeds, **options.get("feeds", {})}


def _defined(schedule: Schedule, t: int, kind: PredictionType) -> tuple[float, float]:
    if t < 0:
        msg = f"A row that calls a network needs a timestep of at least 0, got {t}."
        raise ConfigError(msg)
    alpha, sigma = schedule.alpha_sigma(t)
    if alpha == 0 and kind is PredictionType.EPSILON:
        msg = (
            f"At timestep {t} alpha is 0 and a network that predicts epsilon says nothing of x; "
            "convert it to v_prediction, or set `rescale_betas_zero_snr` to false."
        )
        raise ConfigError(msg)
    if sigma == 0:
        msg = f"At timestep {t} sigma is 0 and there is nothing to denoise; start at a later one."
        raise ConfigError(msg)
    return alpha, sigma
