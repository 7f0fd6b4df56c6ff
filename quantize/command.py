"""`edgedistill quantize`: read the command line, call, print."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.arguments import add_command, add_json, add_target, target_of
from edgedistill.errors import ConfigError

if TYPE_CHECKING:
    from edgedistill.bundle import Bundle

    from .config import Config

_HEADERS = ("artifact", "from", "MB before", "after", "ratio", "SNR dB", "compressed", "float")
_LEGEND = """\
SNR: the smaller network against its source, one call on a held-out golden sample, worst row.
compressed, float: weights that were made smaller, and weights that were left as they are."""
_DESCRIPTION = """\
Make the artifacts of a bundle smaller and write them, with the PyTorch reference, as a bundle of
their own. Each result is opened and run on a held-out sample before anything is written."""
_EPILOG = """\
examples:
  edgedistill quantize demo/bundle smaller --weight-format int8
  edgedistill quantize demo/bundle smaller --quant-mode int8
  edgedistill quantize demo/bundle smaller --weight-format palette6 --only coreml
  edgedistill quantize demo/bundle smaller --quant-mode int8 --networks unet
  edgedistill quantize demo/bundle smaller --quant-mode int8 --num-samples 32 \\
      --ignored-scope '.*conv_in.*' '.*conv_out.*' '.*time_emb.*'

--weight-format stores smaller weights and computes in float: nearest to the original, for all
formats. --quant-mode computes in 8 bits too, calibrated on what the student's own rows feed, for
ONNX and OpenVINO; large networks get faster on OpenVINO, not on ONNX Runtime.
A SMALLER that holds the same student keeps what it has. Of a pipeline, --networks takes a part of
text_encoder, unet, vae_decoder, vae_encoder; parts of later calls join those of earlier ones.
Exit status: 0 fine, 1 a smaller network answers too differently, 2 bad input.
"""


def register(commands: Any) -> None:
    """Add `edgedistill quantize`."""
    short = "make a bundle smaller: int8, palettes"
    parser = add_command(commands, "quantize", short, _DESCRIPTION, _EPILOG)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder that `export` made")
    add_target(parser, "SMALLER")
    _add_ways(parser)
    parser.add_argument(
        "--only",
        metavar="FORMATS",
        help="formats to make smaller, such as onnx,openvino (default: all)",
    )
    parser.add_argument(
        "--networks",
        metavar="NAME",
        nargs="+",
        default=[],
        help="networks to make smaller, such as vae_decoder; others stay as they are (default: all)",
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _add_ways(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_argument_group("weights alone")
    weights.add_argument(
        "--weight-format", metavar="F", help="one of int8; palette6, palette4 (Core ML alone)"
    )
    weights.add_argument(
        "--quantize-nbits",
        metavar="N",
        type=int,
        help="8, 6 or 4: the same as --weight-format int8, palette6, palette4",
    )
    both = parser.add_argument_group("weights and activations")
    both.add_argument(
        "--quant-mode",
        "--act-precision",
        metavar="M",
        help="int8, the only one (ONNX, OpenVINO)",
    )
    both.add_argument(
        "--num-samples",
        "--subset-size",
        dest="subset_size",
        metavar="N",
        type=int,
        help="most calibration samples (default: 300)",
    )
    both.add_argument(
        "--smooth-quant-alpha",
        metavar="A",
        type=float,
        help="0 to 1 (default: no SmoothQuant)",
    )
    both.add_argument(
        "--ignored-scope",
        metavar="PATTERN",
        nargs="+",
        help="operations that stay in float (default: conv_in, conv_out, time_embedding)",
    )


def _run(options: argparse.Namespace) -> int:
    target = target_of(options, "SMALLER")
    from edgedistill.bundle import Bundle
    from edgedistill.known_bad import warn_known_bad

    from .assemble import plan, quantize_bundle

    config = _config(options)
    only = [name for name in (options.only or "").split(",") if name]
    bundle = Bundle.open(options.bundle)
    chosen: dict[str, Any] = {"only": only, "networks": options.networks}
    planned = plan(bundle, config, **chosen)
    warn_known_bad({"quantize", *(job.result.format for job in planned.jobs)}, "quantize")
    rows = {job.result.name: bundle.size(job.source) for job in planned.jobs}
    smaller = quantize_bundle(
        bundle, target, config, **chosen, overwrite=options.overwrite, progress=_bar
    )
    made = [_entry(smaller, name, before) for name, before in rows.items()]
    if options.json:
        result = {"output": str(target), "artifacts": made, "left_out": dict(planned.left_out)}
        print(json.dumps(result, indent=1))
    else:
        print(_text(target, made, planned.left_out))
    return 0


def _config(options: argparse.Namespace) -> "Config":
    from .config import PtqConfig, WeightOnlyConfig

    weights = _weight_format(options)
    if (weights is None) == (options.quant_mode is None):
        msg = (
            "Give either --weight-format (weights alone) or --quant-mode (weights and activations)."
        )
        raise ConfigError(msg)
    names = ("subset_size", "smooth_quant_alpha", "ignored_scope")
    settings = {k: getattr(options, k) for k in names if getattr(options, k) is not None}
    if weights is not None:
        if settings:
            given = ", ".join("--" + name.replace("_", "-") for name in settings)
            msg = f"{given}: only for --quant-mode; weights alone need no calibration."
            raise ConfigError(msg)
        return WeightOnlyConfig(weights)
    if options.quant_mode != "int8":
        msg = f"`--quant-mode` must be int8, got {options.quant_mode!r}."
        raise ConfigError(msg)
    if "ignored_scope" in settings:
        settings["ignored_scope"] = tuple(settings["ignored_scope"])
    return PtqConfig(**settings)


def _weight_format(options: argparse.Namespace) -> str | None:
    if options.quantize_nbits is None:
        return options.weight_format
    if options.weight_format is not None:
        msg = "--quantize-nbits is another word for --weight-format; give one of them."
        raise ConfigError(msg)
    return "int8" if options.quantize_nbits == 8 else f"palette{options.quantize_nbits}"


def _bar(items: Sequence[Any], what: str) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(items, what, leave=False, disable=None)


def _entry(smaller: "Bundle", name: str, before: int) -> dict[str, Any]:
    artifact = smaller.artifact(name)
    networks = artifact.made_with["networks"].values()
    kept = [item["float_weights"] for item in networks if "float_weights" in item]
    after = smaller.size(artifact)
    return {
        "artifact": name,
        "from": artifact.made_with["source"],
        "bytes_before": before,
        "bytes_after": after,
        "ratio": round(before / after, 3),
        "snr_db": round(min(item["snr_db"] for item in networks), 2),
        "compressed_weights": sum(item.get("compressed_weights", 0) for item in networks),
        "float_weights": sum(kept) if kept else None,
    }


def _text(target: Path, made: Sequence[dict[str, Any]], left_out: Mapping[str, str]) -> str:
    from edgedistill.terminal import aligned

    rows = [
        [
            item["artifact"],
            item["from"],
            f"{item['bytes_before'] / 1e6:.2f}",
            f"{item['bytes_after'] / 1e6:.2f}",
            f"{item['ratio']:.1f}",
            f"{item['snr_db']:.1f}",
            str(item["compressed_weights"]),
            "-" if item["float_weights"] is None else str(item["float_weights"]),
        ]
        for item in made
    ]
    notes = [f"{name} left out: {reason}." for name, reason in left_out.items()]
    return "\n".join([str(target), "", aligned(_HEADERS, rows), "", *notes, _LEGEND])
