"""The document of `quality.py`: one section of Markdown for each kind of measurement."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from documents import paragraphs, table
from edgedistill.evaluation.baselines import Baselines
from quality_measures import PLAIN_STEPS, Line
from quality_runs import ASKED, RUNS, STUDENTS, TOTALS

COLUMNS = (
    "student | seed | evaluations | parameters | Frechet | / naive | / teacher | error / naive | "
    "recall | diversity | memorised | accuracy | CPU s"
)
Rows = Iterator[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One part of the document.

    Fields:
        title: Its heading; empty: it comes first.
        text: What the figures mean.
        columns: Of its table; the first ones are texts, the others numbers.
        rows: Makes the cells from what was measured, and from the teachers or None.
        texts: Number of columns that are texts.
    """

    title: str
    text: str
    columns: str
    rows: Callable[[Sequence[Line], Baselines | None], Rows]
    texts: int = 1


def document(lines: Sequence[Line], baselines: Mapping[str, Baselines], head: str) -> str:
    """Return the whole of it as Markdown.

    Args:
        lines: What was measured; sections without any are left out.
        baselines: By section.
        head: Machine, date, versions, and what is missing.
    """
    parts = [head]
    for name, section in SECTIONS.items():
        own = [line for line in lines if RUNS[line["run"]].section == name]
        if own:
            title = f"## {section.title}\n\n" if section.title else ""
            rows = section.rows(own, baselines.get(name))
            cells = table(section.columns.split(" | "), rows, section.texts)
            parts.append(f"{title}{paragraphs(section.text)}\n\n{cells}")
    return "\n\n".join(parts) + "\n"


def student_rows(lines: Sequence[Line], baselines: Baselines | None) -> Rows:
    """Yield the teachers' cells, then the students'."""
    if baselines is not None:
        yield from baseline_rows(baselines)
    for line in lines:
        report = line["report"]
        values = [report["frechet"], line["to_naive"], line["to_teacher"], line["mse_to_naive"]]
        values += [report[name] for name in ("recall", "diversity", "memorisation", "accuracy")]
        cells = [line["name"], str(line["seed"]), f"{line['nfe']:g}", f"{line['parameters']:,}"]
        yield [*cells, *map(number, values), f"{line['seconds']:.0f}"]


def baseline_rows(baselines: Baselines) -> Rows:
    """Yield the cells of the teachers."""
    teacher = baselines.teacher
    yield ["as many real digits", *[""] * 3, number(teacher.floor), *[""] * 8]
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


def following_rows(lines: Sequence[Line], _: Baselines | None) -> Rows:
    """Yield, for each task, the students and then the teachers, which are the same for all."""
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        for line in own:
            trained = f"{100 * line['trained']:.0f} %"
            told = [task.replace("_", "-"), line["run"], str(line["seed"]), trained]
            yield [*told, *followed(line)]
        for name, teacher in own[0]["teachers"].items():
            way = teacher["name"].removeprefix("teacher, ")
            yield ["", f"{name}: {way}", "", "", *followed(teacher)]


def followed(item: Mapping[str, Any]) -> list[str]:
    """Return the figures of a `Following`."""
    errors = (f"{item[name]:.5f}" for name in ("control_error", "error"))
    return [str(item["nfe"]), number(item["frechet"]), *errors, number(item["imposed"])]


def cascade_rows(lines: Sequence[Line], baselines: Baselines | None) -> Rows:
    """Yield one row for each number of evaluations; several seeds stand beside one another."""
    assert baselines is not None
    cascades = [line for line in lines if "rows" in line]
    plain = {line["evaluations"]: line["frechet"] for line in lines if "rows" not in line}
    for count in sorted({*PLAIN_STEPS, *(line["evaluations"] for line in cascades)}):
        own = [line for line in cascades if line["evaluations"] == count]
        teacher = baselines.naive.get(count)
        yield [
            f"{count:g}",
            " and ".join(map(str, own[0]["rows"])) if own else "",
            " ".join(number(line["report"]["frechet"]) for line in own),
            " ".join(str(line["needed"] or f"over {PLAIN_STEPS[-1]}") for line in own),
            number(teacher.report.frechet if teacher else None),
            number(plain.get(count)),
        ]


def transfer_rows(lines: Sequence[Line], _: Baselines | None) -> Rows:
    """Yield every sampler on every fine-tune."""
    for line in sorted(lines, key=lambda line: (line["data"], line["seed"])):
        best = next(iter(line["samplers"].values()))["frechet"]
        for name, item in line["samplers"].items():
            figures = [number(item["frechet"]), number(item["frechet"] / best)]
            figures += [f"{item['mse_to_reference']:.5f}", number(item["accuracy"])]
            yield [line["data"], name, str(line["seed"]), str(item["nfe"]), *figures]


def shared_rows(lines: Sequence[Line], _: Baselines | None) -> Rows:
    """Yield one row for each total length of training that there is; the columns are numbers of students."""
    found = {line["run"]: line for line in lines}
    for total in TOTALS:
        own = {k: found.get(f"msd-{k}-of-{total}") for k in STUDENTS}
        there = {k: line["report"]["frechet"] for k, line in own.items() if line is not None}
        if not there:
            continue
        cells = [
            f"{line['report']['frechet']:.3f} ({line['report']['recall']:.2f})" if line else ""
            for line in own.values()
        ]
        seconds = " ".join(f"{line['seconds']:.0f}" for line in own.values() if line)
        winner = min(there, key=lambda k: there[k]) if len(there) == len(own) else ""
        yield [str(total), *cells, str(winner), seconds]


def number(value: float | None) -> str:
    """Return a number for people, or nothing."""
    return "" if value is None else f"{value:.3f}"


SECTIONS: Mapping[str, Section] = {
    "digits": Section(
        "",
        "1000 samples each from the same noise at guidance scale 1.5. Frechet: distance to the held-out digits on raw pixels. Naive: the "
        "strongest of the teacher's guidance scales (1, 1.25, 1.5) and timestep spacings (trailing, leading, linspace) at as many steps; a "
        "guided step costs two evaluations. error: squared distance to the 50-step teacher from the same noise, which means nothing for "
        "samplers that add noise of their own. Recall counts 5 neighbours on raw pixels. CPU seconds are of the training. Accuracy and "
        "memorisation are guards, not aims. Frechet rewards variety: the unguided teacher scores lower than the guided one.",
        COLUMNS,
        student_rows,
    ),
    "captioned_digits": Section(
        "The teacher that reads prompts",
        "Samples of its ten example prompts in turn; naive: trailing spacing only.",
        COLUMNS,
        student_rows,
    ),
    "codi": Section(
        "Students that follow an image (CoDi)",
        "The 597 held-out digits, told by their 4x4 means, or with a hole. The teacher, which was never told of images, is made to follow by "
        "putting the known part right after every row but the last, in the state (RePaint) or in the estimate (DDNM); with and without "
        "guidance, which halves the rows, and with two spacings: eight ways, none of them trained. Of those with as many evaluations as the "
        "student three are shown, and the strongest of those with twice as many. *Put right*: once the known part is put back in the end as "
        "well, which leaves no distance to the condition but what clipping does; the inpainting student's sampler does so by itself. Required: below the "
        "strongest in Frechet distance, in distance to the condition, and in Frechet distance put right. *-alone*: the adapter trained as long "
        "without the method's agreement over jumps (no bar).",
        "task | sampler | seed | trained | evaluations | Frechet | distance to the condition | to the image | "
        "Frechet, put right",
        following_rows,
        texts=2,
    ),
    "lowdiff": Section(
        "A cascade of resolutions (LowDiff)",
        "Evaluations at 4x4 count a quarter. *needed*: the fewest evaluations of the packaged teacher, without guidance and with the stronger "
        "of two spacings, that reach as low a Frechet distance; required is that LowDiff takes at most half of them. Plain: the teacher's own "
        "network trained on for as much (2100 batches at 8x8), sampled like the teacher; one seed, no bar.",
        "evaluations | rows at 4x4 and 8x8 | LowDiff | needed | packaged teacher | plain",
        cascade_rows,
        texts=0,
    ),
    "transfer": Section(
        "The guide on bases that it never saw",
        "The packaged teacher fine-tuned for 150 steps, the guide of the same seed plugged in; everything is measured against the "
        "fine-tune's own guided teacher. On turned digits the error must fall below that without guidance, and the Frechet distance stay "
        "within 1.2 of the guided one's; inverted digits show the limit and have no bar.",
        "fine-tuned on | sampler | seed | evaluations | Frechet | / guided | error to guided | accuracy",
        transfer_rows,
        texts=2,
    ),
    "msd": Section(
        "One student or several (MSD)",
        "K students of 41 000 parameters, a quarter of the teacher's, share the ten classes. Along a row all K together are trained for the "
        "same number of iterations (80 of score matching, 600 of regression and 100 of distribution matching with the GAN, times the total). "
        "Down a column each is trained twice as long from row to row: where the last two figures hardly differ, the students have learnt what "
        f"they can hold. Totals from {ASKED} on are trained when they are named (`--only msd-4-of-16`). K = 1 at total 1 and K = 4 at total 4 are the same training for each student. Frechet distance, recall in brackets; "
        "one seed, no bar.",
        f"total | {' | '.join(f'K = {k}' for k in STUDENTS)} | lowest: K | CPU s of each",
        shared_rows,
        texts=0,
    ),
}
