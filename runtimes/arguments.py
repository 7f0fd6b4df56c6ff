"""What `edgedistill sample` and `edgedistill parity` take on the command line."""

import argparse
from pathlib import Path
from typing import Any

from edgedistill.arguments import add_json, positive
from edgedistill.errors import ConfigError

SHEET_WIDTH = 256
SAMPLE_EPILOG = """\
examples:
  edgedistill sample demo/bundle --runtime onnxruntime --seed 0 -n 16 -o grid.png
  edgedistill sample demo/bundle --runtime openvino --class 3 1 4 -o pi.png
  edgedistill sample OUT --runtime openvino --prompt "a ship in the rain" --guidance-scale 5 -o ship.png
  edgedistill sample demo/compressed --artifact onnx-int8 -n 100 --columns 10 --npy arrays.npy -o grid.png
  edgedistill sample demo/bundle --class 8 --image three.png --strength 0.6 -o eight.png

Sample i is made from seed + i alone: neither -n nor the runtime changes its noise.
--class and --prompt take one, or several that take turns; left out, all classes or examples take turns.
--image is edited: with --strength as a whole, with --mask where the mask is white.
--vae-tiling needs a decoder of free sizes, such as `export onnx ... --dynamic` writes of a pipeline.
"""
PARITY_EPILOG = """\
examples:
  edgedistill parity demo/bundle
  edgedistill parity demo/bundle --runtime openvino --report parity.html
  edgedistill parity demo/bundle --runtime openvino --device GPU --inference-precision f16
  edgedistill parity demo/bundle demo/compressed --json > parity.json
  edgedistill parity demo/bundle --outputs device.safetensors --artifact coreml-float16

Several bundles of one student land in one report. A runtime that is not installed is skipped and
named, unless --runtime asks for it.
--outputs compares arrays that an app wrote, named as in BUNDLE/probes/golden.safetensors: `output`, and
`row.I.next` of an app that is fed noise.K and condition.NAME; `row.I.raw` of one that is fed row.I.state.
Fewer samples will do, the first ones. --artifact or --precision says whose floors they must reach.
Exit status: 0 every artifact reaches its floors, 1 one does not, 2 bad input.
"""


def add_sample(parser: argparse.ArgumentParser) -> None:
    """Add what `edgedistill sample` takes."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder that `export` made")
    parser.add_argument(
        "--runtime",
        metavar="R",
        help="torch, onnxruntime, openvino, coreml (default: the first that is installed)",
    )
    parser.add_argument(
        "--artifact", metavar="NAME", help="one of BUNDLE (default: the first of the runtime)"
    )
    parser.add_argument("-o", "--output", metavar="PNG", type=Path, required=True, help="the sheet")
    parser.add_argument(
        "-n",
        "--num-samples",
        metavar="N",
        type=positive,
        help="how many (default: as many as classes or prompts are named, else 16)",
    )
    parser.add_argument(
        "--seed", metavar="S", type=_seed, default=0, help="seed of the first sample (default: 0)"
    )
    parser.add_argument(
        "--class",
        "--class-labels",
        dest="labels",
        metavar="K",
        type=int,
        nargs="+",
        help="class of each sample (default: all in turn)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        help="prompt of each sample (default: the model's examples in turn)",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument(
        "--guidance-scale",
        metavar="G",
        type=float,
        help="1 is no guidance (default: the bundle's)",
    )
    parser.add_argument(
        "--sampler", metavar="NAME", help="one of the bundle's samplers (default: its first)"
    )
    parser.add_argument("--image", metavar="FILE", type=Path, help="image to edit")
    parser.add_argument(
        "--strength", metavar="S", type=float, help="how far to go from the image, 0 to 1"
    )
    parser.add_argument("--mask", metavar="FILE", type=Path, help="white: drawn anew; black: kept")
    parser.add_argument(
        "--low-memory", action="store_true", help="open one network after another, keep none"
    )
    parser.add_argument(
        "--vae-tiling",
        metavar="N",
        nargs="?",
        const=True,
        type=positive,
        help="decode in tiles of NxN latent pixels, for less memory (default without a number: 32)",
    )
    parser.add_argument(
        "--vae-tile-overlap",
        metavar="N",
        type=int,
        help="latent pixels that neighbouring tiles share (default: a quarter of the tile)",
    )
    parser.add_argument(
        "--columns", metavar="N", type=positive, help="columns of the sheet (default: a square)"
    )
    parser.add_argument(
        "--scale",
        metavar="N",
        type=positive,
        help=f"enlarge each pixel N times (default: to a sheet of at least {SHEET_WIDTH} pixels)",
    )
    parser.add_argument("--npy", metavar="FILE", type=Path, help="also write the float32 arrays")
    _add_shared(parser)


def add_parity(parser: argparse.ArgumentParser) -> None:
    """Add what `edgedistill parity` takes."""
    parser.add_argument(
        "bundles", metavar="BUNDLE", type=Path, nargs="+", help="folders that hold one student"
    )
    parser.add_argument(
        "--runtime", metavar="R", nargs="+", default=[], help="runtimes to compare (default: all)"
    )
    parser.add_argument(
        "--artifact",
        metavar="NAME",
        nargs="+",
        default=[],
        help="artifacts to compare (default: all)",
    )
    parser.add_argument("--report", metavar="HTML", type=Path, help="also write a page")
    parser.add_argument(
        "--compiled",
        action="store_const",
        const=True,
        help="of --runtime coreml, on a Mac: what coreml/compile_on_mac.sh compiled, in place of the packages",
    )
    outputs = parser.add_argument_group("arrays that a device wrote")
    outputs.add_argument(
        "--outputs", metavar="FILE", type=Path, help="safetensors to compare; nothing is run"
    )
    outputs.add_argument(
        "--precision",
        metavar="P",
        help="whose floors they must reach, such as float16 (default: those of --artifact)",
    )
    outputs.add_argument(
        "--sampler", metavar="NAME", help="which sampler made them (default: the bundle's first)"
    )
    _add_shared(parser)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        metavar="D",
        help="openvino: CPU, GPU, NPU, AUTO; onnxruntime: cpu, cuda; torch: cpu, cuda, mps; coreml: all, ane, gpu, "
        "cpu of a Mac, else reference (default: cpu; coreml: all, else reference)",
    )
    parser.add_argument(
        "--inference-precision",
        metavar="P",
        help="precision of openvino's arithmetic: f32, f16, bf16, or auto, the device's own choice (default: f32)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=positive, help="CPU threads (default: the runtime's choice)"
    )
    add_json(parser)


def runtime_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is handed to the runtime."""
    given = {
        "device": options.device,
        "precision": options.inference_precision,
        "threads": options.threads,
        "compiled": getattr(options, "compiled", None),  # of `parity` alone
    }
    return {name: value for name, value in given.items() if value is not None}


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse what says nothing about arrays that a device wrote, and what is said of them where there are none.

    Raises:
        ConfigError: In either case.
    """
    names, why = ["precision", "sampler"], "only with --outputs"
    if options.outputs is not None:
        names = ["runtime", "device", "inference_precision", "threads", "compiled"]
        why = "not with --outputs, which runs nothing"
    given = ", ".join("--" + name.replace("_", "-") for name in names if getattr(options, name))
    if given:
        msg = f"{given}: {why}."
        raise ConfigError(msg)
    if options.outputs is not None and (len(options.bundles) > 1 or len(options.artifact) > 1):
        msg = (
            "--outputs: name the one bundle, and at most the one artifact, that ran on the device."
        )
        raise ConfigError(msg)


def _seed(value: str) -> int:
    if not value.isdigit() or int(value) >= 2**127:
        msg = f"must be a whole number from 0 to 2**127 - 1, got {value!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(value)
