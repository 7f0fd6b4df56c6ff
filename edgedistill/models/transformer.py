"""The stock class-conditional transformer, called as every other network that draws."""

from collections.abc import Mapping
from typing import Any

from diffusers import DiTTransformer2DModel
from torch import Tensor


class ClassTransformer(DiTTransformer2DModel):
    """diffusers' `DiTTransformer2DModel` (arXiv:2212.09748, section 3) that answers with its prediction alone.

    What it predicts of the variance, in further channels, is left out: no sampler here asks for it.
    """

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict raw.

        Args:
            sample: (batch, channels, height, width) state.
            timestep: (batch,) label of the time.
            class_labels: (batch,) integers; the number of classes itself stands for none.
        """
        whole = super().forward(sample, timestep, class_labels, return_dict=False)[0]
        return whole[:, : self.config["in_channels"]]


def build_transformer(config: Mapping[str, Any]) -> ClassTransformer:
    """Build an untrained transformer from the configuration of a stock one."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return ClassTransformer.from_config(public)
