"""Smaller Core ML packages: the weights of a saved one, in 8 bits or as indices into a table."""

import warnings
from pathlib import Path
from typing import Any

from edgedistill.errors import ConfigError
from edgedistill.mlpackage import quiet_coremltools, read_package, write_package

WEIGHT_FORMATS = ("int8", "palette6", "palette4")

# Weights with fewer elements stay as they are: a table of 64 values and its description cost as much
# as they save. coremltools' own limit, 2048, would leave most of a small network uncompressed.
SMALLEST_WEIGHT = 512


def compress_coreml(source: Path, target: Path, weight_format: str) -> dict[str, Any]:
    """Write a package whose weights are compressed; activations stay as they are.

    The result depends on the source alone: coremltools seeds its k-means.

    Args:
        source: An ``.mlpackage``, float16 or float32.
        target: The ``.mlpackage`` to write.
        weight_format: ``"int8"`` (linear, symmetric, one scale per output channel), ``"palette6"`` or
            ``"palette4"`` (k-means to 64 or 16 values per weight).

    Returns:
        What made it: options, version, and how many of the weights were compressed.

    Raises:
        BundleError: If the source is not a whole package.
        ConfigError: If the format is unknown, or no weight is large enough to be compressed.
        MissingDependencyError: If coremltools is not installed.
    """
    if weight_format not in WEIGHT_FORMATS:
        msg = f"Unknown Core ML weight format {weight_format!r}: choose one of {', '.join(WEIGHT_FORMATS)}."
        raise ConfigError(msg)
    model = read_package(source)
    with quiet_coremltools() as coremltools, warnings.catch_warnings():
        # A weight with fewer distinct values than the table, such as zeros, is stored exactly.
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        smaller = _compress(coremltools.optimize.coreml, model, weight_format)
        count = _count_compressed(smaller)
        if not count:
            msg = f"{source}: no weight has more than {SMALLEST_WEIGHT} elements; there is nothing to compress."
            raise ConfigError(msg)
        write_package(smaller, target, read_package)
    return {
        "compressor": "coremltools",
        "weight_format": weight_format,
        "smallest_weight": SMALLEST_WEIGHT,
        "compressed_weights": count,
        "coremltools": coremltools.__version__,
    }


def _compress(optimize: Any, model: Any, weight_format: str) -> Any:
    if weight_format == "int8":
        settings = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric",
            dtype="int8",
            granularity="per_channel",
            weight_threshold=SMALLEST_WEIGHT,
        )
        config = optimize.OptimizationConfig(global_config=settings)
        return optimize.linear_quantize_weights(model, config)
    settings = optimize.OpPalettizerConfig(
        mode="kmeans",
        nbits=int(weight_format.removeprefix("palette")),
        weight_threshold=SMALLEST_WEIGHT,
    )
    config = optimize.OptimizationConfig(global_config=settings)
    return optimize.palettize_weights(model, config)


def _count_compressed(model: Any) -> int:
    main = model.get_spec().mlProgram.functions["main"]
    operations = main.block_specializations[main.opset].operations
    return sum(operation.type.startswith("constexpr_") for operation in operations)
