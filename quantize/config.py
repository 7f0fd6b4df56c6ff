"""The ways to make an artifact smaller: what each can be done to, and its settings in NNCF's words."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgedistill.errors import ConfigError

# The first layer, the last one and the time embedding: few weights, and every error in them reaches all pixels.
KEPT_IN_FLOAT = (".*conv_in.*", ".*conv_out.*", ".*time_embedding.*")
MODEL_TYPES = ("transformer", None)
PRESETS = ("performance", "mixed")
RANGES = ("minmax", "mean_minmax", "histogram")


@dataclass(frozen=True)
class Way:
    """What a precision can be made from.

    Fields:
        formats: Formats whose artifacts can be given this precision.
        elsewhere: Why no other format can.
    """

    formats: tuple[str, ...]
    elsewhere: str = ""


FORMATS = ("onnx", "openvino", "coreml")
_PALETTE = Way(("coreml",), "look-up tables for weights are Core ML's; use --weight-format int8")
WAYS: Mapping[str, Way] = {
    "int8": Way(
        ("onnx", "openvino"),
        "Core ML quantizes activations on a Mac only; use --weight-format int8",
    ),
    "int8-weights": Way(FORMATS),
    "palette6": _PALETTE,
    "palette4": _PALETTE,
}


@dataclass(frozen=True)
class WeightOnlyConfig:
    """Smaller weights, activations untouched; needs no data.

    Fields:
        weight_format: ``int8``, ``palette6`` or ``palette4``.

    Raises:
        ConfigError: If the format is unknown.
    """

    weight_format: str = "int8"

    def __post_init__(self) -> None:
        known = [name.removesuffix("-weights") for name in WAYS if name != "int8"]
        _one_of("weight_format", self.weight_format, known)

    @property
    def precision(self) -> str:
        """The precision of what it makes."""
        return "int8-weights" if self.weight_format == "int8" else self.weight_format


@dataclass(frozen=True)
class PtqConfig:
    """8-bit weights and activations by post-training quantization on calibration probes.

    The defaults were measured on a trained class-conditional UNet of four rows (dB SNR of one call,
    mean and worst row): NNCF's own 13.7 and 3.1; `model_type` transformer without SmoothQuant
    30.6 and 28.2; also `ignored_scope` 31.8 and 29.1; also the mixed preset, no bias correction
    32.7 and 31.4; also the range over all rows 37.2 and 31.8.

    Fields:
        subset_size: Most calibration samples to use.
        ignored_scope: Regular expressions; operations whose name matches one stay in float.
        smooth_quant_alpha: From 0 to 1: SmoothQuant for matrix products; None: off.
        model_type: ``transformer`` quantizes only convolutions and matrix products, and leaves
            normalisation and the sums that skip connections make in float; None quantizes those too.
        preset: ``mixed`` gives activations a zero point, which their SiLU shape wants; ``performance`` none.
        activations_range: ``minmax`` spans what every row feeds. NNCF's usual ``mean_minmax`` averages the
            samples' extremes: with a few rows of very different noise it cuts off the widest of them.
        fast_bias_correction: Shift biases to undo the mean error of each layer.

    Raises:
        ConfigError: If a value cannot be.
    """

    subset_size: int = 300
    ignored_scope: tuple[str, ...] = KEPT_IN_FLOAT
    smooth_quant_alpha: float | None = None
    model_type: str | None = "transformer"
    preset: str = "mixed"
    activations_range: str = "minmax"
    fast_bias_correction: bool = False

    def __post_init__(self) -> None:
        if self.subset_size < 1:
            msg = f"`subset_size` must be at least 1, got {self.subset_size}."
            raise ConfigError(msg)
        alpha = self.smooth_quant_alpha
        if alpha is not None and not 0 <= alpha <= 1:
            msg = (
                f"`smooth_quant_alpha` must lie from 0 to 1, got {alpha:g}; leave it out for none."
            )
            raise ConfigError(msg)
        for pattern in self.ignored_scope:
            try:
                re.compile(pattern)
            except re.error as error:
                msg = f"`ignored_scope` {pattern!r} is no regular expression ({error})."
                raise ConfigError(msg) from error
        _one_of("model_type", self.model_type, MODEL_TYPES)
        _one_of("preset", self.preset, PRESETS)
        _one_of("activations_range", self.activations_range, RANGES)

    @property
    def precision(self) -> str:
        """The precision of what it makes."""
        return "int8"


Config = PtqConfig | WeightOnlyConfig


def _one_of(field: str, value: object, known: tuple[object, ...] | list[str]) -> None:
    if value not in known:
        msg = f"`{field}` must be one of {', '.join(map(str, known))}, got {value!r}."
        raise ConfigError(msg)
