"""The quality of every method over several seeds, beside its bars, as one document.

python examples/quality.py -o quality [--only sfd ctm] [--seeds 0] [--jobs 2] [--held] [--docs docs/quality.md] [--json]

Each training is a process of its own with one thread, as many at a time as there are jobs. What it measured is kept
as quality/NAME-SEED.json; the same command goes on where it was broken off, and makes anew what was made with other
settings. Writes quality/quality.md and quality/quality.json. Exit status 1 if a bar is missed.
"""

import argparse
import datetime as dt
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from documents import listed, machine, paragraphs, put
from edgedistill.environment import versions
from edgedistill.files import read_json, write_bytes, write_json
from edgedistill.training.run import distill
from quality_measures import BASELINES, MEASURES, Job, Line, baselines_of
from quality_runs import RUNS, comparisons
from quality_tables import document

NAMED = ("torch", "diffusers", "numpy", "scikit-learn")  # versions that figures depend on
Task = tuple[str, int]  # name of a run, seed


def main() -> int:
    """Train, measure, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("quality"))
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of each run's own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--held", action="store_true", help="train nothing, show what is there")
    parser.add_argument("--docs", type=Path, help="put the tables between this file's markers too")
    parser.add_argument("--json", action="store_true", help="print quality.json")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = options.only or [
        name for name, run in RUNS.items() if run.usual or held(name, 0, options.output)
    ]
    tasks = [(name, seed) for name in names for seed in options.seeds or RUNS[name].seeds]
    if options.job:
        work(*tasks[0], options.output)
        return 0
    shown = [task for task in tasks if not options.held or held(*task, options.output)]
    sections = {RUNS[name].section for name, _ in shown} & set(BASELINES)
    cache = options.output / "cache"
    baselines = {name: baselines_of(name, cache)[1] for name in BASELINES if name in sections}
    failed = [] if options.held else train(tasks, options.output, options.jobs)
    lines = {task: held(*task, options.output) for task in tasks}
    found = [line for own in lines.values() for line in own]
    problems = [*failed, *(problem for line in found for problem in line["problems"])]
    problems += comparisons(found)
    record = {
        "ok": not problems,
        "problems": problems,
        "machine": machine(),
        "versions": versions(),
        "teachers": {name: item.teacher.to_json() for name, item in baselines.items()},
        "students": found,
    }
    write_json(options.output / "quality.json", record)
    missing = [task for task, own in lines.items() if not own]
    text = document(found, baselines, head(missing, problems))
    write_bytes(options.output / "quality.md", text.encode())
    if options.docs:
        put(text, options.docs, Path(__file__).name)
    print(json.dumps(record, indent=1) if options.json else text)
    for problem in problems:
        print(f"missed: {problem}", file=sys.stderr)
    return 1 if problems else 0


def train(tasks: Sequence[Task], output: Path, jobs: int) -> list[str]:
    """Run what is not held, what measures the students of other runs last; return what went wrong."""
    left = [task for task in tasks if not held(*task, output)]
    minutes = sum(RUNS[name].seconds for name, _ in left) / jobs / 60
    print(f"{len(left)} trainings, about {minutes:.0f} minutes on {jobs} cores", file=sys.stderr)
    # The first seed of everything first, and the longest first, so that no core waits for another in the end.
    left.sort(key=lambda task: (task[1], -RUNS[task[0]].seconds))
    waves = (
        [task for task in left if RUNS[task[0]].of is None],
        [task for task in left if RUNS[task[0]].of is not None],
    )
    failed = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(left), desc="trainings", disable=None) as bar,
    ):
        for wave in waves:
            for problem in pool.map(lambda task: launch(*task, output), wave):
                bar.update()
                failed += filter(None, [problem])
    return failed


def held(name: str, seed: int, output: Path) -> list[Line]:
    """Return what was measured of one training with the present settings, if it was."""
    path = output / f"{name}-{seed}.json"
    found = read_json(path) if path.exists() else {}
    fits = found.get("recipe") == RUNS[name].load(seed).fingerprint
    return found["students"] if fits else []


def launch(name: str, seed: int, output: Path) -> str | None:
    """Run one training in a process of its own; return what went wrong."""
    words = [sys.executable, __file__, "--job", "--only", name, "--seeds", str(seed), "-o", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    tqdm.write(f"{name}, seed {seed}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if done.returncode:
        return f"{name}, seed {seed}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return None


def work(name: str, seed: int, output: Path) -> None:
    """Train and measure one run, and keep the numbers."""
    run = RUNS[name]
    recipe = run.load(seed)
    root = output / f"{run.of or name}-{seed}"
    begun = time.process_time()
    distill(recipe, root, resume=True, overwrite=True, quiet=True)
    clock = root / "seconds.json"
    if not clock.exists():
        write_json(clock, round(time.process_time() - begun, 1))
    job = Job(run, name, seed, root, output / "cache")
    lines = [{"seconds": read_json(clock), **line} for line in MEASURES[run.section](job)]
    write_json(output / f"{name}-{seed}.json", {"recipe": recipe.fingerprint, "students": lines})


def head(missing: Sequence[Task], problems: Sequence[str]) -> str:
    """Return the document's first paragraphs: machine, date, versions, what is missing, what misses a bar."""
    own = versions()
    first = (
        f"Written by `make quality` on {dt.datetime.now(dt.UTC).date()}: {machine()}, one torch thread per training, "
        f"Python {own['python']}, {listed(NAMED, own)}. A run that was interrupted resumes."
    )
    seeds: dict[str, list[str]] = {}
    for name, seed in missing:
        seeds.setdefault(name, []).append(str(seed))
    told = "; ".join(f"{name} (seed {', '.join(numbers)})" for name, numbers in seeds.items())
    second = f"**Not run yet**: {told}." if missing else "Nothing is missing."
    third = "Bars that are missed: " + ("; ".join(problems) if problems else "none") + "."
    return paragraphs(first, f"{second} {third}")


if __name__ == "__main__":
    sys.exit(main())
