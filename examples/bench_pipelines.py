"""Ours beside the pipelines of others on one exported folder: time, memory, and whether the images agree.

python examples/bench_pipelines.py [--size tiny|sd15] [--work DIR] [--rounds R] [--runs K] [--precision P]
    [--only ENGINE ...] [--docs FILE] [--json]

A pipeline of random weights is exported once as a single root. Every engine then opens that very folder in fresh
processes, in turn, every other round the other way round, and draws from the same noise and prompt in 4 steps
without guidance: see `bench_pipelines_run.py`. Figures are medians over the rounds; of the first, which fills the disk
cache, only the further images count where there are several. `sd15` is the architecture of Stable Diffusion 1.5 at
512x512 and needs 21 GB of disk; there the others also open what `optimum-cli export` makes of the same weights (`-own`).
Exit status 1 if a bar is missed.
"""

import argparse
import datetime as dt
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import make_tiny_pipeline
from documents import listed, machine, paragraphs, put, table
from edgedistill.bundle import Bundle
from edgedistill.environment import versions
from edgedistill.files import read_json
from edgedistill.manifest import MANIFEST
from edgedistill.models import store
from edgedistill.noise import noise_bank
from edgedistill.teacher import ARCHITECTURES
from edgedistill.terminal import aligned

STEPS = 4
SIZES = {"tiny": 16, "sd15": 512}  # sides of the image
RUN = Path(__file__).with_name("bench_pipelines_run.py")
ARCHITECTURE = ARCHITECTURES / "stable-diffusion-v1-5"
# By our engine: the others on its runtime.
RIVALS = {
    "edgedistill-ov": ("optimum-intel", "openvino-genai"),
    "edgedistill-ort": ("optimum-onnx",),
}
FORMS = {"edgedistill-ov": "openvino", "edgedistill-ort": "onnx"}
OWN = "-own"  # behind the name of a rival that opens optimum's export of the same weights, not ours
# By engine: whose folder it opens.
FOLDERS = {
    name + ending: form if ending else ""
    for ours, form in FORMS.items()
    for name, ending in [(ours, ""), *((name, end) for end in (OWN, "") for name in RIVALS[ours])]
}
ENGINES = {"tiny": [name for name in FOLDERS if not name.endswith(OWN)], "sd15": [*FOLDERS]}
GREY = 1 / 255 + 1e-4  # OpenVINO GenAI cuts off where others round
PACKAGES = ("openvino", "openvino-genai", "optimum-intel", "onnxruntime", "optimum-onnx", "torch")
WARM = ("warm_s", "warm_cpu_s")  # what the disk has no part in
UNITS = {
    "first_s": "start to first image, s",
    "load_s": "load, s",
    "warm_s": "further image, s",
    "warm_cpu_s": "CPU s",
    "first_peak_mb": "peak at first image, MB",
    "peak_mb": "peak, MB",
}
Figures = dict[str, dict[str, float]]
# Size: whose figure, which, of whom at most what share of it.
Bar = tuple[str, str, tuple[str, ...], float]
BARS: dict[str, list[Bar]] = {
    "tiny": [
        ("edgedistill-ov", "first_s", ("optimum-intel",), 0.25),
        ("edgedistill-ov", "first_peak_mb", ("optimum-intel",), 0.35),
        ("edgedistill-ort", "first_s", ("optimum-onnx",), 0.25),
        ("edgedistill-ort", "first_peak_mb", ("optimum-onnx",), 0.35),
    ],
    "sd15": [
        (ours, key, tuple(name + ending for name in RIVALS[ours]), limit)
        for ours, key, limit in (
            ("edgedistill-ov", "warm_s", 1.0),
            ("edgedistill-ov", "peak_mb", 0.75),
            ("edgedistill-ort", "warm_s", 1.0),
        )
        for ending in (OWN, "")
    ],
}


def prepare(size: str, work: Path) -> Bundle:
    """Return the exported pipeline; it is made if it is not there, and at full size also by optimum."""
    source, root = work / f"{size}-source", work / size
    if not (root / MANIFEST).is_file():
        shutil.rmtree(source, ignore_errors=True)
        make_tiny_pipeline.write("sd", source)
        if size == "sd15":
            enlarge(source)
    if source.is_dir():  # left behind where an export was cut off
        for form in ("openvino", "onnx"):
            words = ["export", form, "--dtype", "fp32", "-m", source, root, "--steps", STEPS]
            command = [sys.executable, "-m", "edgedistill", *words, "--layout", "single-root"]
            subprocess.run([*map(str, command)], check=True, stdout=sys.stderr)
        for form in FORMS.values() if size == "sd15" else ():
            by_optimum(form, source, own(work, form))
        shutil.rmtree(source)
    return Bundle.open(root, whole=False)


def own(work: Path, form: str) -> Path:
    """Return the folder of optimum's export of a format."""
    return work / f"sd15-optimum-{form}"


def by_optimum(form: str, source: Path, folder: Path) -> None:
    """Export by optimum's own command, unless that is done."""
    if folder.is_dir():
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [Path(sys.executable).with_name("optimum-cli"), "export", form, "-m", source]
    command += ["--task", "text-to-image", partial]
    command += ["--weight-format", "fp32"] if form == "openvino" else []
    subprocess.run([*map(str, command)], check=True, stdout=sys.stderr)
    partial.rename(folder)


def enlarge(folder: Path) -> None:
    """Put the networks of the real architecture, drawn as PyTorch draws them, in the place of the tiny ones."""
    torch.manual_seed(0)
    for name in ("unet", "text_encoder", "vae"):
        held = read_json(folder / name / "config.json")
        tokens = {key: held[key] for key in held if key.endswith("_token_id")}
        config = {**read_json(ARCHITECTURE / name / "config.json"), **tokens}
        shutil.rmtree(folder / name)
        store.save(store.build(config), folder / name)


def run_once(
    engine: str, root: Path, noise: Path, options: argparse.Namespace
) -> tuple[dict[str, float], np.ndarray]:
    """Run one engine in a fresh process; return its figures and its first image."""
    image = options.work / f"{engine}.npy"
    if form := FOLDERS[engine]:
        root = own(options.work, form)
    words = [sys.executable, RUN, engine.removesuffix(OWN), root, noise, image, "--steps", STEPS]
    words += ["--runs", options.runs, "--precision", options.precision]
    words += ["--size", SIZES[options.size]]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.monotonic()
    done = subprocess.run(
        [*map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{engine}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    figures = {
        "first_s": found["first_at"] - start,
        "load_s": found["load_s"],
        "warm_s": statistics.median(found["warm_s"]),
        "warm_cpu_s": statistics.median(found["warm_cpu_s"]),
        "first_peak_mb": found["first_peak_mb"],
        "peak_mb": found["peak_mb"],
    }
    return figures, np.load(image)


def measure(bundle: Bundle, options: argparse.Namespace) -> tuple[Figures, dict[str, float]]:
    """Return the medians by engine, and how far each image is from our first."""
    noise = options.work / "noise.npy"
    np.save(noise, noise_bank(bundle.table, [0])[0])
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    images: dict[str, np.ndarray] = {}
    for index in range(options.rounds):
        # Who comes first is 1 % slower at full size, so every other round goes the other way.
        for engine, rounds in list(taken.items())[:: -1 if index % 2 else 1]:
            figures, images[engine] = run_once(engine, bundle.root, noise, options)
            rounds.append(figures)
            print(engine, {k: round(v, 3) for k, v in figures.items()}, file=sys.stderr)
    medians = {
        name: {
            key: statistics.median(
                item[key] for item in (rounds if key in WARM else rounds[1:] or rounds)
            )
            for key in UNITS
        }
        for name, rounds in taken.items()
    }
    reference = next(iter(images.values())).clip(0, 1)
    apart = {
        name: float(np.abs(image.clip(0, 1) - reference).max()) for name, image in images.items()
    }
    return medians, apart


def judged(size: str, found: Figures) -> Iterator[dict[str, Any]]:
    """Yield every bar whose engines were run: the ratio, the limit, whether it holds."""
    for ours, key, theirs, limit in BARS[size]:
        rivals = [found[name][key] for name in theirs if name in found]
        if ours in found and rivals:
            ratio = found[ours][key] / min(rivals)
            beside = " or ".join(name for name in theirs if name in found)
            yield {
                "what": f"{ours}: {UNITS[key]}, to {beside}",
                "ratio": ratio,
                "limit": limit,
                "ok": ratio <= limit,
            }


def rows_of(record: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of cells per engine."""
    return [
        [
            name,
            *(f"{item[key]:.3g}" if key.endswith("_s") else f"{item[key]:.0f}" for key in UNITS),
            f"{255 * record['apart'][name]:.2f}",
        ]
        for name, item in record["engines"].items()
    ]


def headers() -> list[str]:
    """Return the names of the columns."""
    return ["engine", *UNITS.values(), "largest difference, /255"]


def told(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence per bar."""
    for bar in record["bars"]:
        verdict = "holds" if bar["ok"] else "MISSED"
        yield f"{bar['what']}: {bar['ratio']:.3f} (at most {bar['limit']:g}): {verdict}"


def markdown(record: Mapping[str, Any]) -> str:
    """Return the figures for a document."""
    named = listed(PACKAGES, record["versions"])
    bars = "\n".join(f"- {line}" for line in told(record))
    low, high = record["load"]
    head = f"OpenVINO in {record['precision']}; processes per engine: {record['rounds']}, further images in each: {record['runs']}; {record['date']}, {record['machine']}, load average {low} to {high}; {named}."
    return f"{paragraphs(head)}\n\n{table(headers(), rows_of(record))}\n\n{bars}\n"


def main() -> int:
    """Export, measure, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--work", type=Path, default=Path("build/bench-pipelines"))
    parser.add_argument("--rounds", type=int, help="processes per engine (default: tiny 4, sd15 2)")
    parser.add_argument(
        "--runs", type=int, help="images behind the first (default: tiny 9, sd15 2)"
    )
    parser.add_argument("--precision", default="f32", help="of OpenVINO: f32, bf16, auto")
    parser.add_argument("--only", nargs="+", choices=FOLDERS, metavar="ENGINE")
    parser.add_argument("--docs", type=Path, help="put the table between this file's markers too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tiny = options.size == "tiny"
    options.rounds = options.rounds or (4 if tiny else 2)
    options.runs = options.runs or (9 if tiny else 2)
    options.only = options.only or ENGINES[options.size]
    options.work.mkdir(parents=True, exist_ok=True)
    bundle = prepare(options.size, options.work)
    before = os.getloadavg()[0]
    found, apart = measure(bundle, options)
    bars = list(judged(options.size, found))
    record = {
        **{name: getattr(options, name) for name in ("size", "precision", "rounds", "runs")},
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": machine(),
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "versions": versions(),
        "engines": found,
        "apart": apart,
        "bars": bars,
    }
    if options.docs:
        put(markdown(record), options.docs, f"bench_pipelines.py --size {options.size}")
    print(
        json.dumps(record, indent=1)
        if options.json
        else "\n".join([aligned(headers(), rows_of(record)), "", *told(record)])
    )
    # What others make of their own exports is theirs; the table tells it.
    near = {name: far for name, far in apart.items() if not name.endswith(OWN)}
    strayed = [name for name, far in near.items() if options.precision == "f32" and far > GREY]
    for name in strayed:
        print(f"{name}: its image is {255 * apart[name]:.2f}/255 from ours", file=sys.stderr)
    return int(bool(strayed) or not all(bar["ok"] for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
