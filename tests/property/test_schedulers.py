"""A compiled table makes the same latents as the diffusers scheduler that it was compiled from.

diffusers is the oracle: same first noise, same later noise, same stand-in network, compared after every row.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from edgedistill.compiler import compile_scheduler
from edgedistill.sampler import RowTrace, run_table

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

# diffusers hands torch tensors to numpy 2 in a way that torch does not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 4)
BATCH = 2
TOLERANCE = 1e-5

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}

MOST_STEPS = 50
KINDS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
counts = st.integers(1, MOST_STEPS)
kinds = st.sampled_from(KINDS)
spacings = st.sampled_from(SPACINGS)
betas = st.sampled_from([LINEAR, SCALED, COSINE])
flags = st.booleans()
law = settings(max_examples=100, deadline=None, derandomize=True)


def stand_in(feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    """Stand for a network: a bounded, gentle function of state and time, so that rounding does not grow."""
    z, t = feeds["sample"], np.float32(feeds["timestep"])
    return {
        "out_sample": np.float32(0.8) * np.tanh(z)
        + np.float32(0.1) * np.cos(z[..., ::-1] + t / 300)
    }


def ours(scheduler: Any, count: int, noise: list[np.ndarray], eta: float) -> list[np.ndarray]:
    table = compile_scheduler(
        dict(scheduler.config),
        count,
        shape=SHAPE,
        scheduler_class=type(scheduler).__name__,
        eta=eta,
    )
    states: list[np.ndarray] = []

    def observe(trace: RowTrace) -> None:
        states.append(trace.next)

    run_table(table, {"unet": stand_in}, noise[: table.noise_count], {}, observe)
    return states


def theirs(
    scheduler: Any, count: int, noise: np.ndarray, step: dict[str, Any]
) -> Iterator[np.ndarray]:
    scheduler.set_timesteps(count)
    z = torch.from_numpy(noise) * first_scale(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        scaled = hasattr(scheduler, "scale_model_input")
        seen = (scheduler.scale_model_input(z, t) if scaled else z).numpy()
        raw = stand_in({"sample": seen, "timestep": float(t)})["out_sample"]
        z = scheduler.step(torch.from_numpy(raw), t, z, **step).prev_sample
        yield z.numpy()


def first_scale(scheduler: Any) -> Any:
    """Return what the first noise is multiplied by; a flow's scheduler leaves it as it is."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def draw(count: int) -> list[np.ndarray]:
    """Draw what a scheduler that is handed this generator will draw, call after call."""
    generator = torch.Generator().manual_seed(7)
    later = [torch.randn(BATCH, *SHAPE, generator=generator).numpy() for _ in range(count)]
    first = np.random.default_rng(3).standard_normal((BATCH, *SHAPE), dtype=np.float32)
    return [first, *later]


def difference(scheduler: Any, count: int, *, to_largest: bool = False, **step: Any) -> float:
    """Return the largest difference of the latents after any row, relative to their norm.

    With `to_largest`, relative to the largest norm so far: a solver that starts at sigma_max = 20000 and
    subtracts its way down to 1 cannot be better in float32.
    """
    noise = draw(count)
    got = ours(scheduler, count, noise, step.get("eta", 0.0))
    expected = list(theirs(scheduler, count, noise[0], step))
    assert len(got) == len(expected) == count
    norms = [float(np.linalg.norm(item)) for item in expected]
    if to_largest:
        first = float(np.linalg.norm(noise[0])) * float(first_scale(scheduler))
        norms = list(itertools.accumulate(norms, max, initial=first))[1:]
    gaps = [float(np.linalg.norm(a - b)) for a, b in zip(got, expected, strict=True)]
    return max(gap / norm for gap, norm in zip(gaps, norms, strict=True))


def seeded() -> Any:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "options", "eta"),
    [
        ("DDIMScheduler", {}, 0.0),
        ("LCMScheduler", {}, None),
        ("TCDScheduler", {}, 0.3),
        ("EulerDiscreteScheduler", {}, None),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, None),
        ("DPMSolverMultistepScheduler", {"solver_order": 2}, None),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, None),
    ],
)
def test_every_spacing_and_number_of_steps(
    name: str, options: dict[str, Any], eta: float | None, kind: str
) -> None:
    """The whole grid at one schedule; the tests below draw schedules and the other settings."""
    # LCM and TCD choose from the timesteps that they were distilled on, and know no spacing.
    spaced = name not in ("LCMScheduler", "TCDScheduler")
    settings = [{"timestep_spacing": spacing} for spacing in SPACINGS] if spaced else [{}]
    for setting, count in itertools.product(settings, range(1, MOST_STEPS + 1)):
        scheduler = getattr(diffusers, name)(**SCALED, prediction_type=kind, **options, **setting)
        step = {} if eta is None else {"eta": eta}
        if name in ("LCMScheduler", "TCDScheduler"):
            step["generator"] = seeded()
        assert difference(scheduler, count, **step) < TOLERANCE, (setting, count)


@law
@given(counts, kinds, spacings, betas, flags, flags, st.sampled_from([0.0, 0.3, 0.7]))
def test_ddim(
    count: int, kind: str, spacing: str, beta: dict[str, Any], clip: bool, to_one: bool, eta: float
) -> None:
    scheduler = diffusers.DDIMScheduler(
        **beta,
        prediction_type=kind,
        timestep_spacing=spacing,
        clip_sample=clip,
        set_alpha_to_one=to_one,
        steps_offset=int(to_one),
    )
    assert difference(scheduler, count, eta=eta, generator=seeded()) < TOLERANCE


@law
@given(counts, kinds, spacings, betas)
def test_ddim_with_the_full_variance(
    count: int, kind: str, spacing: str, beta: dict[str, Any]
) -> None:
    scheduler = diffusers.DDIMScheduler(**beta, prediction_type=kind, timestep_spacing=spacing)
    # At eta = 1 diffusers subtracts nearly equal variances in float32, down to the root of a negative number.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    assert difference(scheduler, count, eta=1.0, generator=seeded()) < TOLERANCE


@law
@given(counts, kinds, betas, flags, st.sampled_from([50, 100]), st.sampled_from([10.0, 0.01]))
def test_lcm(
    count: int, kind: str, beta: dict[str, Any], clip: bool, original: int, scaling: float
) -> None:
    scheduler = diffusers.LCMScheduler(
        **beta,
        prediction_type=kind,
        clip_sample=clip,
        original_inference_steps=original,
        timestep_scaling=scaling,
    )
    assert difference(scheduler, count, generator=seeded()) < TOLERANCE


@law
@given(counts, kinds, betas, st.sampled_from([50, 100]), st.sampled_from([0.0, 0.3, 1.0]))
def test_tcd(count: int, kind: str, beta: dict[str, Any], original: int, eta: float) -> None:
    scheduler = diffusers.TCDScheduler(
        **beta, prediction_type=kind, original_inference_steps=original
    )
    assert difference(scheduler, count, eta=eta, generator=seeded()) < TOLERANCE


@law
@given(counts, kinds, spacings, betas, flags, flags)
def test_euler(
    count: int, kind: str, spacing: str, beta: dict[str, Any], karras: bool, to_zero: bool
) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        **beta,
        prediction_type=kind,
        timestep_spacing=spacing,
        use_karras_sigmas=karras,
        final_sigmas_type="zero" if to_zero else "sigma_min",
    )
    assert difference(scheduler, count, to_largest=beta != SCALED) < TOLERANCE


# Below 15 steps, and not from there on, diffusers makes the last one of first order.
@example(14, "epsilon", "trailing", SCALED, 2, False, (False, True, False))
@example(15, "epsilon", "trailing", SCALED, 2, False, (False, True, False))
@law
@given(
    counts,
    kinds,
    spacings,
    betas,
    st.sampled_from([1, 2, 3]),
    flags,
    st.tuples(flags, flags, flags),
)
def test_dpm_solver(
    count: int,
    kind: str,
    spacing: str,
    beta: dict[str, Any],
    order: int,
    karras: bool,
    final: tuple[bool, bool, bool],
) -> None:
    to_zero, lower_order_final, euler_at_final = final
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **beta,
        prediction_type=kind,
        timestep_spacing=spacing,
        solver_order=order,
        use_karras_sigmas=karras,
        final_sigmas_type="zero" if to_zero else "sigma_min",
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
    )
    assert difference(scheduler, count) < TOLERANCE


@law
@given(counts, spacings)
def test_dpm_solver_with_a_clipped_cosine(count: int, spacing: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **COSINE, timestep_spacing=spacing, lambda_min_clipped=-5.1
    )
    assert difference(scheduler, count) < TOLERANCE


@law
@given(counts, st.sampled_from(["karras", "exponential"]), flags, st.sampled_from([80.0, 20.0]))
def test_edm_euler(count: int, levels: str, to_zero: bool, high: float) -> None:
    scheduler = diffusers.EDMEulerScheduler(
        sigma_schedule=levels, sigma_max=high, final_sigmas_type="zero" if to_zero else "sigma_min"
    )
    assert difference(scheduler, count, to_largest=True) < TOLERANCE


@example(14, "karras", 3, (False, True, False))
@example(15, "karras", 3, (False, True, False))
@law
@given(
    counts,
    st.sampled_from(["karras", "exponential"]),
    st.sampled_from([1, 2, 3]),
    st.tuples(flags, flags, flags),
)
def test_edm_dpm_solver(
    count: int, levels: str, order: int, final: tuple[bool, bool, bool]
) -> None:
    to_zero, lower_order_final, euler_at_final = final
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_schedule=levels,
        solver_order=order,
        final_sigmas_type="zero" if to_zero else "sigma_min",
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
    )
    # Where the last step goes from sigma_min to itself, diffusers divides zero by zero at third order.
    assume(to_zero or lower_order_final or euler_at_final or order < 3)
    assert difference(scheduler, count, to_largest=True) < TOLERANCE


@law
@given(counts, st.sampled_from([1.0, 3.0, 0.7]), st.sampled_from([100, 1000]))
def test_flow_match_euler(count: int, shift: float, T: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, num_train_timesteps=T)
    assert difference(scheduler, count) < TOLERANCE


@law
@given(
    counts,
    st.sampled_from(["sample", "v_prediction"]),
    spacings,
    st.sampled_from([LINEAR, SCALED]),
    st.sampled_from(["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]),
)
def test_zero_terminal_snr(
    count: int, kind: str, spacing: str, beta: dict[str, Any], name: str
) -> None:
    scheduler = getattr(diffusers, name)(
        **beta, prediction_type=kind, timestep_spacing=spacing, rescale_betas_zero_snr=True
    )
    to_largest = name == "EulerDiscreteScheduler"
    assert difference(scheduler, count, to_largest=to_largest) < TOLERANCE
