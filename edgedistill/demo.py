"""The command `edgedistill demo`: the whole way on the packaged digits teacher, in documented commands."""

import argparse
import contextlib
import io
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill import plugins
from edgedistill.arguments import add_command
from edgedistill.errors import CheckFailedError

if TYPE_CHECKING:
    from edgedistill.evaluation.baselines import Baselines
    from edgedistill.evaluation.students import StudentQuality
    from edgedistill.parity import ParityReport

DESCRIPTION = """\
Take the packaged teacher of handwritten digits the whole way: distil students of 4, 2 and 1 evaluations and
a smaller one, export to ONNX, OpenVINO and Core ML, compress, sample, and compare everything with PyTorch.
Takes minutes on two CPU cores and needs no network. Each step is a command that it prints, so that it
can be repeated by hand with another model."""
EPILOG = """\
examples:
  edgedistill demo
  edgedistill demo -o somewhere --json > report.json

DIR/report.html shows everything; DIR/report.json is the same for machines; DIR/bundle holds the 4-step
student in every format, DIR/compressed its 8-bit and 6-bit versions. Exit status 1 if a bar is missed."""


def register(commands: Any) -> None:
    """Add the command to the parser."""
    short = "the whole way in minutes, on a teacher that comes with the package"
    parser = add_command(commands, "demo", short, DESCRIPTION, EPILOG)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="folder to fill (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print DIR/report.json at the end")
    parser.set_defaults(run=run)


@dataclass
class _Journal:
    """Runs commands, shows them, and remembers how long each took."""

    quiet: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def command(self, *arguments: str | Path) -> Any:
        """Run one edgedistill command in this process and return its JSON."""
        from edgedistill import cli

        words = [str(item) for item in arguments]
        self.say(f"$ edgedistill {' '.join(words)}")
        answer = io.StringIO()
        with self.timed(f"{words[0]} {Path(words[1]).stem}"), contextlib.redirect_stdout(answer):
            cli.execute([*words, "--json"])
        return json.loads(answer.getvalue())

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a block to `seconds` and say it."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self.say(f"  {took:.1f} s")

    def say(self, line: str) -> None:
        """Print a line for people."""
        if not self.quiet:
            print(line, flush=True)


def run(options: argparse.Namespace) -> int:
    """Carry out the command."""
    import torch

    # One thread: so small a network gains little from a second one and loses much where cores are shared.
    torch.set_num_threads(1)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    journal = _Journal(quiet=options.json)
    start = time.perf_counter()
    _make(folder, journal)
    with journal.timed("quality"):
        baselines, students = _quality(folder, journal)
    parity = _parity(folder, journal)
    journal.seconds["everything"] = time.perf_counter() - start
    problems = [*_missed(students), *parity.failures]
    record = _record(folder, journal, baselines, students, parity, problems)
    _write(folder, record, _page(record, baselines, students, parity))
    if options.json:
        print(json.dumps(record, indent=1))
    journal.say(_summary(record, folder))
    if problems:
        msg = "; ".join(problems) + "."
        raise CheckFailedError(msg)
    return 0


def _make(folder: Path, journal: _Journal) -> None:
    student, bundle, compressed = folder / "student", folder / "bundle", folder / "compressed"
    journal.command("distill", _recipe("digits_guided"), "-o", student, "--overwrite")
    journal.command("distill", _recipe("digits_small"), "-o", folder / "small", "--overwrite")
    journal.command("export", "all", "-m", student / "4-step", bundle, "--overwrite")
    journal.command("export", "all", "-m", folder / "small", folder / "small-bundle", "--overwrite")
    journal.command("quantize", bundle, compressed, "--quant-mode", "int8", "--overwrite")
    journal.command("quantize", bundle, compressed, "--weight-format", "int8")
    journal.command("quantize", bundle, compressed, "--weight-format", "palette6")
    for runtime in ("onnxruntime", "openvino"):
        picture = folder / f"{runtime}.png"
        journal.command("sample", bundle, "--runtime", runtime, "-n", "20", "-o", picture)


def _recipe(name: str) -> Path:
    """Find a packaged recipe: beside the package when installed, in examples/ in a checkout."""
    here = Path(__file__).parent
    places = [
        here / "assets" / "recipes" / f"{name}.yaml",
        here.parent / "examples" / f"{name}.yaml",
    ]
    return next(path for path in places if path.is_file())


def _quality(folder: Path, journal: _Journal) -> tuple["Baselines", "list[StudentQuality]"]:
    from edgedistill.evaluation.baselines import naive_baselines
    from edgedistill.evaluation.report import Evaluator
    from edgedistill.evaluation.students import measure
    from edgedistill.student import Student
    from edgedistill.teacher import Teacher

    journal.say("measuring 1000 samples of the teacher and of each student")
    evaluator = Evaluator.open("digits")
    baselines = naive_baselines(Teacher.open("digits"), evaluator, cache=folder / "baselines")
    folders = [
        folder / "student" / "4-step",
        folder / "student" / "2-step",
        folder / "student",
        folder / "small",
    ]
    return baselines, [measure(Student.open(path), evaluator, baselines) for path in folders]


def _parity(folder: Path, journal: _Journal) -> "ParityReport":
    from edgedistill.bundle import Bundle

    journal.say(f"$ edgedistill parity {folder / 'bundle'} {folder / 'compressed'}")
    verify = plugins.find(plugins.REPORTS, "verify")
    with journal.timed("parity"):
        report: ParityReport = verify(
            [Bundle.open(folder / "bundle"), Bundle.open(folder / "compressed")]
        )
    return report


def _missed(students: "list[StudentQuality]") -> list[str]:
    from edgedistill.evaluation.students import BARS

    *full, small = students
    missed = [line for item in full for line in item.problems(BARS["guided"][item.nfe])]
    return missed + small.problems()


def _record(
    folder: Path,
    journal: _Journal,
    baselines: "Baselines",
    students: "list[StudentQuality]",
    parity: "ParityReport",
    problems: list[str],
) -> dict[str, Any]:
    return {
        "ok": not problems,
        "problems": problems,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "versions": dict(parity.environment),
        "seconds": {name: round(value, 1) for name, value in journal.seconds.items()},
        "teacher": {
            "nfe": 2 * baselines.settings.reference_steps,
            "guidance_scale": 1 + baselines.settings.reference_w,
            "report": baselines.teacher.to_json(),
        },
        "naive": [
            {
                "steps": item.steps,
                "guidance_scale": 1 + item.w,
                "spacing": item.spacing,
                "report": item.report.to_json(),
            }
            for item in baselines.naive.values()
        ],
        "students": [item.to_json() for item in students],
        "sizes": _sizes(folder),
        "parity": parity.to_json(),
    }


def _sizes(folder: Path) -> list[dict[str, Any]]:
    """Return the bytes of every artifact, and how much smaller it is than the PyTorch weights."""
    from edgedistill.bundle import REFERENCE, Bundle

    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for root in ("bundle", "compressed", "small-bundle"):
        bundle = Bundle.open(folder / root)
        reference = bundle.size(bundle.artifacts[REFERENCE])
        for item in bundle.artifacts.values():
            size = bundle.size(item)
            lines[bundle.name, item.name] = {
                "model": bundle.name,
                "artifact": item.name,
                "bytes": size,
                "smaller_by": reference / size,
            }
    return list(lines.values())


def _page(
    record: dict[str, Any],
    baselines: "Baselines",
    students: "list[StudentQuality]",
    parity: "ParityReport",
) -> str:
    from edgedistill.demo_page import render
    from edgedistill.teacher import Teacher

    sections = plugins.find(plugins.REPORTS, "parity_sections")(parity)
    return render(record, Teacher.open("digits"), baselines, students, sections)


def _write(folder: Path, record: dict[str, Any], page: str) -> None:
    from edgedistill.files import write_bytes, write_json

    write_bytes(folder / "report.html", page.encode())
    write_json(folder / "report.json", record)


def _summary(record: dict[str, Any], folder: Path) -> str:
    from edgedistill.demo_page import HEADERS, quality_rows
    from edgedistill.terminal import aligned

    artifacts = record["parity"]["artifacts"]
    verdict = "all green" if record["ok"] else "NOT green"
    return "\n".join(
        [
            "",
            aligned(HEADERS, quality_rows(record)),
            "",
            f"{verdict}: {len(record['students'])} students, {len(artifacts)} artifacts, "
            f"{record['seconds']['everything']:.0f} s",
            f"open {folder / 'report.html'}",
        ]
    )
