"""The demo's report as tables and as one page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgedistill import page
from edgedistill.images import grid
from edgedistill.page import Html

if TYPE_CHECKING:
    from edgedistill.evaluation.baselines import Baselines
    from edgedistill.evaluation.students import StudentQuality
    from edgedistill.teacher import Teacher

HEADERS = (
    "model", "evaluations", "parameters", "Frechet", "/naive", "/teacher", "error/naive", "recall",
    "diversity", "memorised", "accuracy",
)  # fmt: skip
_SHOWN = 20


def render(
    record: dict[str, Any],
    teacher: "Teacher",
    baselines: "Baselines",
    students: "Sequence[StudentQuality]",
    parity: Sequence[Html],
) -> str:
    """Return the page: pictures, quality, sizes, then the sections of the parity report."""
    mark = page.badge("all green", "good") if record["ok"] else page.badge("failed", "bad")
    machine, seconds = record["machine"], record["seconds"]["everything"]
    return page.document(
        "edgedistill: the whole way, once",
        page.paragraph(
            page.joined(
                mark,
                "A 50-step guided teacher of handwritten digits became students of 4, 2 and 1 evaluations; the "
                "4-step one was exported, compressed, and compared with PyTorch on every runtime.",
                page.muted(f"{seconds:.0f} s on {machine['cpus']} CPUs, {machine['platform']}"),
            )
        ),
        page.bullets(record["problems"]) if record["problems"] else "",
        _pictures(teacher, baselines, students),
        page.section(
            "How good the students are",
            page.table(HEADERS, quality_rows(record)),
            page.paragraph(page.muted(_legend(baselines))),
        ),
        _sizes(record),
        *parity,
    )


def quality_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the quality table, one list per model."""
    teacher = record["teacher"]
    lines = [
        ["guided teacher", str(teacher["nfe"]), "", *_numbers(teacher["report"], None, 1.0, None)]
    ]
    for item in record["naive"]:
        scale, steps = item["guidance_scale"], item["steps"]
        name = f"naive teacher, {_counted(steps, 'step')}, g={scale:g}, {item['spacing']}"
        ratio = item["report"]["frechet"] / teacher["report"]["frechet"]
        calls = steps if scale == 1 else 2 * steps
        lines.append([name, str(calls), "", *_numbers(item["report"], 1.0, ratio, 1.0)])
    for item in record["students"]:
        ratios = item["to_naive"], item["to_teacher"], item["mse_to_naive"]
        size = f"{item['parameters']:,}"
        lines.append([item["name"], str(item["nfe"]), size, *_numbers(item["report"], *ratios)])
    return lines


def _numbers(
    report: dict[str, Any], to_naive: float | None, to_teacher: float, mse: float | None
) -> list[str]:
    kinds = "recall", "diversity", "memorisation", "accuracy"
    values = [report["frechet"], to_naive, to_teacher, mse, *(report[kind] for kind in kinds)]
    return ["" if value is None else f"{value:.3f}" for value in values]


def _pictures(
    teacher: "Teacher", baselines: "Baselines", students: "Sequence[StudentQuality]"
) -> Html:
    from edgedistill.models.run import sample_torch

    sets = [(f"teacher, {baselines.settings.reference_steps} guided steps", baselines.reference)]
    for steps, naive in baselines.naive.items():
        table = teacher.table(steps, 1 + naive.w, naive.spacing)
        modules = dict.fromkeys(table.networks, teacher.network)
        samples = sample_torch(modules, table, _SHOWN, seed=baselines.settings.seed)
        sets.append((f"naive teacher, {_counted(steps, 'step')}", samples))
    sets += [
        (f"{item.name}, {_counted(item.nfe, 'evaluation')}", item.samples) for item in students
    ]
    return page.section(
        "The same noise, fewer evaluations",
        page.gallery(
            *[
                page.picture(
                    grid(samples[:_SHOWN], columns=5, scale=4), f"samples: {name}", name, 230
                )
                for name, samples in sets
            ]
        ),
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _legend(baselines: "Baselines") -> str:
    return (
        f"{baselines.settings.count} samples each from the same noise, at guidance scale "
        f"{1 + baselines.settings.reference_w:g}. Frechet: distance to held-out digits on raw pixels; as many real "
        f"training digits score {baselines.teacher.floor:.3f}. Naive: the strongest of the teacher's guidance scales "
        "and timestep spacings at as many steps (a guided step costs two evaluations). error: squared distance to "
        "the 50-step teacher from the same noise. Accuracy and memorisation are guards, not aims."
    )


def _sizes(record: dict[str, Any]) -> Html:
    lines = [
        [row["model"], row["artifact"], f"{row['bytes'] / 1e6:.3f}", f"{row['smaller_by']:.1f}x"]
        for row in record["sizes"]
    ]
    return page.section(
        "Sizes",
        page.table(("model", "artifact", "MB", "PyTorch / this"), lines, left=(0, 1)),
        page.paragraph(
            page.muted(
                "Weights and graph together; at this size the graph is a good part of a file."
            )
        ),
    )
