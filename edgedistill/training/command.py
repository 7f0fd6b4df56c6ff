"""The commands `edgedistill distill` and `edgedistill join`."""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from edgedistill.arguments import add_command, add_json, positive

EPILOG = """\
examples:
  edgedistill distill examples/digits_guided.yaml -o student --dry-run
  edgedistill distill examples/sd15_guided.yaml -o student --sketch       # 860 M parameters, on any machine
  edgedistill distill examples/digits_guided.yaml -o student
  edgedistill distill examples/digits_guided.yaml -o student --set training.batch_size=32 --set seed=1
  edgedistill distill examples/digits_guided.yaml -o student --resume     # after a kill: bitwise the same
  accelerate launch -m edgedistill distill RECIPE.yaml -o student         # on several devices, as configured there

STUDENT holds the networks as diffusers writes them, the sampler table (sampler.json), the losses,
TensorBoard events and sample grids (training/). Next: edgedistill export all -m STUDENT BUNDLE"""

JOIN_EPILOG = """\
examples:
  edgedistill distill examples/digits_msd.yaml -o part-0 --set msd.only=0     # on one machine
  edgedistill distill examples/digits_msd.yaml -o part-1 --set msd.only=1     # on another
  edgedistill join part-0 part-1 -o student

STUDENT holds what one run of all the students writes. Next: edgedistill export all -m STUDENT BUNDLE"""


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        subparsers,
        "distill",
        "train a few-step student from a recipe",
        "Train a few-step student from a teacher by the recipe's method.",
        EPILOG,
    )
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE.yaml", help="what to do; see examples/"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="STUDENT",
        required=True,
        help="student folder to make",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the recipe, such as guided.halve.iterations=300; may be repeated",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from STUDENT.partial instead of beginning anew"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a student that has other settings"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, time a few steps, print the plan",
    )
    parser.add_argument(
        "--sketch",
        action="store_true",
        help="print the plan from the teacher's configurations alone: no weights, no data, no time",
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        type=positive,
        default=1,
        help="plan for N devices, with --dry-run or --sketch (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=positive,
        help="CPU threads of torch, on which results depend (default: torch's own choice)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_json(parser)
    parser.set_defaults(run=run, extra="train")


def run(options: argparse.Namespace) -> int:
    """Carry out the command."""
    import torch

    from edgedistill.training.describe import describe, plan_text
    from edgedistill.training.recipe import Recipe
    from edgedistill.training.run import distill

    logging.basicConfig(format="edgedistill: %(message)s", level=logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = Recipe.load(options.recipe, options.overrides)
    if options.dry_run or options.sketch:
        plan = describe(recipe, is_sketch=options.sketch, processes=options.processes)
        print(json.dumps(plan, indent=1) if options.json else plan_text(plan))
        return 0
    student = distill(
        recipe,
        options.output,
        resume=options.resume,
        overwrite=options.overwrite,
        quiet=options.quiet,
    )
    result = {
        "student": str(student.root),
        "name": student.name,
        "evaluations": student.table.nfe,
        "parameters": student.provenance["parameters"],
    }
    if int(os.environ.get("RANK", "0")):
        return 0  # one of several processes speaks
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{student.root}: {student.name}, {student.table.nfe} evaluation(s) per sample")
        print(f"next: edgedistill export all -m {student.root} BUNDLE")
    return 0


def register_join(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        subparsers,
        "join",
        "put students that were trained one by one together",
        "Put the students of one router, each trained by a run of its own, into one student folder.",
        JOIN_EPILOG,
    )
    parser.add_argument(
        "parts", type=Path, metavar="PART", nargs="+", help="student folders of one recipe"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="STUDENT",
        required=True,
        help="student folder to make",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_json(parser)
    parser.set_defaults(run=run_join, extra="train")


def run_join(options: argparse.Namespace) -> int:
    """Carry out the command."""
    from edgedistill.training.join import join

    student = join(options.parts, options.output, overwrite=options.overwrite)
    names = sorted(student.signatures)
    if options.json:
        print(json.dumps({"student": str(student.root), "networks": names}, indent=1))
    else:
        print(f"{student.root}: {', '.join(names)}")
        print(f"next: edgedistill export all -m {student.root} BUNDLE")
    return 0
