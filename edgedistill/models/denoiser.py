"""Any network seen as a denoiser: raw, x0 and eps of a noised state at an integer timestep."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgedistill.models import store
from edgedistill.prediction import PredictionType, eps_coefficients, x0_coefficients
from edgedistill.schedule import Schedule


class Denoiser(nn.Module):
    """A network, the noise schedule it was trained on and the kind of its prediction.

    Timesteps are diffusers' labels 0..T-1; -1 stands for the end of sampling (see `Schedule.alpha_sigma`).

    Args:
        network: Takes inputs by the names of its signature, returns raw.
        schedule: Gives alpha and sigma per timestep.
        prediction_type: What raw is.
    """

    alphas: Tensor
    sigmas: Tensor

    def __init__(
        self, network: nn.Module, schedule: Schedule, prediction_type: PredictionType
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.signature = store.signature(network)
        # Entry T is the final state, so that the label -1 finds it from the end.
        pairs = torch.tensor(
            [schedule.alpha_sigma(t) for t in [*range(schedule.num_train_timesteps), -1]],
            dtype=torch.float64,
        )
        self.register_buffer("alphas", pairs[:, 0].float(), persistent=False)
        self.register_buffer("sigmas", pairs[:, 1].float(), persistent=False)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each (batch, 1, 1, 1), of labels t (batch,)."""
        return self.alphas[t][:, None, None, None], self.sigmas[t][:, None, None, None]

    def raw(self, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the network's prediction, shaped as z; conditions it does not take are left out."""
        inputs = {"sample": z, "timestep": t.to(z.dtype)}
        wanted = [spec.name for spec in self.signature.inputs if spec.kind not in ("x", "t")]
        return store.call(self.network, {**inputs, **{name: conditions[name] for name in wanted}})

    def x0(self, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return D(z, t), the estimate of clean data."""
        return self.to_x0(z, t, self.raw(z, t, conditions))

    def to_x0(self, z: Tensor, t: Tensor, raw: Tensor) -> Tensor:
        """Convert a raw prediction to x0."""
        a_z, a_r = x0_coefficients(self.prediction_type, *self.alpha_sigma(t))
        return a_z * z + a_r * raw

    def to_eps(self, z: Tensor, t: Tensor, raw: Tensor) -> Tensor:
        """Convert a raw prediction to the implied noise."""
        e_z, e_r = eps_coefficients(self.prediction_type, *self.alpha_sigma(t))
        return e_z * z + e_r * raw
