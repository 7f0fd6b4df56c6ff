"""Peak memory and time of the export of Stable Diffusion 1.5 at full size, beside the usual exporters.

python examples/bench_export.py [--components unet ...] [--formats onnx ...] [--folder DIR] [--docs FILE] [--json]

The networks are of the real architecture with random weights, drawn as PyTorch draws them, so that activations
stay sane. Each export runs in a fresh process, one after another: optimum's for ONNX and OpenVINO, plain
coremltools for Core ML, then our conversion, then our export: the conversion with one call of PyTorch and of the
written file, which the others do not make. Memory is what a process and those it started hold together at most.
Exit status 1 if an export fails, or our conversion takes more than 0.8 of the memory or of the processor time.
"""

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from documents import listed, machine, paragraphs, put, table
from edgedistill.contract import Signature, TensorSpec
from edgedistill.environment import versions
from edgedistill.errors import require
from edgedistill.files import read_json
from edgedistill.terminal import aligned

if TYPE_CHECKING:  # processes that an export starts import this file again, and work without torch
    from torch import nn

LIMIT = 0.8
INTERVAL = 0.1  # seconds between two looks at memory
# Component: its folder, and its kind and task in optimum.
COMPONENTS = {
    "unet": ("unet", "unet-2d-condition", "semantic-segmentation"),
    "text_encoder": ("text_encoder", "clip-text", "feature-extraction"),
    "vae_decoder": ("vae", "vae-decoder", "semantic-segmentation"),
}
FORMATS = {"onnx": "optimum", "openvino": "optimum", "coreml": "coremltools"}
SUFFIXES = {"onnx": "onnx", "openvino": "xml", "coreml": "mlpackage"}
UNITS = {"peak_gb": "peak GB", "cpu_s": "CPU s", "wall_s": "wall s"}
HEADERS = ["component", "format", "by", *UNITS.values(), "dB"]
PACKAGES = ("torch", "onnx", "openvino", "coremltools", "optimum", "optimum-onnx", "optimum-intel")
TOKENS = 77
DECODER = Signature(
    (TensorSpec("latent_sample", (1, 4, 64, 64), "float32", "latent"),),
    (TensorSpec("sample", (1, 3, 512, 512), "float32", "image"),),
)


def build(folder: Path, component: str) -> None:
    """Write a component with random weights, unless it is there."""
    import torch

    from edgedistill.models import store
    from edgedistill.teacher import ARCHITECTURES

    name = COMPONENTS[component][0]
    if not (folder / name).is_dir():
        torch.manual_seed(0)
        config = read_json(ARCHITECTURES / "stable-diffusion-v1-5" / name / "config.json")
        store.save(store.build(config), folder / name)


def opened(folder: Path, component: str) -> tuple["nn.Module", Signature]:
    """Return a component and what it takes and gives, of batch 1."""
    from edgedistill.models import store

    network = store.load(folder / COMPONENTS[component][0])
    if component == "vae_decoder":
        return store.facing(network, DECODER), DECODER
    return network, store.signature(network).with_batch(1).bind(length=TOKENS)


def by_edgedistill(folder: Path, component: str, form: str, target: Path) -> None:
    """Export as `edgedistill export` does."""
    from export import to_coreml, to_onnx, to_openvino

    writers: dict[str, Any] = {
        "onnx": to_onnx.write_onnx,
        "openvino": to_openvino.write_openvino,
        "coreml": to_coreml.write_coreml,
    }
    made = writers[form](*opened(folder, component), target, consume=True)
    print(made["snr_db"])


def by_conversion(folder: Path, component: str, form: str, target: Path) -> None:
    """Convert as `edgedistill export` does, and check nothing."""
    from edgedistill.mlpackage import quiet_coremltools
    from export import to_coreml, to_onnx, to_openvino
    from export.frozen import Frozen

    frozen = Frozen(*opened(folder, component))
    if form == "onnx":
        to_onnx.trace_onnx(frozen, target)
    elif form == "openvino":
        to_openvino.convert_openvino(frozen, target, consume=True)
    else:
        with quiet_coremltools() as coremltools:
            to_coreml.convert_coreml(coremltools, frozen, "float16", "iOS17", consume=True).save(
                str(target)
            )


def by_optimum(folder: Path, component: str, form: str, target: Path) -> None:
    """Export by the functions that optimum's `main_export` calls for each component."""
    import optimum.exporters.onnx
    import optimum.exporters.openvino
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from optimum.exporters.tasks import TasksManager
    from transformers import CLIPTextModel

    name, kind, task = COMPONENTS[component]
    stock = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
    network: Any = stock[name].from_pretrained(folder / name)
    if component == "vae_decoder":
        network.forward = lambda latent_sample: network.decode(z=latent_sample)
    if component == "unet":
        network.config.requires_aesthetics_score = False
        network.config.text_encoder_projection_dim = 768
    config_of = TasksManager.get_exporter_config_constructor(
        model=network, exporter=form, library_name="diffusers", task=task, model_type=kind
    )
    config = config_of(network.config, int_dtype="int64", float_dtype="fp32")
    if form == "onnx":
        optimum.exporters.onnx.export(network, config, target)
    else:
        settings = {"library_name": "diffusers", "stateful": False}
        optimum.exporters.openvino.convert.export(network, config, target, **settings)


def by_coremltools(folder: Path, component: str, _form: str, target: Path) -> None:
    """Export as the documentation of coremltools shows it."""
    import coremltools
    import torch

    from export.frozen import Frozen, examples

    frozen = Frozen(*opened(folder, component))
    traced = torch.jit.trace(frozen, examples(frozen.signature), check_trace=False)
    inputs = [coremltools.TensorType(shape=spec.shape) for spec in frozen.signature.inputs]
    target_os = coremltools.target.iOS17
    coremltools.convert(
        traced, inputs=inputs, minimum_deployment_target=target_os, skip_model_load=True
    ).save(str(target))


TOOLS = {
    "conversion": by_conversion,
    "edgedistill": by_edgedistill,
    "optimum": by_optimum,
    "coremltools": by_coremltools,
}


def held(process: int) -> int:
    """Return the bytes of memory that a process and all below it hold now."""
    psutil = require("psutil", "train")
    total = 0
    try:
        top = psutil.Process(process)
        for each in [top, *top.children(recursive=True)]:
            total += each.memory_info().rss
    except psutil.Error:  # one of them has ended
        return 0
    return total


def measure(tool: str, folder: Path, component: str, form: str) -> dict[str, float]:
    """Export once in a fresh process; return peak memory in GB, processor and wall time in seconds, dB where it is checked.

    What an export that fails says goes to stderr, and nothing is returned.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place, tempfile.TemporaryFile() as said:
        target = Path(place) / f"model.{SUFFIXES[form]}"
        words = [sys.executable, __file__, "--one", tool, component, form, folder, target]
        start = time.perf_counter()
        child = subprocess.Popen([*map(str, words)], stdout=said, stderr=said)
        memory = 0
        while not (found := os.wait4(child.pid, os.WNOHANG))[0]:
            memory = max(memory, held(child.pid))
            time.sleep(INTERVAL)
        _, status, used = found
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        said.seek(0)
        if child.returncode:
            sys.stderr.write(said.read().decode())
            return {}
        checked = float(said.read().split()[-1]) if tool == "edgedistill" else None
    figures = {"peak_gb": memory / 1e9, "cpu_s": used.ru_utime + used.ru_stime, "wall_s": wall}
    return figures if checked is None else {**figures, "snr_db": checked}


def compare(folder: Path, component: str, form: str) -> dict[str, Any]:
    """Measure the usual exporter, our conversion, and our export, which checks it too."""
    build(folder, component)
    usual = measure(FORMATS[form], folder, component, form)
    conversion = measure("conversion", folder, component, form)
    ratios = {name: conversion[name] / usual[name] for name in usual if name in conversion}
    return {
        "component": component,
        "format": form,
        "usual": {"tool": FORMATS[form], **usual},
        "conversion": conversion,
        "edgedistill": measure("edgedistill", folder, component, form),
        "ratio": ratios,
    }


def rows_of(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the cells of one row per export, and of one with the ratio."""
    for item in found:
        for who, figures in (
            (item["usual"]["tool"], item["usual"]),
            ("our conversion", item["conversion"]),
            ("our export, checked", item["edgedistill"]),
            ("conversion / usual", item["ratio"]),
        ):
            shown = (f"{figures[name]:.2f}" if name in figures else "failed" for name in UNITS)
            checked = f"{figures['snr_db']:.1f}" if "snr_db" in figures else ""
            yield [item["component"], item["format"], who, *shown, checked]


def markdown(record: Mapping[str, Any]) -> str:
    """Return the figures for a document."""
    named = listed(PACKAGES, record["versions"])
    low, high = record["load"]
    head = f"{record['date']}, {record['machine']}, load average {low} to {high}; {named}."
    return f"{paragraphs(head)}\n\n{table(HEADERS, rows_of(record['exports']), 3)}\n"


def main() -> int:
    """Measure each component in each format and say whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--components", nargs="+", choices=COMPONENTS, default=[*COMPONENTS])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--folder", type=Path, help="of the networks (default: a temporary one)")
    parser.add_argument("--docs", type=Path, help="put the table between this file's markers too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tool, component, form, folder, target = options.one
        TOOLS[tool](Path(folder), component, form, Path(target))
        return 0
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        found = [
            compare(folder, component, form)
            for component in options.components
            for form in options.formats
        ]
    record = {
        "limit": LIMIT,
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": machine(),
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "versions": versions(),
        "exports": found,
    }
    if options.docs:
        put(markdown(record), options.docs, "bench_export.py")
    print(json.dumps(record, indent=1) if options.json else aligned(HEADERS, [*rows_of(found)]))
    held = all(
        item["edgedistill"] and item["ratio"].get(name, LIMIT + 1) <= LIMIT
        for item in found
        for name in ("peak_gb", "cpu_s")
    )
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
