"""The twin of the Swift package's DPM-Solver++ makes that package's steps, and differs from diffusers where it does.

The oracle for Swift (apple/ml-stable-diffusion, DPMSolverMultistepScheduler) is its rule written down in
numpy float32: tables looked up by timestep, a history, an order per step. For diffusers it is diffusers.
"""

from typing import Any

import numpy as np
import pytest

from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.sampler import RowTrace, run_table
from edgedistill.validate import validate

# diffusers hands torch tensors to numpy 2 in a way that torch does not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (4, 8, 8)
TWIN = "SwiftDPMSolverMultistepScheduler"
F = np.float32
# Swift multiplies its alphas up in float32, diffusers in float64: measured 3e-6 of the largest state.
TOLERANCE = 1e-5


def network(z: np.ndarray, t: float) -> np.ndarray:
    """Predict eps as a gentle function of state and time, so that rounding does not grow."""
    return F(0.9) * np.tanh(z) + F(0.2) * np.cos(z[..., ::-1] + F(t / 300))


def first_noise() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((1, *SHAPE), dtype=np.float32)


def table(count: int, spacing: str = "linspace") -> Any:
    config = {"_class_name": TWIN, "timestep_spacing": spacing}
    return compile_scheduler(config, count, shape=SHAPE)


def ours(count: int, spacing: str = "linspace") -> tuple[list[int], list[np.ndarray]]:
    """Run the twin; return the timesteps and the estimate of x after each row, as the pipeline decodes it."""
    made, x0 = table(count, spacing), []

    def observe(trace: RowTrace) -> None:
        x0.append(trace.x0)

    def call(feeds: Any) -> dict[str, np.ndarray]:
        return {"out_sample": network(feeds["sample"], feeds["timestep"])}

    out = run_table(made, {"unet": call}, [first_noise()], {}, observe)
    np.testing.assert_array_equal(out, x0[-1])
    return [int(row.feeds["timestep"]) for row in made.rows], x0


class Swift:
    """The package's solver: float32 tables looked up by an integer timestep, a history of two estimates."""

    def __init__(self, count: int, spacing: str) -> None:
        ends = np.sqrt(F(0.00085)), np.sqrt(F(0.012))
        scale = (ends[1] - ends[0]) / F(999)
        roots = [F(i) * scale + ends[0] for i in range(1000)]
        bars, running = [], F(1)
        for root in roots:
            running = running * (F(1) - root * root)
            bars.append(running)
        squares = np.array(bars, F)
        self.karras = spacing == "karras"
        if spacing == "linspace":
            step = F(999) / F(count)
            self.times = [int(float(F(k) * step) + 0.5) for k in range(count, 0, -1)]
        elif spacing == "leading":
            self.times = [1 + k * (999 // (count + 1)) for k in range(count, 0, -1)]
        else:
            levels = np.sqrt((F(1) - squares) / squares)
            low, high = levels[0] ** F(1 / 7), levels[-1] ** F(1 / 7)
            ramp = [F(i) / F(count - 1) for i in range(count)]
            chosen = np.array([(high + r * (low - high)) ** F(7) for r in ramp], F)
            self.times = [self.nearest(level, np.log(levels)) for level in chosen]
            kept = np.append(chosen, chosen[-1])
            squares = F(1) / (F(1) + kept * kept)
        self.alpha, self.sigma = np.sqrt(squares), np.sqrt(F(1) - squares)
        self.lam = (np.log(self.alpha) - np.log(self.sigma)).astype(np.float64)
        self.estimates: list[np.ndarray] = []

    @staticmethod
    def nearest(level: np.ndarray, known: np.ndarray) -> int:
        wanted = np.log(level)
        below = int(np.clip(np.sum(wanted >= known) - 1, 0, len(known) - 2))
        share = np.clip((known[below] - wanted) / (known[below] - known[below + 1]), F(0), F(1))
        return int(np.floor((F(1) - share) * F(below) + share * F(below + 1) + F(0.5)))

    def index(self, t: int) -> int:
        if not self.karras:
            return t
        return self.times.index(t) if t in self.times else 0

    def step(self, raw: np.ndarray, t: int, z: np.ndarray) -> np.ndarray:
        count, position, now = len(self.times), self.times.index(t), self.index(t)
        after = self.index(0 if position == count - 1 else self.times[position + 1])
        self.estimates.append((z - raw * self.sigma[now]) / self.alpha[now])
        ratio = float(self.sigma[after]) / float(self.sigma[now])
        h = self.lam[after] - self.lam[now]
        gain = -float(self.alpha[after]) * np.expm1(-h)
        z = F(ratio) * z + F(gain) * self.estimates[-1]
        if position == 0 or (count < 15 and position >= count - 2):
            return z
        before = self.lam[now] - self.lam[self.index(self.times[position - 1])]
        share = F(0.5 * gain * h / before)
        return z + share * (self.estimates[-1] - self.estimates[-2])


def theirs(count: int, spacing: str) -> tuple[list[int], list[np.ndarray]]:
    solver, z = Swift(count, spacing), first_noise()
    for t in solver.times:
        z = solver.step(network(z, t), t, z)
    return solver.times, solver.estimates


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    largest = max(float(np.abs(item).max()) for item in expected)
    gaps = [float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]
    return max(gaps) / largest


@pytest.mark.parametrize("spacing", ["linspace", "leading", "karras"])
def test_twin_takes_the_packages_steps(spacing: str) -> None:
    for count in [*range(2 if spacing == "karras" else 1, 21), 25]:
        (times, made), (wanted, expected) = ours(count, spacing), theirs(count, spacing)
        assert times == wanted, count
        assert difference(made, expected) < TOLERANCE, count


def diffusers_estimates(count: int, **settings: Any) -> tuple[list[int], list[np.ndarray]]:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings
    )
    scheduler.set_timesteps(count)
    z, x0 = torch.from_numpy(first_noise()), []
    for t in scheduler.timesteps:
        raw = torch.from_numpy(network(z.numpy(), float(t)))
        z = scheduler.step(raw, t, z).prev_sample
        x0.append(scheduler.model_outputs[-1].numpy())
    return [int(t) for t in scheduler.timesteps], x0


@pytest.mark.parametrize("count", [1, 2, 15, 16, 20, 25])
def test_diffusers_takes_the_same_steps_up_to_two_and_from_fifteen_on(count: int) -> None:
    times, expected = diffusers_estimates(count)
    found, made = ours(count)
    assert found == times
    assert difference(made, expected) < TOLERANCE


def test_diffusers_takes_the_same_three_steps_where_its_order_is_one() -> None:
    times, expected = diffusers_estimates(3, solver_order=1)
    found, made = ours(3)
    assert found == times == [999, 666, 333]
    assert difference(made, expected) < TOLERANCE


def test_diffusers_own_order_differs_from_three_to_fourteen_steps() -> None:
    for count, least in ((3, 1e-2), (4, 5e-3), (8, 1e-3), (13, 5e-4)):
        times, expected = diffusers_estimates(count)
        found, made = ours(count)
        assert found == times
        assert difference(made, expected) > least, count


@pytest.mark.parametrize(
    ("count", "spacing", "settings"),
    [
        # Swift rounds a half up, numpy to even.
        (6, "linspace", {}),
        (18, "linspace", {}),
        # In float32 7 * (999 / 14) is below 499.5.
        (14, "linspace", {}),
        # Swift divides 999 by N + 1, diffusers 1000.
        (1, "leading", {"timestep_spacing": "leading", "steps_offset": 1}),
        (3, "leading", {"timestep_spacing": "leading", "steps_offset": 1}),
    ],
)
def test_grids_that_are_not_diffusers(count: int, spacing: str, settings: dict[str, Any]) -> None:
    times, _ = diffusers_estimates(count, **settings)
    found, _ = ours(count, spacing)
    assert found != times
    assert max(abs(a - b) for a, b in zip(found, times, strict=True)) <= 3


def test_table_validates_and_leading_starts_at_half_noise() -> None:
    for spacing in ("linspace", "leading", "karras"):
        assert validate(table(4, spacing)) == []
    assert [row.feeds["timestep"] for row in table(1, "leading").rows] == [500.0]


def test_what_the_package_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Swift package cannot take 1 steps of spacing karras"):
        table(1, "karras")
    # Several of these levels have the same nearest timestep, and the package would confuse them.
    with pytest.raises(ConfigError, match="Swift package cannot take 100 steps of spacing karras"):
        table(100, "karras")
    for key, value in (("beta_end", 0.02), ("prediction_type", "v_prediction")):
        with pytest.raises(ConfigError, match=key):
            compile_scheduler({"_class_name": TWIN, key: value}, 2, shape=SHAPE)
