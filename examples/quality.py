"""The quality table: students of every method over several seeds, beside their bars.

python examples/quality.py -o quality [--only sfd ctm] [--seeds 0 1 2] [--jobs 2] [--held] [--json]

Each training is a process of its own with one thread, as many at a time as there are jobs. What it measured is kept
as quality/NAME-SEED.json; the same command goes on where it was broken off, and makes anew what was made with other
settings. Writes quality/quality.md and quality/quality.json. Exit status 1 if a bar is missed.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgedistill.environment import versions
from edgedistill.evaluation.baselines import Baselines, Settings, naive_baselines
from edgedistill.evaluation.report import Evaluator
from edgedistill.evaluation.students import BARS, measure
from edgedistill.files import read_json, write_bytes, write_json
from edgedistill.student import Student
from edgedistill.tables import DEFAULT
from edgedistill.teacher import Teacher
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill


@dataclass(frozen=True)
class Run:
    """One training and the students of it that are measured.

    Fields:
        recipe: A file beside this one, without its suffix.
        changes: Settings that differ from it.
        students: (folder, sampler) of each; the folder of the last phase is ``.``.
        bars: Key of `BARS`, or None: the guards alone.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    students: tuple[tuple[str, str], ...] = ((".", DEFAULT),)
    bars: str | None = None

    def load(self, seed: int) -> Recipe:
        """Return the recipe at a seed."""
        path = Path(__file__).parent / f"{self.recipe}.yaml"
        common = (f"seed={seed}", "training.tensorboard=false", "training.preview_every=0")
        return Recipe.load(path, [*self.changes, *common])


RUNS: dict[str, Run] = {
    "guided": Run(
        "digits_guided",
        students=(("4-step", DEFAULT), ("2-step", DEFAULT), (".", DEFAULT)),
        bars="guided",
    ),
    "stochastic": Run(
        "digits_guided",
        ("name=digits-stochastic", "guided.sampler=stochastic", "guided.steps=[4]"),
    ),
    "small": Run("digits_small"),
    "guide": Run(
        "digits_guide",
        students=(("32-step", DEFAULT), ("16-step", DEFAULT), (".", DEFAULT)),
        bars="guide",
    ),
    "dmd2": Run("digits_dmd2", bars="dmd2"),
    "dmd2-4": Run("digits_dmd2", ("name=digits-dmd2-4", "dmd2.labels=[999,749,499,249]")),
    "ctm": Run(
        "digits_ctm",
        students=((".", DEFAULT), (".", "2-step"), (".", "4-step"), (".", "4-step-stochastic")),
        bars="ctm",
    ),
    "sfd": Run("digits_sfd", bars="sfd"),
    "sfd-3": Run("digits_sfd", ("name=digits-sfd-3", "sfd.stamps=[5]")),
    "sfd-4": Run("digits_sfd", ("name=digits-sfd-4", "sfd.stamps=[6]"), bars="sfd"),
    "sfd-5": Run("digits_sfd", ("name=digits-sfd-5", "sfd.stamps=[7]")),
    "sfd-v": Run(
        "digits_sfd_v",
        students=(
            ("variable", DEFAULT),
            ("variable", "3-evaluations"),
            ("variable", "4-evaluations"),
            ("variable", "5-evaluations"),
            (".", DEFAULT),
        ),
    ),
    "captioned": Run(
        "captioned_guided", students=(("4-step", DEFAULT), ("2-step", DEFAULT), (".", DEFAULT))
    ),
    "captioned-dmd2": Run("captioned_dmd2"),
    "captioned-msd": Run("captioned_msd"),
}
# (run, evaluations), the run and evaluations that it is compared with, and the largest ratio of Frechet distances.
PAIRS = (
    *(
        (("sfd-v", n), (name, n), 1.1)
        for n, name in enumerate(("sfd", "sfd-3", "sfd-4", "sfd-5"), 2)
    ),
    (("ctm", 4), ("ctm", 1), 1.0),
)
COLUMNS = (
    "student", "seed", "evaluations", "parameters", "Frechet", "/ naive", "/ teacher", "error / naive",
    "recall", "diversity", "memorised", "accuracy", "CPU s",
)  # fmt: skip
# By teacher: what its students are measured against; the same name opens its data.
BASELINES = {
    "digits": Settings(steps=(5, 4, 3, 2, 1)),
    "captioned_digits": Settings(steps=(4, 2, 1), spacings=("trailing",)),
}


def main() -> int:
    """Train, measure, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("quality"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--held", action="store_true", help="train nothing, show what is there")
    parser.add_argument("--json", action="store_true", help="print quality.json")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    jobs = [(name, seed) for name in options.only for seed in options.seeds]
    if options.job:
        ((name, seed),) = jobs
        work(name, seed, options.output)
        return 0
    teachers = list(dict.fromkeys(RUNS[name].load(0).teacher for name in options.only))
    baselines = {name: baselines_of(name, options.output)[1] for name in teachers}
    failed: list[str] = []
    if not options.held:
        with ThreadPoolExecutor(options.jobs) as pool:
            failed = list(filter(None, pool.map(lambda job: launch(*job, options.output), jobs)))
    lines = [line for job in jobs for line in held(*job, options.output)]
    problems = [*failed, *(problem for line in lines for problem in line["problems"])]
    problems += comparisons(lines)
    record = {
        "ok": not problems,
        "problems": problems,
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
        "teachers": {name: item.teacher.to_json() for name, item in baselines.items()},
        "students": lines,
    }
    write_json(options.output / "quality.json", record)
    text = "\n".join(table(name, item, lines) for name, item in baselines.items())
    write_bytes(options.output / "quality.md", text.encode())
    print(json.dumps(record, indent=1) if options.json else text)
    for problem in problems:
        print(f"missed: {problem}", file=sys.stderr)
    return 1 if problems else 0


def baselines_of(teacher: str, output: Path) -> tuple[Evaluator, Baselines]:
    """Return what measures a teacher's students, and what they are measured against."""
    evaluator = Evaluator.open(teacher)
    settings = BASELINES[teacher]
    cache = output / "cache"
    return evaluator, naive_baselines(Teacher.open(teacher), evaluator, settings, cache)


def held(name: str, seed: int, output: Path) -> list[dict[str, Any]]:
    """Return what was measured of one training with the present settings, if it was."""
    path = output / f"{name}-{seed}.json"
    found = read_json(path) if path.exists() else {}
    fits = found.get("recipe") == RUNS[name].load(seed).fingerprint
    return found["students"] if fits else []


def launch(name: str, seed: int, output: Path) -> str | None:
    """Run one training in a process of its own; return what went wrong."""
    if held(name, seed, output):
        return None
    words = [sys.executable, __file__, "--job", "--only", name, "--seeds", str(seed), "-o", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    print(f"{name}, seed {seed}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if done.returncode:
        return f"{name}, seed {seed}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return None


def work(name: str, seed: int, output: Path) -> None:
    """Train and measure one run, and keep the numbers."""
    run = RUNS[name]
    recipe = run.load(seed)
    evaluator, baselines = baselines_of(recipe.teacher, output)
    root = output / f"{name}-{seed}"
    begun = time.process_time()
    distill(recipe, root, resume=True, overwrite=True, quiet=True)
    clock = root / "seconds.json"
    if not clock.exists():
        write_json(clock, round(time.process_time() - begun, 1))
    lines = []
    for folder, sampler in run.students:
        item = measure(Student.open(root / folder), evaluator, baselines, sampler)
        bar = BARS[run.bars].get(item.nfe) if run.bars else None
        problems = [f"seed {seed}: {problem}" for problem in item.problems(bar)]
        line = {"run": name, "teacher": recipe.teacher, "seed": seed, "seconds": read_json(clock)}
        lines.append({**line, "problems": problems, **item.to_json()})
    record = {"recipe": recipe.fingerprint, "students": lines}
    write_json(output / f"{name}-{seed}.json", record)


def comparisons(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what misses `PAIRS`, seed by seed, where both are there."""
    found: dict[tuple[str, float, int], float] = {}
    for line in lines:
        # Of several samplers of as many evaluations, the first is meant.
        place = (line["run"], line["nfe"], line["seed"])
        found.setdefault(place, line["report"]["frechet"])
    for seed in sorted({line["seed"] for line in lines}):
        for own, other, limit in PAIRS:
            if (*own, seed) in found and (*other, seed) in found:
                ratio = found[*own, seed] / found[*other, seed]
                if ratio > limit:
                    names = [f"{run} at {nfe} evaluation(s)" for run, nfe in (own, other)]
                    yield f"seed {seed}: {names[0]} is {ratio:.3f} of {names[1]}, at most {limit:g} is required"


def table(teacher: str, baselines: Baselines, lines: Sequence[dict[str, Any]]) -> str:
    """Return the table of one teacher as Markdown."""
    own = [line for line in lines if line["teacher"] == teacher]
    rows = [*baseline_rows(baselines), *map(student_row, own)]
    text = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    text += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(text) + "\n"


def baseline_rows(baselines: Baselines) -> Iterator[list[str]]:
    """Yield the cells of the teachers."""
    teacher = baselines.teacher
    count = 2 * baselines.settings.reference_steps
    values = (teacher.recall, teacher.diversity, teacher.memorisation, teacher.accuracy)
    cells = ["guided teacher", "", str(count), "", f"{teacher.frechet:.3f}", "", "1.000", ""]
    yield [*cells, *map(number, values), ""]
    for steps, naive in baselines.naive.items():
        report = naive.report
        name = f"naive teacher, {steps} step{'s' * (steps > 1)}, g={1 + naive.w:g}, {naive.spacing}"
        values = (report.frechet, 1.0, report.frechet / teacher.frechet, 1.0)
        values += (report.recall, report.diversity, report.memorisation, report.accuracy)
        yield [name, "", str(steps * (2 if naive.w else 1)), "", *map(number, values), ""]


def student_row(line: dict[str, Any]) -> list[str]:
    """Return the cells of a student."""
    report = line["report"]
    values = [report["frechet"], line["to_naive"], line["to_teacher"], line["mse_to_naive"]]
    values += [report[name] for name in ("recall", "diversity", "memorisation", "accuracy")]
    cells = [line["name"], str(line["seed"]), f"{line['nfe']:g}", f"{line['parameters']:,}"]
    return [*cells, *map(number, values), f"{line['seconds']:.0f}"]


def number(value: float | None) -> str:
    """Return a number for people, or nothing."""
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
