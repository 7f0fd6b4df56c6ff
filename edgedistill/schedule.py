"""The noise schedule: alpha and sigma of every timestep, with the same numbers that diffusers uses.

diffusers makes its betas in float32 and multiplies them up with a float64 accumulator, and networks were
trained on what came out. Near t = 0 an error of 1e-7 in alpha^2 is one of 1e-4 in sigma^2, so a schedule
that is computed better than that would be another schedule. Here each float32 rounding is repeated, and
everything after alpha^2 is float64.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.errors import ConfigError

_LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_PIXEL = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_DEFAULTS = {"LCMScheduler": _LATENT, "TCDScheduler": _LATENT}
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving schedule ``z_t = alphas[t]*x + sigmas[t]*eps``.

    Fields:
        alphas, sigmas: float64 [T]; index 0 is the cleanest timestep.
        final: (alpha, sigma) after the last step: (1, 0), or those of timestep 0.
    """

    alphas: np.ndarray
    sigmas: np.ndarray
    final: tuple[float, float] = (1.0, 0.0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Build the schedule of a diffusers scheduler configuration; absent keys take diffusers' defaults.

        Raises:
            ConfigError: If the beta schedule is unknown or its numbers make no schedule.
        """
        full = {**_DEFAULTS.get(config.get("_class_name", ""), _PIXEL), **config}
        betas = _betas(full)
        if full.get("rescale_betas_zero_snr"):
            betas = _zero_terminal_snr(betas)
        alphas, sigmas = _alphas_sigmas(_cumulative(betas))
        to_one = full.get("set_alpha_to_one", True)
        return cls(alphas, sigmas, (1.0, 0.0) if to_one else (float(alphas[0]), float(sigmas[0])))

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps run from T - 1 (noise) to 0."""
        return len(self.alphas)

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """Return (alpha, sigma) at a timestep; -1 stands for "after the last step".

        Raises:
            ConfigError: If `t` is outside of [-1, T - 1].
        """
        if not -1 <= t < self.num_train_timesteps:
            msg = f"Timestep must lie in [-1, {self.num_train_timesteps - 1}], got {t}."
            raise ConfigError(msg)
        return self.final if t == -1 else (float(self.alphas[t]), float(self.sigmas[t]))

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
