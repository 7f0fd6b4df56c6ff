"""The identities that only right targets satisfy (guided and progressive distillation)."""

import pytest
import torch
from torch import Tensor, nn

from edgedistill.contract import BATCH, Signature, TensorSpec
from edgedistill.methods.losses import prediction_mse, weighted_mse
from edgedistill.methods.targets import cfg_combine, ddim_step, progressive_target
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule

SCHEDULE = Schedule.from_config(
    {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}
)


class Stub(nn.Module):
    """A fixed smooth function in place of a network."""

    config = {"sample_size": 4, "in_channels": 1, "out_channels": 1}

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.sin(2 * sample + timestep[:, None, None, None] / 300)


def denoiser(kind: str = "v_prediction") -> Denoiser:
    return Denoiser(Stub(), SCHEDULE, PredictionType(kind))


def noise(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_guidance_at_0_and_minus_1_is_exactly_one_of_the_branches() -> None:
    conditional, unconditional = noise(0), noise(1)
    assert torch.equal(cfg_combine(conditional, unconditional, torch.zeros(6)), conditional)
    assert torch.equal(cfg_combine(conditional, unconditional, -torch.ones(6)), unconditional)


def test_guidance_may_be_combined_on_raw_or_on_x0() -> None:
    d, z, t = denoiser(), noise(0), torch.tensor([1, 200, 400, 600, 800, 999])
    w, raws = torch.linspace(0, 4, 6), (noise(1), noise(2))
    on_raw = d.to_x0(z, t, cfg_combine(*raws, w))
    on_x0 = cfg_combine(d.to_x0(z, t, raws[0]), d.to_x0(z, t, raws[1]), w)
    torch.testing.assert_close(on_raw, on_x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_one_student_step_lands_where_two_teacher_steps_land(kind: str) -> None:
    d, z = denoiser(kind), noise(0)
    u, m, s = (
        torch.tensor(x)
        for x in ([999] * 3 + [499] * 3, [749] * 3 + [374] * 3, [499] * 3 + [249] * 3)
    )
    target = progressive_target(d, lambda state, t: d.x0(state, t, {}), z, u, m, s)
    middle = ddim_step(d, z, d.x0(z, u, {}), u, m)
    landed = ddim_step(d, middle, d.x0(middle, m, {}), m, s)
    torch.testing.assert_close(ddim_step(d, z, target, u, s), landed, rtol=0, atol=1e-6)


def test_the_last_step_returns_the_second_estimate_and_the_clamped_one_the_first() -> None:
    d, z = denoiser(), noise(0)
    end = torch.full((6,), -1)
    u, m = torch.full((6,), 499), torch.full((6,), 249)
    predict = lambda state, t: d.x0(state, t, {})  # noqa: E731
    middle = ddim_step(d, z, d.x0(z, u, {}), u, m)
    second = d.x0(middle, m, {})
    torch.testing.assert_close(
        progressive_target(d, predict, z, u, m, end), second, rtol=0, atol=1e-6
    )
    assert torch.equal(progressive_target(d, predict, z, u, end, end), d.x0(z, u, {}))


def test_targets_carry_no_gradient() -> None:
    d, z = denoiser(), noise(0).requires_grad_()
    t = torch.tensor
    made = progressive_target(
        d, lambda s, i: d.x0(s, i, {}), z, t([999] * 6), t([749] * 6), t([499] * 6)
    )
    assert not made.requires_grad


def test_weightings_are_the_errors_of_v_and_the_larger_of_x_and_eps() -> None:
    d, z, t = denoiser(), noise(0), torch.tensor([50, 200, 400, 600, 800, 990])
    raws = noise(1), noise(2)
    x0 = [d.to_x0(z, t, raw) for raw in raws]
    v_error = (raws[0] - raws[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(
        weighted_mse(d, *x0, t, "snr_plus_one"), v_error.mean(), rtol=1e-4, atol=0
    )
    x_error = (x0[0] - x0[1]).square().flatten(1).mean(1)
    eps = [d.to_eps(z, t, raw) for raw in raws]
    eps_error = (eps[0] - eps[1]).square().flatten(1).mean(1)
    wanted = torch.maximum(x_error, eps_error).mean()
    torch.testing.assert_close(weighted_mse(d, *x0, t, "truncated_snr"), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_plain_weighting_is_the_error_of_what_is_predicted(kind: str) -> None:
    d, z, t = denoiser(kind), noise(0), torch.tensor([50, 200, 400, 600, 800, 990])
    raws = noise(1), noise(2)
    x0 = [d.to_x0(z, t, raw) for raw in raws]
    wanted = (raws[0] - raws[1]).square().mean()
    torch.testing.assert_close(weighted_mse(d, *x0, t, "prediction"), wanted, rtol=1e-3, atol=0)


def test_the_signature_of_a_denoiser_is_its_networks() -> None:
    assert denoiser().signature == Signature(
        (
            TensorSpec("sample", (BATCH, 1, 4, 4), "float32", "x"),
            TensorSpec("timestep", (BATCH,), "float32", "t"),
        ),
        (TensorSpec("out_sample", (BATCH, 1, 4, 4), "float32", "raw"),),
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_error_of_the_prediction_is_that_of_x0_over_its_coefficient(kind: str) -> None:
    d, x, eps, raw = denoiser(kind), noise(0), noise(1), noise(2)
    t = torch.tensor([1, 200, 400, 600, 800, 980])
    alpha, sigma = d.alpha_sigma(t)
    z = alpha * x + sigma * eps
    wanted = {"epsilon": eps, "sample": x, "v_prediction": alpha * eps - sigma * x}[kind]
    found = prediction_mse(d, d.to_x0(z, t, raw), x, t)
    torch.testing.assert_close(found, (raw - wanted).square().mean(), rtol=1e-4, atol=0)


def test_the_error_of_edm_s_prediction_has_the_weight_of_its_code() -> None:
    schedule = Schedule.from_config({"_class_name": "EDMEulerScheduler"})
    edm = Denoiser(Stub(), schedule, PredictionType("edm"))
    sigma = float(schedule.sigmas[600])
    found = prediction_mse(edm, noise(0) + 1, noise(0), torch.full((6,), 600))
    assert found.item() == pytest.approx(sigma**-2 + 0.5**-2, rel=1e-5)
