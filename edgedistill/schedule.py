"""The noise schedule: alpha, sigma and the network's view of every time, with the numbers that diffusers uses.

A time is a label, an integer from 0 (cleanest) to T - 1 (noisiest), in every family: the betas of a
variance-preserving schedule, the noise levels of EDM (Karras et al. 2022, arXiv:2206.00364), the shifted
times of a rectified flow.

diffusers makes its betas in float32 and multiplies them up with a float64 accumulator, and networks were
trained on what came out. Near t = 0 an error of 1e-7 in alpha^2 is one of 1e-4 in sigma^2, so a schedule
that is computed better than that would be another schedule. Here each float32 rounding is repeated, and
everything after alpha^2 is float64.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from edgedistill.errors import ConfigError
from edgedistill.prediction import SIGMA_DATA

_PIXEL = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_EDM = {
    "num_train_timesteps": 1000,
    "rho": 7.0,
    "sigma_data": SIGMA_DATA,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "sigma_schedule": "karras",
}
_FLOW = {"num_train_timesteps": 1000, "shift": 1.0}
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, eq=False)
class Schedule:
    """``z_t = alphas[t]*x + sigmas[t]*eps``, and how a network is told of t.

    Fields:
        alphas, sigmas: float64 [T]; index 0 is the cleanest label, sigma/alpha rises with the label.
        feeds: float64 [T]; what the network is fed as its time: the label itself, ln(sigma)/4 of EDM,
            ``num_train_timesteps * sigma`` of a flow.
        in_scales: float64 [T]; multiply the state before the network sees it.
        final: (alpha, sigma) after the last step: (1, 0), or those of label 0.
        first_scale: Scale of the noise that sampling starts from.
    """

    alphas: np.ndarray
    sigmas: np.ndarray
    feeds: np.ndarray
    in_scales: np.ndarray
    final: tuple[float, float] = (1.0, 0.0)
    first_scale: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Build the schedule of a diffusers scheduler configuration; absent keys take diffusers' defaults.

        Without ``_class_name`` the configuration is one of betas.

        Raises:
            ConfigError: If the class or a setting is unknown, or its numbers make no schedule.
        """
        name = config.get("_class_name") or "DDPMScheduler"
        if name not in _FAMILIES:
            msg = f"The noise schedule of a {name} is not known; known are {', '.join(_FAMILIES)}."
            raise ConfigError(msg)
        make, defaults = _FAMILIES[name]
        return make({**defaults, **config})

    @property
    def num_train_timesteps(self) -> int:
        """T: labels run from T - 1 (noise) to 0."""
        return len(self.alphas)

    @property
    def levels(self) -> np.ndarray:
        """The noise level sigma/alpha of every label, float64 [T]; infinite where alpha is 0."""
        with np.errstate(divide="ignore"):
            return self.sigmas / self.alphas

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """Return (alpha, sigma) at a timestep; -1 stands for "after the last step".

        Raises:
            ConfigError: If `t` is outside of [-1, T - 1].
        """
        if not -1 <= t < self.num_train_timesteps:
            msg = f"Timestep must lie in [-1, {self.num_train_timesteps - 1}], got {t}."
            raise ConfigError(msg)
        return self.final if t == -1 else (float(self.alphas[t]), float(self.sigmas[t]))

    @overload
    def label_of(self, level: float) -> int: ...
    @overload
    def label_of(self, level: np.ndarray) -> np.ndarray: ...
    def label_of(self, level: float | np.ndarray) -> int | np.ndarray:
        """Return the label whose noise level sigma/alpha is nearest to `level`, in their logarithm.

        Args:
            level: A number of at least 0, or an array of such; an array gives an int64 array of its shape.
        """
        levels = self.levels
        found = np.searchsorted(np.sqrt(levels[:-1] * levels[1:]), level, side="right")
        return found if isinstance(level, np.ndarray) else int(found)

    def polynomial(
        self,
        count: int,
        rho: float = 7.0,
        sigma_max: float | None = None,
        sigma_min: float | None = None,
    ) -> tuple[int, ...]:
        """Return `count` descending labels that are evenly spread in sigma/alpha to the power of 1/rho.

        These are the nearest labels to Karras' time stamps (arXiv:2206.00364, equation 5), both ends
        counted. Where alpha is 0 at label T - 1, the stamps are spread from the level below it.

        Args:
            count: At least 2.
            rho: How much the low levels are favoured.
            sigma_max: Highest sigma/alpha; None: that of label T - 1.
            sigma_min: Lowest sigma/alpha; None: that of label 0.

        Raises:
            ConfigError: If the levels do not fall, or two stamps have the same nearest label.
        """
        levels = self.levels
        high = levels[np.isfinite(levels)][-1] if sigma_max is None else sigma_max
        low = levels[0] if sigma_min is None else sigma_min
        if count < 2 or not 0 < low < high:
            msg = f"Time stamps need a count of at least 2 and 0 < sigma_min < sigma_max, got {count}, {low} and {high}."
            raise ConfigError(msg)
        labels = self.label_of(karras_levels(high, low, count, rho))
        if sigma_max is None:
            labels[0] = self.num_train_timesteps - 1
        if np.any(np.diff(labels) >= 0):
            msg = f"The schedule is too coarse for {count} time stamps from {high:.4g} to {low:.4g}: their labels {labels.tolist()} do not fall; ask for fewer."
            raise ConfigError(msg)
        return tuple(labels.tolist())

    def timesteps(
        self, num_steps: int, spacing: str = "trailing", steps_offset: int = 0
    ) -> tuple[int, ...]:
        """Return the descending timesteps of a sampler of `num_steps` rows.

        The roundings are those of diffusers' DDIMScheduler (Lin et al. 2024, arXiv:2305.08891, table 2),
        except that ``trailing`` never ends at -1, where diffusers adds a row for some numbers above 60.

        Args:
            num_steps: From 1 to T.
            spacing: ``leading`` (from 0 upwards), ``trailing`` (from T - 1 downwards) or ``linspace``
                (both ends).
            steps_offset: Added to the timesteps of ``leading``.

        Raises:
            ConfigError: If the number or the spacing is not possible, or the offset leaves the schedule.
        """
        T = self.num_train_timesteps
        check_num_steps(num_steps, T)
        grid: np.ndarray
        if spacing == "linspace":
            grid = np.linspace(0, T - 1, num_steps).round()[::-1]
        elif spacing == "leading":
            grid = np.arange(num_steps)[::-1] * (T // num_steps) + steps_offset
        elif spacing == "trailing":
            grid = np.arange(T, 0, -T / num_steps)[:num_steps].round() - 1
        else:
            msg = f"`timestep_spacing` must be one of {', '.join(SPACINGS)}, got {spacing!r}."
            raise ConfigError(msg)
        if grid[0] >= T:
            msg = f"`steps_offset` {steps_offset} moves timestep {grid[0]} past the last one, {T - 1}; set it to 0."
            raise ConfigError(msg)
        return tuple(int(t) for t in grid)


def check_num_steps(num_steps: int, limit: int) -> None:
    """Refuse a number of rows that is not in [1, limit].

    Raises:
        ConfigError: If it is not.
    """
    if not 1 <= num_steps <= limit:
        msg = f"The number of steps must lie in [1, {limit}], got {num_steps}."
        raise ConfigError(msg)


def karras_levels(high: float, low: float, count: int, rho: float = 7.0) -> np.ndarray:
    """Spread levels evenly in their rho-th root, falling (arXiv:2206.00364, equation 5); float64 [count]."""
    ramp = np.linspace(0, 1, count)
    return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def edm_levels(full: Mapping[str, Any], count: int) -> np.ndarray:
    """Return falling noise levels, float64 [count] of float32 numbers.

    Args:
        full: A configuration of diffusers' EDM schedulers, absent keys filled in.
        count: At least 1.

    Raises:
        ConfigError: If the spread of levels is not known, or its ends make no levels.
    """
    low, high, rho = _numbers(full, "sigma_min", "sigma_max", "rho")
    if not (0 < low < high < math.inf and rho > 0):
        msg = f"An EDM schedule needs 0 < sigma_min < sigma_max and rho > 0, got {low}, {high} and {rho}."
        raise ConfigError(msg)
    if full["sigma_schedule"] == "karras":
        return karras_levels(high, low, count, rho).astype(np.float32).astype(np.float64)
    if full["sigma_schedule"] == "exponential":
        return np.exp(_linspace(math.log(low), math.log(high), count))[::-1].astype(np.float64)
    msg = f"`sigma_schedule` must be karras or exponential, got {full['sigma_schedule']!r}."
    raise ConfigError(msg)


def _edm(full: Mapping[str, Any]) -> Schedule:
    """Make T noise levels (arXiv:2206.00364, table 1): alpha is 1, and the network sees unit variance."""
    if full["sigma_data"] != SIGMA_DATA:
        msg = f"`sigma_data` of an EDM schedule must be {SIGMA_DATA}, got {full['sigma_data']!r}."
        raise ConfigError(msg)
    sigmas = edm_levels(full, _count(full))[::-1].copy()
    return Schedule(
        np.ones_like(sigmas),
        sigmas,
        feeds=np.log(sigmas) / 4,
        in_scales=1 / np.hypot(sigmas, SIGMA_DATA),
        first_scale=float(full["sigma_max"]),
    )


def _flow(full: Mapping[str, Any]) -> Schedule:
    """Make the T shifted times of a rectified flow: sigma = t, alpha = 1 - t."""
    for key in ("use_dynamic_shifting", "invert_sigmas"):
        if full.get(key):
            msg = f"`{key}` of a {full['_class_name']} must be False, got {full[key]!r}."
            raise ConfigError(msg)
    T, (shift,) = _count(full), _numbers(full, "shift")
    if not 0 < shift < math.inf:
        msg = f"`shift` of a flow's schedule must be above 0, got {shift}."
        raise ConfigError(msg)
    sigmas = shifted(np.arange(1, T + 1, dtype=np.float32) / np.float32(T), shift)
    sigmas = sigmas.astype(np.float64)
    return Schedule(1 - sigmas, sigmas, feeds=T * sigmas, in_scales=np.ones(T))


def shifted(times: np.ndarray, shift: float) -> np.ndarray:
    """Shift the times of a flow towards noise (Esser et al. 2024, arXiv:2403.03206), in their own precision."""
    return shift * times / (1 + (shift - 1) * times)


def _count(full: Mapping[str, Any]) -> int:
    (T,) = _numbers(full, "num_train_timesteps")
    if T < 2 or not T.is_integer():
        msg = f"`num_train_timesteps` must be a whole number of at least 2, got {T}."
        raise ConfigError(msg)
    return int(T)


def _numbers(full: Mapping[str, Any], *keys: str) -> list[float]:
    try:
        return [float(full[key]) for key in keys]
    except (TypeError, ValueError) as error:
        msg = f"The scheduler's {' and '.join(keys)} must be numbers ({error})."
        raise ConfigError(msg) from error


def _variance_preserving(full: Mapping[str, Any]) -> Schedule:
    if full.get("use_flow_sigmas"):
        msg = "`use_flow_sigmas` makes a flow of this scheduler; configure a FlowMatchEulerDiscreteScheduler instead."
        raise ConfigError(msg)
    betas = _betas(full)
    if full.get("rescale_betas_zero_snr"):
        betas = _zero_terminal_snr(betas)
    alphas, sigmas = _alphas_sigmas(_cumulative(betas))
    to_one = full.get("set_alpha_to_one", True)
    return Schedule(
        alphas,
        sigmas,
        feeds=np.arange(len(alphas), dtype=np.float64),
        in_scales=np.ones(len(alphas)),
        final=(1.0, 0.0) if to_one else (float(alphas[0]), float(sigmas[0])),
    )


_FAMILIES: Mapping[str, tuple[Callable[[Mapping[str, Any]], Schedule], Mapping[str, Any]]] = {
    **{
        f"{name}Scheduler": (_variance_preserving, _PIXEL)
        for name in (
            "DDPM",
            "DDIM",
            "DEISMultistep",
            "DPMSolverMultistep",
            "DPMSolverSinglestep",
            "EulerAncestralDiscrete",
            "EulerDiscrete",
            "LMSDiscrete",
            "UniPCMultistep",
        )
    },
    "PNDMScheduler": (_variance_preserving, {**_PIXEL, "set_alpha_to_one": False}),
    "LCMScheduler": (_variance_preserving, _LATENT),
    "SwiftDPMSolverMultistepScheduler": (_variance_preserving, _LATENT),
    "TCDScheduler": (_variance_preserving, _LATENT),
    "EDMEulerScheduler": (_edm, _EDM),
    "EDMDPMSolverMultistepScheduler": (_edm, _EDM),
    "FlowMatchEulerDiscreteScheduler": (_flow, _FLOW),
}


def betas_of(config: Mapping[str, Any]) -> np.ndarray:
    """Return the betas of a scheduler's configuration as diffusers makes them, float32 (timesteps,).

    Args:
        config: Of a schedule of betas; absent keys take diffusers' defaults.

    Raises:
        ConfigError: If they are not numbers, not one for each timestep, or of a schedule that is not known.
    """
    _, defaults = _FAMILIES[config["_class_name"]]
    return _betas({**defaults, **config})


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    T, given = _given(config)
    if config.get("trained_betas") is not None:
        return given.astype(np.float32)
    kind = config["beta_schedule"]
    start, end = given.tolist()
    if kind == "linear":
        return _linspace(start, end, T)
    if kind == "scaled_linear":
        return _linspace(math.sqrt(start), math.sqrt(end), T) ** 2
    if kind == "squaredcos_cap_v2":
        bars = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        return _capped(bars)
    if kind == "sigmoid":
        logistic = (1 / (1 + np.exp(-_linspace(-6, 6, T).astype(np.float64)))).astype(np.float32)
        return logistic * np.float32(end - start) + np.float32(start)
    msg = f"`beta_schedule` must be linear, scaled_linear, squaredcos_cap_v2 or sigmoid, got {kind!r}."
    raise ConfigError(msg)


def _given(config: Mapping[str, Any]) -> tuple[int, np.ndarray]:
    """Read T, and the trained betas or the first and last one, as float64."""
    trained = config.get("trained_betas")
    ends = [config["beta_start"], config["beta_end"]]
    try:
        T = int(config.get("num_train_timesteps", 1000))
        given = np.asarray(ends if trained is None else trained, np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        msg = f"The scheduler's betas are not numbers as diffusers writes them ({error})."
        raise ConfigError(msg) from error
    expected = 2 if trained is None else T
    if T < 1 or len(given) != expected or not np.all((given > 0) & (given <= 1)):
        msg = "The scheduler's betas must lie above 0 and up to 1, one for each of `num_train_timesteps`."
        raise ConfigError(msg)
    return T, given


def _capped(bars: Sequence[float]) -> np.ndarray:
    betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bars)]
    return np.asarray(betas, np.float32)


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """Repeat torch.linspace: a float32 step, counted from the nearer end, rounded once (a fused multiply-add)."""
    low, high = np.float32(start), np.float32(end)
    step = float((high - low) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    ends = float(low) + step * index, float(high) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), *ends).astype(np.float32)


def _cumulative(betas: np.ndarray) -> np.ndarray:
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale alpha so that the last one is zero (arXiv:2305.08891, algorithm 1), in float32.

    torch's square root is off by one bit on some processors; alpha^2 then differs from diffusers' by up to
    5e-7 (measured at T = 1000), and by up to 5e-6 of itself where it nears zero.
    """
    roots = np.sqrt(_cumulative(betas))
    first, last = roots[0], roots[-1]
    squares = ((roots - last) * (first / (first - last))) ** 2
    return np.float32(1) - np.append(squares[:1], squares[1:] / squares[:-1])


def _alphas_sigmas(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    exact = squares.astype(np.float64)
    return np.sqrt(exact), np.sqrt(1 - exact)
