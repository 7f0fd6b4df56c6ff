"""Every trained student through export, compression and parity by the same commands, as one table.

python examples/parity_of_students.py quality -o parity [--only 'ctm-0*'] [--held] [--docs docs/parity.md] [--json]

For each student below a folder (those of seed 0, unless others are named) it runs what a user would type, in this
process: `edgedistill export all`, `quantize` in three ways, and `parity` of all that came of it. What came out is
kept as parity/STUDENT/parity.json; the same command goes on where it was broken off, and makes anew what belongs to
a student that was trained again. Writes parity/parity.md and parity/parity.json. Exit status 1 if a floor is missed.
"""

import argparse
import contextlib
import datetime as dt
import fnmatch
import io
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from documents import listed, machine, paragraphs, put, table
from edgedistill import cli
from edgedistill.environment import versions
from edgedistill.files import read_json, write_bytes, write_json
from edgedistill.parity import FLOORS
from edgedistill.tables import DEFAULT
from edgedistill.terminal import aligned

HEADERS = ("student", "artifact", "worst row dB", "samples dB", "worst gain", "verdict")
SUMMARY = ("artifact", "passed", "worst row dB", "at least", "samples dB", "at least", "gain")
NAMED = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "coremltools", "numpy")
SMALLER = (["--quant-mode", "int8"], ["--weight-format", "int8"], ["--weight-format", "palette6"])
TEXT = (
    "Each student was taken through `edgedistill export all`, `quantize --quant-mode int8`, `--weight-format int8` and "
    "`--weight-format palette6`, and `parity`; a name after a comma is a sampler other than the student's first. "
    "Worst row: SNR of the worst prediction, each row fed the reference's state. Samples: SNR of the finished samples. "
    "Gain: how far a changed condition moves the samples, the reference being 1; the worst condition. "
    "Core ML packages run on the evaluator of `coreml`, not on a Mac."
)


@dataclass(frozen=True)
class Line:
    """One artifact of one student on one sampler; what could not be measured is None."""

    student: str
    artifact: str
    precision: str
    row: float | None
    samples: float | None
    gain: float | None
    verdict: str

    @classmethod
    def of(cls, student: str, item: dict[str, Any]) -> "Line":
        """Take the figures out of an artifact's part of `edgedistill parity --json`."""
        forced = (row["teacher_forced"].get("raw", {}) for row in item["rows"])
        return cls(
            student if item["sampler"] == DEFAULT else f"{student}, {item['sampler']}",
            item["name"],
            item["precision"],
            min((raw["snr_db"] for raw in forced if raw), default=None),
            item["image"] and item["image"]["snr_db"],
            worst_gain(item["sensitivity"].values()),
            item["verdict"],
        )

    @property
    def cells(self) -> list[str]:
        """Its line under `HEADERS`."""
        gain = "-" if self.gain is None else f"{self.gain:.3f}"
        return [
            self.student,
            self.artifact,
            number(self.row),
            number(self.samples),
            gain,
            self.verdict,
        ]


def main() -> int:
    """Export, compress, compare, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("students", type=Path, nargs="+", help="folders with students below them")
    parser.add_argument("-o", "--output", type=Path, default=Path("parity"))
    parser.add_argument("--only", nargs="+", default=["*-0", "*-0/*"], metavar="PATTERN")
    parser.add_argument("--held", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--docs", type=Path, help="put the tables between this file's markers too")
    parser.add_argument("--json", action="store_true", help="print parity.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found = dict(students(options.students, options.only))
    records = {}
    for name, folder in tqdm(found.items(), unit="student", disable=None):
        record = held(folder, options.output / name)
        if record is None and not options.held:
            record = work(folder, options.output / name)
        if record is not None:
            records[name] = record
    missing = [name for name in found if name not in records]
    lines = [
        Line.of(name, item) for name, record in records.items() for item in record["artifacts"]
    ]
    problems = [
        f"{name}: {text}" for name, record in records.items() for text in record["problems"]
    ]
    result = {
        "ok": not problems and bool(lines),
        "problems": problems,
        "machine": machine(),
        "versions": versions(),
        "students": records,
    }
    write_json(options.output / "parity.json", result)
    text = document(lines, problems, missing)
    write_bytes(options.output / "parity.md", text.encode())
    if options.docs:
        put(text, options.docs, Path(__file__).name)
    print(
        json.dumps(result, indent=1) if options.json else aligned(HEADERS, [x.cells for x in lines])
    )
    for problem in problems:
        print(f"missed: {problem}", file=sys.stderr)
    return 0 if result["ok"] else 1


def students(roots: Sequence[Path], patterns: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield name and folder of each finished student whose name fits a pattern."""
    for root in roots:
        for path in sorted(root.rglob("student.json")):
            name = path.parent.relative_to(root).as_posix()
            if ".partial" not in name and any(fnmatch.fnmatch(name, item) for item in patterns):
                yield name, path.parent


def held(student: Path, output: Path) -> dict[str, Any] | None:
    """Return what is kept of a student, if it is of this training."""
    path = output / "parity.json"
    record = read_json(path) if path.exists() else {}
    fits = record.get("student") == read_json(student / "student.json")["fingerprint"]
    return record if fits else None


def work(student: Path, output: Path) -> dict[str, Any]:
    """Run the commands on a student; return and keep what they said."""
    bundle, smaller = str(output / "bundle"), str(output / "smaller")
    for stale in (bundle, smaller):
        shutil.rmtree(stale, ignore_errors=True)
    commands = [["export", "all", "-m", str(student), "-o", bundle]]
    commands += [["quantize", bundle, smaller, *way] for way in SMALLER]
    problems = [problem for words in commands for problem in run(words)[1]]
    made = [path for path in (bundle, smaller) if Path(path).exists()]
    printed, missed = run(["parity", *made, "--threads", "1", "--json"])
    record = {
        "student": read_json(student / "student.json")["fingerprint"],
        "problems": [*problems, *missed],
        "artifacts": json.loads(printed)["artifacts"] if printed else [],
    }
    write_json(output / "parity.json", record)
    return record


def run(words: list[str]) -> tuple[str, list[str]]:
    """Run a command of `edgedistill`; return what it printed, and what it complained of if it failed."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        status = cli.main(words)
    complaints = [line for line in said.getvalue().splitlines() if line.startswith("edgedistill: ")]
    told = [line.removeprefix("edgedistill: ") for line in complaints]
    return printed.getvalue(), told or [f"`{words[0]}` gave {status}"] if status else []


def document(lines: Sequence[Line], problems: Sequence[str], missing: Sequence[str]) -> str:
    """Return all tables as Markdown."""
    own = versions()
    ran = [line for line in lines if line.verdict != "skipped"]
    passed = sum(line.verdict == "ok" for line in ran)
    head = (
        f"Written by `make parity-students` on {dt.datetime.now(dt.UTC).date()}: {machine()}, one thread, Python "
        f"{own['python']}, {listed(NAMED, own)}. {passed} of {len(ran)} lines reach their floors."
    )
    if missing:
        head += f" **Not run yet**: {', '.join(missing)}."
    parts = [paragraphs(head, TEXT)]
    parts += ["## By artifact: the lowest of all students", table(SUMMARY, summary(ran))]
    if problems:
        parts += ["## Missed", "\n".join(f"- {problem}" for problem in problems)]
    parts += ["## Every line", table(HEADERS, [line.cells for line in lines], 2)]
    return "\n\n".join(parts) + "\n"


def summary(lines: Sequence[Line]) -> Iterator[list[str]]:
    """Yield the cells of each artifact under `SUMMARY`."""
    for name in dict.fromkeys(line.artifact for line in lines):
        own = [line for line in lines if line.artifact == name]
        floor = FLOORS[own[0].precision]
        rows, samples, gains = (
            [value for line in own if (value := getattr(line, field)) is not None]
            for field in ("row", "samples", "gain")
        )
        yield [
            name,
            f"{sum(line.verdict == 'ok' for line in own)} of {len(own)}",
            number(min(rows, default=None)),
            f"{floor.raw:g}",
            number(min(samples, default=None)),
            f"{floor.image:g}",
            f"{min(gains):.3f} to {max(gains):.3f}" if gains else "-",
        ]


def worst_gain(gains: Any) -> float | None:
    """Return the one that is farthest from 1."""
    return max(gains, key=lambda gain: abs(gain - 1), default=None)


def number(value: float | None) -> str:
    """Write decibels with one digit; 999 stands for equal bits."""
    return "-" if value is None else "equal" if value >= 999 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
