"""`edgedistill sample` and `edgedistill parity`: read the command line, call, print."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.arguments import add_command
from edgedistill.errors import ConfigError
from edgedistill.tables import DEFAULT

from .arguments import (
    PARITY_EPILOG,
    SAMPLE_EPILOG,
    SHEET_WIDTH,
    add_parity,
    add_sample,
    check_outputs,
    runtime_options,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from edgedistill.bundle import Bundle
    from edgedistill.pipeline import Pipeline
    from edgedistill.tiling import Tiling

_EXTRAS = {"onnxruntime": "onnx", "torch": "train"}
"""The extra that brings a runtime, where it has another name."""


def register_sample(commands: Any) -> None:
    """Add `edgedistill sample`."""
    parser = add_command(
        commands,
        "sample",
        "sample from a bundle on any runtime",
        "Sample from a bundle and write one sheet of all samples as PNG.",
        SAMPLE_EPILOG,
    )
    add_sample(parser)
    parser.set_defaults(run=_sample)


def register_parity(commands: Any) -> None:
    """Add `edgedistill parity`."""
    parser = add_command(
        commands,
        "parity",
        "prove that every artifact still is the PyTorch model",
        "Compare every artifact of a bundle with PyTorch on the same noise, row by row and as a whole.",
        PARITY_EPILOG,
    )
    add_parity(parser)
    parser.set_defaults(run=_parity)


def _sample(options: argparse.Namespace) -> int:
    _check_target(options.output, ".png")
    if options.npy is not None:
        _check_target(options.npy, ".npy")
    # The heavy half of the work begins here; `--help` and a wrong command line end before it.
    from edgedistill.bundle import Bundle
    from edgedistill.images import save_png
    from edgedistill.pipeline import load

    start = time.perf_counter()
    bundle = Bundle.open(options.bundle, whole=False)
    _warn("sample", _runtime_of_sample(bundle, options))
    pipeline = load(
        bundle,
        options.runtime,
        options.artifact,
        low_memory=options.low_memory,
        vae_tiling=_tiling(options),
        **runtime_options(options),
    )
    count = options.num_samples or len(options.labels or options.prompt or []) or 16
    samples = pipeline(
        count,
        seed=options.seed,
        guidance_scale=options.guidance_scale,
        sampler=options.sampler,
        strength=options.strength,
        negative_prompt=options.negative_prompt,
        **_turns(pipeline, "class", options.labels, count),
        **_turns(pipeline, "text", options.prompt, count),
        **_pictures(options),
    )
    seconds = time.perf_counter() - start
    sheet = samples.grid(options.columns, options.scale or _scale(samples.array, options.columns))
    if options.npy is not None:
        _save_npy(samples.array, options.npy)
    save_png(sheet, options.output)
    _tell_sample(options, pipeline, count, seconds)
    return 0


def _runtime_of_sample(bundle: "Bundle", options: argparse.Namespace) -> list[str]:
    """Return the name of the runtime that a sample is about to be drawn on, if there is one."""
    if options.runtime is not None:
        return [options.runtime]
    from edgedistill.pipeline import preferred

    if options.artifact is not None:
        return [item.runtime for name, item in bundle.artifacts.items() if name == options.artifact]
    return [item.runtime for item in preferred(bundle)[:1]]


def _runtimes_of_parity(bundles: "Sequence[Bundle]", options: argparse.Namespace) -> set[str]:
    """Return the names of the runtimes that artifacts are about to be compared on."""
    held = [item for bundle in bundles for item in bundle.artifacts.values()]
    named = [item for item in held if not options.artifact or item.name in options.artifact]
    return set(options.runtime) or {item.runtime for item in named}


def _warn(command: str, runtimes: Iterable[str]) -> None:
    """Say before weights are read which installed packages that runtimes use do not work together."""
    from edgedistill.known_bad import warn_known_bad
    from edgedistill.plugins import ALIASES

    names = [ALIASES.get(name, name) for name in runtimes]
    warn_known_bad({_EXTRAS.get(name, name) for name in names}, command)


def _tell_sample(
    options: argparse.Namespace, pipeline: "Pipeline", count: int, seconds: float
) -> None:
    sampler = options.sampler or pipeline.artifact.sampler or DEFAULT
    made = {
        "output": str(options.output),
        "npy": None if options.npy is None else str(options.npy),
        "samples": count,
        "seed": options.seed,
        "artifact": pipeline.artifact.name,
        "runtime": pipeline.artifact.runtime,
        "described": pipeline.runtime.describe(runtime_options(options)),
        "sampler": sampler,
        "nfe": pipeline.bundle.samplers[sampler].nfe,
        "seconds": round(seconds, 4),
    }
    if options.json:
        print(json.dumps(made, indent=1))
        return
    plural = "" if count == 1 else "s"
    print(
        f"{options.output}: {count} sample{plural} of {pipeline.bundle.name} "
        f"({pipeline.artifact.name}, {made['nfe']} evaluations each) on {made['described']} "
        f"in {seconds:.2f} s"
    )


def _parity(options: argparse.Namespace) -> int:
    if options.report is not None:
        _check_target(options.report, ".html")
    check_outputs(options)
    from edgedistill.bundle import Bundle

    bundles = [Bundle.open(path) for path in options.bundles]
    if options.outputs is not None:
        from .outputs import verify_outputs

        report = verify_outputs(
            bundles[0],
            options.outputs,
            precision=options.precision,
            artifact=next(iter(options.artifact), None),
            sampler=options.sampler,
        )
    else:
        from .verify import verify

        _warn("parity", _runtimes_of_parity(bundles, options))
        report = verify(
            bundles,
            runtimes=options.runtime,
            artifacts=options.artifact,
            options=runtime_options(options),
            progress=_bar,
        )
    if options.report is not None:
        from edgedistill.files import write_bytes

        from .report import render

        write_bytes(options.report, render(report).encode())
    print(json.dumps(report.to_json(), indent=1) if options.json else _parity_text(report))
    for sentence in report.failures:
        print(f"edgedistill: {sentence}", file=sys.stderr)
    return 0 if report.ok else 1


def _parity_text(report: Any) -> str:
    from edgedistill.terminal import aligned

    from .summary import HEADERS, LEGEND, cells, notes

    lines = [f"{report.name}, {report.batch} samples from the same noise", ""]
    lines += [aligned(HEADERS, [cells(item) for item in report.artifacts]), ""]
    lines += notes(report)
    width = report.value_range[1] - report.value_range[0]
    return "\n".join([*lines, *LEGEND.format(peak=width, batch=report.batch).split(". ")])


def _bar(items: Sequence[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    with tqdm(items, unit="artifact", disable=None) as bar:
        for item in bar:
            bar.set_description(item[1].name)
            yield item


def _tiling(options: argparse.Namespace) -> "Tiling | None":
    from edgedistill.tiling import Tiling

    size, overlap = options.vae_tiling, options.vae_tile_overlap
    if size is None:
        if overlap is not None:
            msg = "--vae-tile-overlap: only with --vae-tiling."
            raise ConfigError(msg)
        return None
    return Tiling(overlap=overlap) if size is True else Tiling(size, overlap)


def _turns(
    pipeline: "Pipeline", kind: str, values: Sequence[Any] | None, count: int
) -> dict[str, Any]:
    """Return a condition; values that are fewer than the samples take turns."""
    if values is None:
        return {}
    option, plural = {"class": ("--class", "classes"), "text": ("--prompt", "prompts")}[kind]
    if len(values) > count:
        msg = (
            f"{option} names {len(values)} {plural} for {count} samples; raise -n or leave it out."
        )
        raise ConfigError(msg)
    condition = pipeline.table.condition(kind)
    name = (
        {"class": "class_labels", "text": "prompt"}[kind] if condition is None else condition.name
    )
    return {name: [values[i % len(values)] for i in range(count)]}


def _pictures(options: argparse.Namespace) -> dict[str, Any]:
    given = {"image": options.image, "mask": options.mask}
    return {name: _open_picture(path) for name, path in given.items() if path is not None}


def _open_picture(path: Path) -> "Image":
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError) as error:
        msg = f"{path}: not an image that can be read ({type(error).__name__}: {error})."
        raise ConfigError(msg) from error


def _scale(array: Any, columns: int | None) -> int:
    """Return the factor that makes the sheet about `SHEET_WIDTH` pixels wide or wider."""
    columns = columns or -(-(len(array) ** 0.5) // 1)
    return max(1, int(-(-SHEET_WIDTH // (columns * array.shape[3]))))


def _save_npy(array: Any, path: Path) -> None:
    import io

    import numpy as np

    from edgedistill.files import write_bytes

    stream = io.BytesIO()
    np.save(stream, array)
    write_bytes(path, stream.getvalue())


def _check_target(path: Path, suffix: str) -> None:
    """Refuse a file that cannot be written before any work is done.

    Raises:
        ConfigError: If the name has another suffix, or its folder is missing or cannot be written.
    """
    folder = path.absolute().parent
    problem = None
    if path.suffix.lower() != suffix:
        problem = f"the name must end in {suffix}, got {path.suffix or 'no suffix'}"
    elif path.is_dir():
        problem = "it is a folder; name a file"
    elif not folder.is_dir():
        problem = f"no folder {folder}; make it first"
    elif not os.access(folder, os.W_OK):
        problem = f"{folder} cannot be written; choose another place"
    if problem is not None:
        msg = f"{path}: {problem}."
        raise ConfigError(msg)
