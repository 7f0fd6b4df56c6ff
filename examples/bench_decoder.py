"""Ways to decode one latent of Stable Diffusion 1.5, side by side: time, memory, and how far the picture moves.

python examples/bench_decoder.py [--side 512] [--work DIR] [--rounds R] [--runs K] [--only WAY ...] [--docs FILE] [--json]

The decoders have the real architectures, the AutoencoderKL of Stable Diffusion and the AutoencoderTiny of diffusers'
defaults (that of TAESD), with random weights. Each way runs in fresh processes, in turn, on ONNX Runtime and OpenVINO:
see `bench_decoder_run.py`. Figures are medians over the rounds. Decibels are SNR against float32 of the same weights
on the same runtime; random weights say how rounding goes through the network, and little about tiles, whose loss is
that of pictures.
"""

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench_decoder_run import FILES, FREE, RUNTIMES
from documents import listed, machine, paragraphs, put, table
from edgedistill.agreement import finite_db, psnr_db, snr_db
from edgedistill.environment import versions
from edgedistill.files import read_json
from edgedistill.models import store
from edgedistill.models.vae import VaeDecoder
from edgedistill.teacher import ARCHITECTURES
from edgedistill.terminal import aligned
from export.dialects import Dialect
from export.to_onnx import write_onnx
from export.to_openvino import write_openvino
from quantize.config import Config, PtqConfig, WeightOnlyConfig
from quantize.with_nncf import compress_nncf

RUN = Path(__file__).with_name("bench_decoder_run.py")
WRITERS: Mapping[str, Any] = {"onnx": write_onnx, "openvino": write_openvino}
NETWORKS = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}
SCALES = {
    "kl": 0.18215,
    "tiny": 1.0,
}  # what latents are multiplied by before a diffusion network sees them
CONFIGS: Mapping[str, Config] = {"int8-weights": WeightOnlyConfig("int8"), "int8": PtqConfig()}
FACTOR, CHANNELS = 8, 4
CALIBRATION = (3, 32)  # latents and their sides
PACKAGES = ("openvino", "onnxruntime", "nncf", "torch", "diffusers")
UNITS = {
    "load_s": "load, s",
    "first_s": "first, s",
    "warm_s": "further, s",
    "warm_cpu_s": "CPU s",
    "peak_mb": "peak, MB",
    "file_mb": "file, MB",
}
DECIBELS = {"snr_db": "SNR, dB", "psnr_db": "PSNR, dB"}
PEAK = 2.0  # from black to white


@dataclass(frozen=True)
class Way:
    """How a latent is decoded.

    Fields:
        network: One of `NETWORKS`.
        weights: ``float32``, or how it was made smaller.
        arithmetic: ``f32``, or ``bf16``, which only OpenVINO has, on processors that have it.
        tile: Sides of a tile in pixels of the latent; None: whole.
    """

    network: str = "kl"
    weights: str = "float32"
    arithmetic: str = "f32"
    tile: int | None = None

    @property
    def label(self) -> str:
        """What it is called in tables."""
        tiles = [] if self.tile is None else [f"tiles of {self.tile}"]
        return ", ".join([NETWORKS[self.network], self.weights, self.arithmetic, *tiles])


WAYS = {
    "kl": Way(),
    "kl-bf16": Way(arithmetic="bf16"),
    "kl-int8-weights": Way(weights="int8-weights"),
    "kl-int8": Way(weights="int8"),
    "kl-int8-bf16": Way(weights="int8", arithmetic="bf16"),
    "kl-tiles": Way(tile=32),
    "kl-tiles-bf16": Way(tile=32, arithmetic="bf16"),
    "tiny": Way("tiny"),
    "tiny-bf16": Way("tiny", arithmetic="bf16"),
    "tiny-int8": Way("tiny", "int8"),
}


def prepare(work: Path) -> None:
    """Write every decoder in every format and precision, unless they are there."""
    for name, kind in NETWORKS.items():
        folder = work / name
        if not (folder / "done").is_file():
            write(decoder_of(kind), SCALES[name], folder)
            (folder / "done").touch()


def decoder_of(kind: str) -> VaeDecoder:
    """Build a decoder of random weights, drawn as PyTorch draws them."""
    torch.manual_seed(0)
    config = {"_class_name": kind}
    if kind == "AutoencoderKL":
        config = read_json(ARCHITECTURES / "stable-diffusion-v1-5" / "vae" / "config.json")
    return VaeDecoder(store.build(config), (64, 64)).eval()


def write(decoder: VaeDecoder, scale: float, folder: Path) -> None:
    """Write a decoder as loaders of pipelines want it, sizes free, and make it smaller."""
    generator = torch.Generator().manual_seed(1)
    count, side = CALIBRATION
    latents = torch.randn(count, CHANNELS, side, side, generator=generator) / scale
    batches = [{"latent_sample": latent[None].numpy()} for latent in latents]
    for form, writer in WRITERS.items():
        source = folder / "float32" / FILES[form]
        source.parent.mkdir(parents=True, exist_ok=True)
        _, spoken = Dialect(form, free_sizes=True).of(decoder, decoder.signature)
        told = writer(spoken, FREE, source)
        print(source, f"{told['snr_db']:.1f} dB", file=sys.stderr)
        for precision, config in CONFIGS.items():
            compress_nncf(source, folder / precision / FILES[form], form, config, batches)


def possible(form: str, way: Way) -> bool:
    """Whether a runtime has the arithmetic here."""
    if way.arithmetic == "f32":
        return True
    import openvino as ov

    return form == "openvino" and "BF16" in ov.Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )


def run_once(form: str, way: Way, options: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """Decode in a fresh process; return its figures and the picture."""
    picture = options.work / "picture.npy"
    path = options.work / way.network / way.weights / FILES[form]
    words = [sys.executable, RUN, form, path, options.work / f"{way.network}.npy", picture]
    words += ["--runs", options.runs, "--precision", way.arithmetic]
    words += [] if way.tile is None else ["--tile", way.tile]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{form}, {way.label}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    found |= {key: statistics.median(found[key]) for key in ("warm_s", "warm_cpu_s")}
    size = sum(part.stat().st_size for part in path.parent.glob(f"{path.stem}.*"))
    return {**found, "file_mb": size / 1e6}, np.load(picture)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the medians of every way on every runtime."""
    cases = [
        (form, name) for form in RUNTIMES for name in options.only if possible(form, WAYS[name])
    ]
    taken: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    pictures: dict[tuple[str, str], np.ndarray] = {}
    for _ in range(options.rounds):
        for (form, name), rounds in taken.items():
            figures, pictures[form, name] = run_once(form, WAYS[name], options)
            rounds.append(figures)
            print(form, name, {k: round(v, 3) for k, v in figures.items()}, file=sys.stderr)
    return [
        {
            "runtime": RUNTIMES[form],
            "way": name,
            **{key: statistics.median(item[key] for item in rounds) for key in UNITS},
            **apart(pictures, form, name),
        }
        for (form, name), rounds in taken.items()
    ]


def apart(pictures: Mapping[tuple[str, str], np.ndarray], form: str, name: str) -> dict[str, float]:
    """Return the dB against the whole float32 decoder of the same weights; nothing where it is that one."""
    reference = pictures.get((form, WAYS[name].network))
    if reference is None or name == WAYS[name].network:
        return {}
    picture = pictures[form, name]
    found = {"snr_db": snr_db(reference, picture), "psnr_db": psnr_db(reference, picture, PEAK)}
    return {key: finite_db(value) for key, value in found.items()}


def rows_of(record: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield one row of cells per way and runtime."""
    for item in record["decoders"]:
        cells = [f"{item[key]:.3g}" if key.endswith("_s") else f"{item[key]:.0f}" for key in UNITS]
        decibels = [f"{item[key]:.1f}" if key in item else "" for key in DECIBELS]
        yield [item["runtime"], WAYS[item["way"]].label, *cells, *decibels]


def headers() -> list[str]:
    """Return the names of the columns."""
    return ["runtime", "decoder", *UNITS.values(), *DECIBELS.values()]


def markdown(record: Mapping[str, Any]) -> str:
    """Return the figures for a document."""
    named = listed(PACKAGES, record["versions"])
    low, high = record["load"]
    head = f"One latent of {record['side']}x{record['side']} pixels; processes per way: {record['rounds']}, further pictures in each: {record['runs']}; {record['date']}, {record['machine']}, load average {low} to {high}; {named}."
    return f"{paragraphs(head)}\n\n{table(headers(), rows_of(record), 2)}\n"


def main() -> int:
    """Write the decoders, measure, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="of the picture, pixels")
    parser.add_argument("--work", type=Path, default=Path("build/bench-decoder"))
    parser.add_argument("--rounds", type=int, default=1, help="processes per way")
    parser.add_argument("--runs", type=int, default=3, help="pictures behind the first")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument("--docs", type=Path, help="put the table between this file's markers too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.work)
    side = options.side // FACTOR
    latent = np.random.default_rng(0).standard_normal((1, CHANNELS, side, side))
    for network, scale in SCALES.items():
        np.save(options.work / f"{network}.npy", (latent / scale).astype(np.float32))
    before = os.getloadavg()[0]
    decoders = measure(options)
    record = {
        **{name: getattr(options, name) for name in ("side", "rounds", "runs")},
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": machine(),
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "versions": versions(),
        "decoders": decoders,
    }
    if options.docs:
        put(markdown(record), options.docs, f"bench_decoder.py --side {options.side}")
    told = json.dumps(record, indent=1) if options.json else aligned(headers(), [*rows_of(record)])
    print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
