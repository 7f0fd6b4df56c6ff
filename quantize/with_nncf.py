"""int8 with NNCF, for ONNX and OpenVINO: weights and activations, or weights alone."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgedistill.errors import ConfigError
from edgedistill.telemetry import require_silent

from . import onnx_files, openvino_files
from .calibration import Batch
from .config import KEPT_IN_FLOAT, Config, PtqConfig

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
_FILES: dict[str, Any] = {"onnx": onnx_files, "openvino": openvino_files}


def compress_nncf(
    source: Path,
    target: Path,
    format_: str,
    config: Config,
    batches: Sequence[Batch] = (),
    progress: Progress = lambda items, _: items,
) -> dict[str, Any]:
    """Write a smaller graph with the same inputs and outputs.

    Args:
        source: The float32 graph.
        target: The graph to write.
        format_: ``"onnx"`` or ``"openvino"``.
        config: What to do.
        batches: Calibration inputs; a `PtqConfig` needs at least one.
        progress: Wraps each pass over the batches; its second argument says what the pass is.

    Returns:
        What made it: options, version, and how many weights were compressed and how many were not.

    Raises:
        ConfigError: If NNCF refuses, as it does where a pattern of `ignored_scope` that the caller chose matches
            nothing.
        MissingDependencyError: If NNCF or the format's package is not installed.
    """
    files = _FILES[format_]
    nncf = require_silent("nncf", "quantize")
    model = files.read(source)
    with _quiet():
        found = files.backend_params(source)
        if isinstance(config, PtqConfig):
            try:
                model = _quantize(nncf, model, config, _Passes(batches, progress), found)
            except nncf.ValidationError as error:
                reason = " ".join(str(error).split())
                msg = f"{source}: NNCF refuses to quantize it ({reason}); change --ignored-scope and the other settings, or leave them out, or quantize the weights alone with --weight-format int8."
                raise ConfigError(msg) from error
        else:
            advanced = nncf.AdvancedCompressionParameters(backend_params=found)
            mode = nncf.CompressWeightsMode.INT8_ASYM
            model = nncf.compress_weights(model, mode=mode, advanced_parameters=advanced)
    compressed, kept = files.write(model, target)
    return {
        "compressor": "nncf",
        **asdict(config),
        "compressed_weights": compressed,
        "float_weights": kept,
        "nncf": nncf.__version__,
    }


class _Passes:
    """Calibration batches that show their progress each time NNCF goes through them."""

    def __init__(self, batches: Sequence[Batch], progress: Progress) -> None:
        self.batches = batches
        self.progress = progress

    def __iter__(self) -> Iterator[Batch]:
        yield from self.progress(self.batches, "calibration")

    def __len__(self) -> int:
        return len(self.batches)


def _quantize(
    nncf: Any, model: Any, config: PtqConfig, passes: _Passes, found: Mapping[str, Any]
) -> Any:
    ranges = require_silent("nncf.quantization.range_estimator", "quantize")
    alpha = -1 if config.smooth_quant_alpha is None else config.smooth_quant_alpha
    advanced = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=not config.fast_bias_correction,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=alpha),
        activations_range_estimator_params=getattr(
            ranges.RangeEstimatorParametersSet, config.activations_range.upper()
        ),
        backend_params=dict(found),
    )
    # The default patterns are for the networks that have such layers; the caller's own must fit.
    chosen = config.ignored_scope != KEPT_IN_FLOAT
    scope = nncf.IgnoredScope(patterns=list(config.ignored_scope), validate=chosen)
    return nncf.quantize(
        model,
        nncf.Dataset(passes),
        subset_size=len(passes),
        preset=nncf.QuantizationPreset(config.preset),
        model_type=config.model_type and nncf.ModelType(config.model_type),
        ignored_scope=scope,
        advanced_parameters=advanced,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's log below errors, and its own progress bars off stdout, where results go."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
