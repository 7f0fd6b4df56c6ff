"""How `quality.py` measures: one function for each section of its document."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.evaluation.baselines import Baselines, Settings, naive_baselines
from edgedistill.evaluation.conditional import Following, follow_student, follow_teacher, trial
from edgedistill.evaluation.report import Evaluator, QualityReport
from edgedistill.evaluation.students import BARS, measure
from edgedistill.models import store
from edgedistill.student import Student
from edgedistill.tables import choose
from edgedistill.teacher import Teacher
from guide_transfer import transfer
from quality_runs import Run

Line = dict[str, Any]
MAX_TRAINED = 0.3  # of the base's parameters
MAX_EVALUATIONS = 0.5  # of those that the plain sampler needs
MAX_TRANSFERRED = 1.2  # Frechet distance over that of the guided fine-tune
PLAIN_STEPS = (4, 6, 8, 10, 12, 14, 16, 20, 25, 50)
WITHIN_REACH = "digits turned by 15 degrees"
FINE_TUNES: Mapping[str, Mapping[str, Any]] = {
    WITHIN_REACH: {"degrees": 15.0},
    "inverted digits": {"inverted": True},
}
# By section: the teachers that its students are measured against; the teacher's name opens its data too.
BASELINES = {
    "digits": ("digits", Settings(steps=(5, 4, 3, 2, 1))),
    "lowdiff": ("digits", Settings(PLAIN_STEPS, (0.0,), ("trailing", "leading"))),
    "msd": ("digits", Settings(steps=(5, 4, 3, 2, 1))),
    "captioned_digits": ("captioned_digits", Settings(spacings=("trailing",))),
}


@dataclass(frozen=True)
class Job:
    """One training of a run, done.

    Fields:
        run, name, seed: Which.
        root: What it left behind.
        cache: Of baselines.
    """

    run: Run
    name: str
    seed: int
    root: Path
    cache: Path

    @property
    def section(self) -> str:
        """Of the document."""
        return self.run.section

    def line(self, problems: Iterable[str], **figures: Any) -> Line:
        """Return what was measured of one student, with what it misses."""
        told = [f"seed {self.seed}: {problem}" for problem in problems]
        return {"run": self.name, "seed": self.seed, "problems": told, **figures}


def baselines_of(section: str, cache: Path) -> tuple[Evaluator, Baselines]:
    """Return what measures a section's students, and what they are measured against."""
    teacher, settings = BASELINES[section]
    evaluator = Evaluator.open(teacher)
    return evaluator, naive_baselines(Teacher.open(teacher), evaluator, settings, cache)


def students(job: Job) -> Iterator[Line]:
    """Measure students beside the teacher at as many steps."""
    evaluator, baselines = baselines_of(job.section, job.cache)
    bars = BARS.get(job.run.bars or "", {})
    for folder, sampler in job.run.students:
        item = measure(Student.open(job.root / folder), evaluator, baselines, sampler)
        yield job.line(item.problems(bars.get(item.nfe)), **item.to_json())


def compared(job: Job) -> Iterator[Line]:
    """Measure students that are compared with one another, and need not be good."""
    for line in students(job):
        yield {**line, "problems": []}


def cascade(job: Job) -> Iterator[Line]:
    """Measure the samplers of a cascade beside the teacher without guidance; of a plain network, its own curve."""
    evaluator, baselines = baselines_of(job.section, job.cache)
    student = Student.open(job.root)
    if len(student.table.stages) == 1:
        yield from plain_curve(job, student, evaluator)
        return
    for folder, sampler in job.run.students:
        item = measure(Student.open(job.root / folder), evaluator, baselines, sampler)
        table = choose(student.samplers, sampler)
        needed = plain_steps(baselines, item.report.frechet)
        problems = item.problems()
        if needed is not None and table.effective_nfe > MAX_EVALUATIONS * needed:
            problems.append(
                f"{item.name}: the teacher needs {needed} evaluations for as low a Frechet distance; at most "
                f"{MAX_EVALUATIONS:g} of them are allowed, and it takes {table.effective_nfe:g}"
            )
        figures = {
            "evaluations": table.effective_nfe,
            "rows": [len(stage.rows) for stage in table.stages],
            "needed": needed,
        }
        yield job.line(problems, **figures, **item.to_json())


def plain_curve(job: Job, student: Student, evaluator: Evaluator) -> Iterator[Line]:
    """Measure a network of one resolution as the teacher is measured."""
    name, settings = BASELINES[job.section]
    (network,) = student.signatures
    plain = dataclasses.replace(Teacher.open(name), network=store.load(student.folder(network)))
    for steps, naive in naive_baselines(plain, evaluator, settings).naive.items():
        yield job.line([], evaluations=steps, frechet=naive.report.frechet)


def plain_steps(baselines: Baselines, frechet: float) -> int | None:
    """Return the fewest steps of the teacher that reach a Frechet distance; None: none that was tried."""
    reach = (steps for steps, item in baselines.naive.items() if item.report.frechet <= frechet)
    return min(reach, default=None)


def following(job: Job) -> Iterator[Line]:
    """Measure a student that follows an image beside the teachers that are made to, without training."""
    evaluator, student = Evaluator.open("digits"), Student.open(job.root)
    settings = job.run.load(job.seed).settings
    given = trial(evaluator, settings.task, settings.factor)
    sizes = student.provenance["parameters"]
    trained = sizes["adapter"] / sizes["unet"] if settings.trains == "adapter" else 1.0
    own = follow_student(student, given, evaluator)
    teacher = Teacher.open("digits")
    equal, double = (follow_teacher(teacher, given, evaluator, n) for n in (own.nfe, 2 * own.nfe))
    teachers = {
        "the strongest": min(equal, key=lambda item: item.frechet),
        "the closest": min(equal, key=lambda item: item.control_error),
        "the strongest where it is put right": min(equal, key=lambda item: item.imposed),
        "the strongest of twice the evaluations": min(double, key=lambda item: item.frechet),
    }
    problems = following_problems(own, trained, equal) if job.run.bars else []
    told = {"teacher, " + name: item.to_json() for name, item in teachers.items()}
    yield job.line(problems, task=settings.task, trained=trained, teachers=told, **own.to_json())


def following_problems(
    own: Following, trained: float, teachers: Sequence[Following]
) -> Iterator[str]:
    """Yield what misses the bars: few parameters, and better than the strongest steered teacher in every respect."""
    strongest = min(teachers, key=lambda item: item.frechet)
    checks = {
        "Frechet distance": (own.frechet, strongest.frechet),
        "distance to the condition": (own.control_error, strongest.control_error),
        "Frechet distance once put right": (own.imposed, min(item.imposed for item in teachers)),
    }
    for name, (value, limit) in checks.items():
        if value and value >= limit:
            yield f"{own.name}: {name} is {value:.4f}, below the steered teacher's {limit:.4f} is required"
    if trained > MAX_TRAINED:
        yield f"{own.name}: trains {trained:.2f} of the base's parameters, at most {MAX_TRAINED:g} is required"


def transferred(job: Job) -> Iterator[Line]:
    """Measure a guide on bases that it never saw."""
    guide = Student.open(job.root)
    for data, change in FINE_TUNES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = transfer(guide, Path(folder), **change)
        problems = transfer_problems(found) if data == WITHIN_REACH else []
        told = {name: {"nfe": nfe, **report.to_json()} for name, (nfe, report) in found.items()}
        yield job.line(problems, data=data, samplers=told)


def transfer_problems(found: Mapping[str, tuple[int, QualityReport]]) -> Iterator[str]:
    """Yield what misses the bars, of what `guide_transfer.figures` returns."""
    best, _, unguided, guided = (report for _, report in found.values())
    if guided.mse_to_reference >= unguided.mse_to_reference:
        yield f"{WITHIN_REACH}: the guide does not lower the error to the guided fine-tune"
    ratio = guided.frechet / best.frechet
    if ratio > MAX_TRANSFERRED:
        yield f"{WITHIN_REACH}: Frechet distance is {ratio:.3f} of the guided fine-tune's, at most {MAX_TRANSFERRED:g} is required"


MEASURES: Mapping[str, Callable[[Job], Iterator[Line]]] = {
    "digits": students,
    "codi": following,
    "lowdiff": cascade,
    "transfer": transferred,
    "msd": compared,
    "captioned_digits": students,
}
