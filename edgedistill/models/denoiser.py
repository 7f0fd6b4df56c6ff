"""Any network seen as a denoiser: raw, x0 and eps of a noised state at a labelled time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgedistill.contract import Signature, residual_shapes
from edgedistill.errors import ConfigError
from edgedistill.models import store
from edgedistill.prediction import PredictionType, eps_coefficients, x0_coefficients
from edgedistill.schedule import Schedule

MIN_EPSILON_ALPHA = 0.02


class Denoiser(nn.Module):
    """A network, the noise schedule it was trained on and the kind of its prediction.

    Times are the schedule's labels 0..T-1; -1 stands for the end of sampling (see
    `Schedule.alpha_sigma`). What the network is told of a label is the schedule's business.

    Args:
        network: Takes inputs by the names of its signature, returns raw.
        schedule: Gives alpha and sigma per label, what the network is told, and the scale of its input.
        prediction_type: What raw is.
    """

    alphas: Tensor
    sigmas: Tensor
    feeds: Tensor
    in_scales: Tensor
    instead_of_epsilon = "set `prediction_type: v_prediction` in the recipe"

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
        self.register_buffer("feeds", torch.tensor(schedule.feeds).float(), persistent=False)
        self.register_buffer(
            "in_scales", torch.tensor(schedule.in_scales).float(), persistent=False
        )
        self._scaled = bool((schedule.in_scales != 1).any())

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each (batch, 1, 1, 1), of labels t (batch,)."""
        return self.alphas[t][:, None, None, None], self.sigmas[t][:, None, None, None]

    def label_of(self, levels: Tensor) -> Tensor:
        """Return the labels whose noise levels sigma/alpha are nearest, as `Schedule.label_of`; shaped as given."""
        known = self.sigmas[:-1] / self.alphas[:-1]
        return torch.bucketize(levels, (known[:-1] * known[1:]).sqrt(), right=True)

    def raw(self, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the network's prediction, shaped as z.

        Args:
            z: (batch, channels, height, width) state.
            t: (batch,) labels.
            conditions: Its other inputs by name, those of kind ``s`` as labels; what it does not take
                is left out.
        """
        return store.call(self.network, self._inputs(self.signature, z, t, conditions))

    def with_residuals(
        self, side: nn.Module, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the conditions and the residuals that a side network makes of the same state.

        Args:
            side: Takes inputs by the names of its signature, returns the residuals in their order.
            z, t, conditions: As for `raw`.
        """
        signature = store.signature(plain_network(side))
        made = store.call_outputs(side, self._inputs(signature, z, t, conditions))
        return {**conditions, **{f"residual_{i}": value for i, value in enumerate(made)}}

    def _inputs(
        self, signature: Signature, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what a network of this schedule is fed."""
        inputs = {"sample": z, "timestep": self.feeds[t].to(z.dtype)}
        if self._scaled:
            inputs["sample"] = z * self.in_scales[t][:, None, None, None]
        for spec in signature.inputs:
            if spec.kind not in ("x", "t"):
                value = conditions[spec.name]
                # Where a jump ends at -1, the network is told of the cleanest label.
                inputs[spec.name] = self.feeds[value.clamp(min=0)] if spec.kind == "s" else value
        return inputs

    def tapped(
        self, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction and the features (batch, width, h, w) that leave the middle block.

        The network is called out of its wrappers: those of data parallelism would wait for gradients of
        its second half, which the features do not depend on.

        Raises:
            ConfigError: If the network has no middle block.
        """
        kept: list[Tensor] = []
        handle = self.middle.register_forward_hook(lambda *call: kept.append(call[2]))
        try:
            inputs = self._inputs(self.signature, z, t, conditions)
            raw = store.call(plain_network(self.network), inputs)
            return raw, kept[-1]
        finally:
            handle.remove()

    @property
    def middle(self) -> nn.Module:
        """The middle block of the network, out of its wrappers.

        Raises:
            ConfigError: If there is none.
        """
        return self._with_middle().mid_block

    def _with_middle(self) -> Any:
        plain: Any = plain_network(self.network)
        if getattr(plain, "mid_block", None) is None:
            msg = f"A {type(plain).__name__} without a middle block has no features to tap; choose a network that keeps it."
            raise ConfigError(msg)
        return plain

    @property
    def middle_shape(self) -> tuple[int, int, int]:
        """(width, height, width in pixels) of what leaves the middle block.

        Raises:
            ConfigError: If there is none.
        """
        return residual_shapes(store.config_of(self._with_middle()))[-1]

    @property
    def last_layer(self) -> nn.Parameter:
        """The last of the trained kernels and matrices: what the gradients of losses are compared on.

        Raises:
            ConfigError: If none is trained.
        """
        trained = [p for p in self.network.parameters() if p.requires_grad and p.ndim > 1]
        if not trained:
            msg = f"No layer of this {type(plain_network(self.network)).__name__} is trained, so that no gradients can be compared on it."
            raise ConfigError(msg)
        return trained[-1]

    def require_x0(self, label: int) -> None:
        """Refuse eps where the state holds next to nothing of x: x0 = (z - sigma eps) / alpha.

        Raises:
            ConfigError: If x0 at the label would be lost in rounding.
        """
        alpha, _ = self.schedule.alpha_sigma(label)
        if self.prediction_type is PredictionType.EPSILON and alpha < MIN_EPSILON_ALPHA:
            msg = (
                f"A student that predicts epsilon cannot start where alpha is {alpha:.1e}: x0 is lost in rounding; "
                f"{self.instead_of_epsilon}."
            )
            raise ConfigError(msg)

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


def plain_network(network: nn.Module) -> nn.Module:
    """Return a network out of the wrappers of torch.compile and of data parallelism."""
    for wrapper in ("module", "_orig_mod"):
        network = getattr(network, wrapper, network)
    return network
