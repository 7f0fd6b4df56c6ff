"""The quality table: students of the packaged recipes over several seeds, beside their bars.

python examples/quality.py -o quality [--seeds 0 1 2] [--json]

Writes quality/quality.md and quality/quality.json; a student that is already there is not trained again.
Exit status 1 if a bar is missed.
"""

import argparse
import json
import logging
import platform
import sys
import time
from pathlib import Path

import torch

from edgedistill.environment import versions
from edgedistill.evaluation.baselines import Baselines, naive_baselines
from edgedistill.evaluation.report import Evaluator
from edgedistill.evaluation.students import GUIDED_BARS, StudentQuality, measure
from edgedistill.files import write_bytes, write_json
from edgedistill.student import Student
from edgedistill.teacher import Teacher
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill

# By folder name: the recipe, what is changed in it, where its students lie, whether the bars hold for them.
STOCHASTIC = ("name=digits-stochastic", "guided.sampler=stochastic", "guided.steps=[4]")
RUNS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], bool]] = {
    "guided": ("digits_guided", (), ("4-step", "2-step", "."), True),
    "stochastic": ("digits_guided", STOCHASTIC, (".",), False),
    "small": ("digits_small", (), (".",), False),
}
COLUMNS = (
    "student", "seed", "evaluations", "parameters", "Frechet", "/ naive", "/ teacher", "error / naive",
    "recall", "diversity", "memorised", "accuracy", "training s",
)  # fmt: skip


def main() -> int:
    """Train, measure, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("quality"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print quality.json")
    options = parser.parse_args()
    # One thread: tiny networks gain little from a second one and lose much where cores are shared.
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    evaluator = Evaluator.open("digits")
    baselines = naive_baselines(Teacher.open("digits"), evaluator, cache=options.output / "cache")
    rows, problems = [], []
    for name, (recipe, changes, folders, has_bars) in RUNS.items():
        for seed in options.seeds:
            root = options.output / f"{name}-{seed}"
            seconds = train(recipe, [*changes, f"seed={seed}"], root)
            for folder in folders:
                item = measure(Student.open(root / folder), evaluator, baselines)
                rows.append((seed, seconds, item))
                missed = item.problems(GUIDED_BARS[item.nfe] if has_bars else None)
                problems += [f"seed {seed}: {problem}" for problem in missed]
    record = {
        "ok": not problems,
        "problems": problems,
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
        "floor": baselines.teacher.floor,
        "teacher": baselines.teacher.to_json(),
        "students": [{"seed": s, "seconds": t, **item.to_json()} for s, t, item in rows],
    }
    write_json(options.output / "quality.json", record)
    text = table(rows, baselines)
    write_bytes(options.output / "quality.md", text.encode())
    print(json.dumps(record, indent=1) if options.json else text)
    for problem in problems:
        print(f"missed: {problem}", file=sys.stderr)
    return 1 if problems else 0


def train(recipe: str, changes: list[str], root: Path) -> float:
    """Train one recipe into `root`, unless it is there; return the seconds that it took."""
    path = Path(__file__).parent / f"{recipe}.yaml"
    settings = Recipe.load(path, [*changes, "training.tensorboard=false"])
    start = time.perf_counter()
    distill(settings, root, resume=True)
    clock = root / "seconds.json"
    if not clock.exists():
        write_json(clock, round(time.perf_counter() - start, 1))
    return float(json.loads(clock.read_text()))


def table(rows: list[tuple[int, float, StudentQuality]], baselines: Baselines) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    teacher = baselines.teacher
    count = 2 * baselines.settings.reference_steps
    first = ["guided teacher", "", str(count), "", f"{teacher.frechet:.3f}", "", "1.000", ""]
    first += [
        f"{v:.3f}"
        for v in (teacher.recall, teacher.diversity, teacher.memorisation, teacher.accuracy)
    ]
    lines.append("| " + " | ".join([*first, ""]) + " |")
    for steps, naive in baselines.naive.items():
        report, ratio = naive.report, naive.report.frechet / teacher.frechet
        plural = "s" * (steps > 1)
        name = f"naive teacher, {steps} step{plural}, g={1 + naive.w:g}, {naive.spacing}"
        calls = str(steps * (2 if naive.w else 1))
        values = [report.frechet, 1.0, ratio, 1.0, report.recall, report.diversity]
        values += [report.memorisation, report.accuracy]
        lines.append(
            "| " + " | ".join([name, "", calls, "", *(f"{v:.3f}" for v in values), ""]) + " |"
        )
    for seed, seconds, item in rows:
        report = item.report
        values = [report.frechet, item.to_naive, item.to_teacher, item.mse_to_naive, report.recall]
        values += [report.diversity, report.memorisation, report.accuracy]
        cells = [item.name, str(seed), str(item.nfe), f"{item.parameters:,}"]
        cells += ["" if v is None else f"{v:.3f}" for v in values]
        lines.append("| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
