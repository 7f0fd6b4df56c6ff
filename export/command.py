"""`edgedistill export`: read the command line, call, print."""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.arguments import add_command, add_json, add_target, positive, target_of
from edgedistill.errors import ConfigError
from edgedistill.known_bad import warn_known_bad

from . import budget
from .formats import ALL, FORMATS, SCHEDULERS, ExportOptions, jobs
from .layouts import LAYOUTS, SINGLE_ROOT
from .stages import told_to
from .summary import as_json, as_text
from .worker import AUTO, ISOLATE

if TYPE_CHECKING:
    from edgedistill.student import Student

_DTYPES = {"fp32": "float32", "fp16": "float16", "float32": "float32", "float16": "float16"}
_OTHERS_MODEL = ("--model-version", "--model_name_or_path")  # Apple's converter's, Olive's
_DESCRIPTION = """\
Write a student, or a folder of diffusers', as a bundle: ONNX, OpenVINO or Core ML beside the PyTorch
reference, with the sampler table, golden tensors and calibration inputs. Each file is run once beside
PyTorch before it is in the bundle. A bundle that already holds this student gets what it lacks and keeps
what it has. A pipeline becomes a single root, which diffusers, optimum and OpenVINO GenAI open too."""
_EPILOG = """\
examples:
  edgedistill export onnx -m student bundle
  edgedistill export openvino -m student bundle --dtype fp16
  edgedistill export coreml -m student bundle --min-deployment-target iOS18
  edgedistill export onnx -m student baked --guidance-scale 2
  edgedistill export coreml -m student bundle --single-graph
  edgedistill export all -m stable-diffusion-v1-5 OUT --num-inference-steps 4 --guidance-scale 7.5
  edgedistill export coreml -m stable-diffusion-v1-5 OUT --num-inference-steps 2 --scheduler swift
  edgedistill export all -m student -o bundle
  edgedistill export onnx -m pipeline folder --lora style.safetensors:0.7 --vae small-vae
  edgedistill export openvino -m pipeline folder --networks vae_decoder

Exit status: 0 fine, 1 a written file strays from PyTorch, 2 bad input.
"""


def register(commands: Any) -> None:
    """Add `edgedistill export`."""
    short = "write a student as ONNX, OpenVINO, Core ML"
    parser = add_command(commands, "export", short, _DESCRIPTION, _EPILOG)
    formats = parser.add_subparsers(title="formats", metavar="FORMAT", required=True)
    for name, short in (
        ("onnx", "ONNX, for ONNX Runtime"),
        ("openvino", "OpenVINO IR, for Intel CPUs and GPUs"),
        ("coreml", "ML Program packages, for iPhone and Mac"),
        (ALL, "all of them"),
    ):
        one = add_command(formats, name, short, _DESCRIPTION, _EPILOG)
        _add_shared(one)
        _add_batch(one, may_be_free=name in ("onnx", "openvino"))
        if name != ALL:
            _add_precision(one, FORMATS[name].precisions)
        if name in ("onnx", ALL):
            _add_onnx(one)
        if name in ("coreml", ALL):
            one.add_argument(
                "--min-deployment-target",
                metavar="OS",
                default=ExportOptions.deployment_target,
                help="earliest system for Core ML (default: %(default)s)",
            )
        needs = {ALL: [*FORMATS], "openvino": ["onnx", "openvino"]}.get(name, [name])
        one.set_defaults(run=_run, format=name, extra=",".join([*needs, "train"]))


def _add_shared(parser: argparse.ArgumentParser) -> None:
    shown = ["-m", "--model", "--model-name-or-path"]
    model = parser.add_argument(
        *shown,
        *_OTHERS_MODEL,
        metavar="MODEL",
        type=Path,
        required=True,
        help="folder that `distill` made, or that diffusers wrote",
    )
    model.option_strings = shown
    _add_foreign(parser)
    parser.add_argument(
        "--guidance-scale",
        metavar="G",
        type=_scale,
        help="of a student: bake guidance at this scale into the weights (default: an input stays an input); "
        "of a pipeline: its scale (default: that of a latent-consistency model, else none)",
    )
    pipeline = parser.add_argument_group("a folder of diffusers'")
    pipeline.add_argument(
        "--num-inference-steps",
        "--steps",
        metavar="N",
        type=positive,
        help="number of sampler steps (default: 4)",
    )
    pipeline.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        help="own: the folder's; portable: DDIM in 1, 2, 4 or 8 steps, which all loaders sample alike; swift: what "
        "an unmodified Swift package takes, in 1 to 3 (default: own where loaders agree on it, else portable)",
    )
    pipeline.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        action="append",
        default=[],
        help="merge a LoRA as diffusers, peft or kohya write it; may be given several times (default scale: 1)",
    )
    pipeline.add_argument(
        "--vae",
        metavar="DIR",
        type=Path,
        help="another autoencoder: an AutoencoderTiny, such as TAESD, decodes in a fraction of the time",
    )
    pipeline.add_argument(
        "--controlnet",
        metavar="DIR",
        type=Path,
        help="a ControlNet, called before the network that draws; its picture becomes the condition `image`",
    )
    pipeline.add_argument(
        "--controlnet-conditioning-scale",
        metavar="S",
        type=float,
        help="how strongly the ControlNet acts, written into its weights (default: 1)",
    )
    pipeline.add_argument(
        "--variant",
        metavar="NAME",
        help="weights to take where a network has several, such as fp16 (default: the plain ones, else the only ones)",
    )
    for side in ("height", "width"):
        pipeline.add_argument(
            f"--{side}",
            metavar=side[0].upper(),
            type=positive,
            help=f"image {side} (default: the pipeline's)",
        )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="single-root: files where loaders of pipelines look; bundle: by format (default: a single root "
        "where loaders know the networks)",
    )
    parser.add_argument(
        "--networks",
        metavar="NAME",
        nargs="+",
        default=[],
        help="networks to write, such as unet or vae_decoder; others may join later (default: all)",
    )
    graph = parser.add_argument_group("one graph")
    graph.add_argument(
        "--single-graph",
        action="store_true",
        help="unroll the sampler: noise and conditions in, image out, weights stored once",
    )
    graph.add_argument(
        "--sampler", metavar="NAME", help="sampler to unroll (default: the student's first)"
    )
    graph.add_argument(
        "--text-embeddings",
        action="store_true",
        help="keep the text encoder outside: the graph takes embeddings, not tokens",
    )
    parser.add_argument(
        "--isolate",
        choices=ISOLATE,
        default=AUTO,
        help="write each network in a process of its own (default: those above 400 MB)",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        type=_memory,
        help="such as 8GB: write in processes of their own what would take more together, and refuse what is estimated "
        "to take more even so, the reference included",
    )
    add_target(parser, "BUNDLE")
    add_json(parser)
    parser.set_defaults(dtype=None, dynamic=False, opset=None, dynamo=False)
    parser.set_defaults(min_deployment_target=ExportOptions.deployment_target)


def _add_foreign(parser: argparse.ArgumentParser) -> None:
    """Take what optimum and Apple's converter call things, without a word in the help."""
    parser.add_argument("--task", choices=("auto", "text-to-image"), help=argparse.SUPPRESS)
    for side in ("--latent-h", "--latent-w"):
        parser.add_argument(side, type=positive, help=argparse.SUPPRESS)
    parser.add_argument("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)


def _add_batch(parser: argparse.ArgumentParser, *, may_be_free: bool) -> None:
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=1,
        help="batch size of the graphs (default: 1)",
    )
    if may_be_free:
        batch.add_argument(
            "--dynamic",
            action="store_true",
            help="leave the batch size free; in a single root, where it is: height and width",
        )


def _add_precision(parser: argparse.ArgumentParser, precisions: tuple[str, ...]) -> None:
    short = ", ".join(f"fp{name.removeprefix('float')}" for name in precisions)
    parser.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        metavar="D",
        help=f"{short} (default: all of these; in a single root only the first)",
    )


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--opset", metavar="N", type=int, help="ONNX opset (default: 17; 20 with --dynamo)"
    )
    parser.add_argument(
        "--dynamo", action="store_true", help="newer ONNX exporter: half the nodes, 20x the time"
    )


def _run(options: argparse.Namespace) -> int:
    target = target_of(options, "BUNDLE")
    settings = ExportOptions(
        dtype=_DTYPES.get(options.dtype),
        batch=None if options.dynamic else options.batch_size,
        opset=options.opset,
        dynamo=options.dynamo,
        deployment_target=options.min_deployment_target,
        overwrite=options.overwrite,
        single_graph=_sampler_of(options),
        text_inside=not options.text_embeddings,
        free_sizes=options.dynamic,
        isolate=options.isolate,
        networks=tuple(options.networks),
        max_memory=options.max_memory,
    )
    jobs([options.format], settings)  # refuses what cannot be written
    warn_known_bad(options.extra.split(","), "export")
    # The heavy half of the work begins here; `--help` and a wrong command line end before it.
    from tqdm import tqdm

    with (
        tqdm(unit="artifact", leave=False, disable=None) as bar,
        told_to(bar.set_postfix_str),
        tempfile.TemporaryDirectory() as place,
    ):
        student, merge = _source(options, Path(place))
        from .assemble import check_export, export_student
        from .loader_files import notes
        from .samplers import with_samplers
        from .single_root import layout_for

        settings = replace(settings, layout=layout_for(student, target, options.layout))
        forms = {job.format for job in jobs([options.format], settings)}
        if settings.layout == SINGLE_ROOT or options.scheduler is not None:
            held = None if options.overwrite else target
            student = with_samplers(student, forms, options.scheduler, held)
        check_export(student, target, [options.format], settings)
        merge()

        def tell(what: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(what)

        bundle = export_student(student, target, [options.format], settings, tell, _foretell)
    if settings.layout == SINGLE_ROOT:
        for note in notes(target, {item.format for item in bundle.artifacts.values()}):
            print(note, file=sys.stderr)
    print(as_json(bundle) if options.json else as_text(bundle, changed=bar.total is not None))
    return 0


def _source(options: argparse.Namespace, place: Path) -> "tuple[Student, Callable[[], object]]":
    """Open what is exported, and return what finishes its weights, once nothing else speaks against the export.

    A student whose guidance is baked, and a pipeline that others change, is put together in `place`.
    """
    from edgedistill.student import MANIFEST, Student

    if options.trust_remote_code:
        msg = "`--trust-remote-code`: no code is run that comes with a model; leave it out, and export a pipeline whose classes are those of diffusers and transformers."
        raise ConfigError(msg)
    steps, scale = options.num_inference_steps, options.guidance_scale
    sizes = options.height, options.width
    latents = options.latent_h, options.latent_w
    others = {
        "loras": options.lora or None,
        "vae": options.vae,
        "controlnet": options.controlnet,
        "conditioning_scale": options.controlnet_conditioning_scale,
        "variant": options.variant,
    }
    changed = {name: value for name, value in others.items() if value is not None}
    if (options.model / MANIFEST).is_file():
        told = steps, *sizes, *latents, options.scheduler
        if any(item is not None for item in told) or changed:
            msg = f"{options.model}: a student has the steps, the size and the networks that it was trained for; leave them out."
            raise ConfigError(msg)
        student = Student.open(options.model)
        if scale is None:
            return student, _nothing
        from .bake import link_baked

        baking = link_baked(student, scale, place)
        return baking.student, baking.merge
    from edgedistill.models.source import open_source
    from edgedistill.models.variant import Lora, link_variant

    from .single_root import resized

    asked = {"num_steps": steps, "guidance_scale": scale}
    merge: Callable[[], object] = _nothing
    if changed:
        loras = [Lora.parse(text) for text in options.lora]
        linked = link_variant(options.model, place, **{**changed, "loras": loras}, **asked)
        student, merge = linked.student, linked.merge
    else:
        student = open_source(options.model, **asked)
    if any((*sizes, *latents)):
        student = resized(student, *sizes, latents=latents)
    return student, merge


def _nothing() -> None:
    """Leave weights as they are."""


def _sampler_of(options: argparse.Namespace) -> str | None:
    """Return the name of the sampler that becomes one graph, or None."""
    if options.single_graph:
        from edgedistill.tables import DEFAULT

        return options.sampler or DEFAULT
    if options.sampler or options.text_embeddings:
        msg = "--sampler and --text-embeddings are for --single-graph; without it every sampler is exported."
        raise ConfigError(msg)
    return None


def _memory(text: str) -> int:
    try:
        return budget.size_of(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _foretell(lines: list[str]) -> None:
    """Say what large networks will take, and what is replaced."""
    for line in lines:
        print(line, file=sys.stderr)


def _scale(text: str) -> float:
    """Read a guidance scale."""
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        msg = f"must be a number of at least 0, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return float(text)
