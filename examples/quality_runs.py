"""What `quality.py` trains, and how students of different trainings must compare."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.tables import DEFAULT
from edgedistill.training.recipe import Recipe

ONE = (0,)  # seeds of what is reported beside the methods
STUDENTS = (1, 2, 4)  # of multi-student distillation
TOTALS = (1, 2, 4, 8, 16, 32, 64)  # how long they are trained together
ASKED = 4  # totals from here on are trained when they are asked for by name


@dataclass(frozen=True)
class Run:
    """A training, and what is measured of it.

    Fields:
        recipe: A file beside this one, without its suffix.
        changes: Settings that differ from it.
        students: (folder, sampler) of each student; the folder of the last phase is ``.``.
        section: Of the document, and with it the way of measuring (see `quality_measures.MEASURES`).
        bars: A key of `edgedistill.evaluation.students.BARS`, or any name where the section has bars of its
            own; None: the guards alone.
        seeds: Of the trainings.
        seconds: Of one core that a training and its measuring take, about.
        of: The run whose students are measured; None: its own.
        usual: Whether it is trained when no run is named.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    students: tuple[tuple[str, str], ...] = ((".", DEFAULT),)
    section: str = "digits"
    bars: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: int = 100
    of: str | None = None
    usual: bool = True

    def load(self, seed: int) -> Recipe:
        """Return the recipe at a seed."""
        path = Path(__file__).parent / f"{self.recipe}.yaml"
        common = (f"seed={seed}", "training.tensorboard=false", "training.preview_every=0")
        return Recipe.load(path, [*self.changes, *common])


def share_of(total: int, students: int) -> tuple[str, ...]:
    """Return the settings of K small students that together are trained `total` times as long as one at 1."""
    lengths = {"msd.score": 80, "msd.dmd2.warm_up": 600, "msd.dmd2.adversarial": 100}
    iterations = (f"{k}.iterations={n * total // students}" for k, n in lengths.items())
    name = f"name=digits-msd-{students}-of-{total}"
    return (name, f"msd.students={students}", "msd.dmd2.match=null", *iterations)


def alone(iterations: int) -> tuple[str, ...]:
    """Return the settings of an adapter that learns its task for as long, and nothing of few evaluations."""
    length = (f"codi.train.iterations={iterations}", "codi.train.optimizer.learning_rate=3.0e-3")
    return ("codi.agreement=0.0", "codi.adapt=null", *length)


RUNS: dict[str, Run] = {
    "guided": Run(
        "digits_guided",
        students=(("4-step", DEFAULT), ("2-step", DEFAULT), (".", DEFAULT)),
        bars="guided",
        seconds=105,
    ),
    "stochastic": Run(
        "digits_guided",
        ("name=digits-stochastic", "guided.sampler=stochastic", "guided.steps=[4]"),
        seeds=ONE,
        seconds=80,
    ),
    "small": Run("digits_small", seconds=40),
    "guide": Run(
        "digits_guide",
        students=(("32-step", DEFAULT), ("16-step", DEFAULT), (".", DEFAULT)),
        bars="guide",
        seconds=85,
    ),
    "dmd2": Run("digits_dmd2", bars="dmd2", seconds=105),
    "dmd2-4": Run(
        "digits_dmd2", ("name=digits-dmd2-4", "dmd2.labels=[999,749,499,249]"), seeds=ONE
    ),
    "ctm": Run(
        "digits_ctm",
        students=((".", DEFAULT), (".", "2-step"), (".", "4-step"), (".", "4-step-stochastic")),
        bars="ctm",
        seconds=165,
    ),
    "sfd": Run("digits_sfd", bars="sfd", seconds=70),
    "sfd-3": Run("digits_sfd", ("name=digits-sfd-3", "sfd.stamps=[5]"), seconds=75),
    "sfd-4": Run("digits_sfd", ("name=digits-sfd-4", "sfd.stamps=[6]"), bars="sfd", seconds=115),
    "sfd-5": Run("digits_sfd", ("name=digits-sfd-5", "sfd.stamps=[7]"), seconds=115),
    "sfd-v": Run(
        "digits_sfd_v",
        students=(
            ("variable", DEFAULT),
            ("variable", "3-evaluations"),
            ("variable", "4-evaluations"),
            ("variable", "5-evaluations"),
            (".", DEFAULT),
        ),
        seconds=270,
    ),
    "codi-super": Run("digits_codi_super", section="codi", bars="codi", seconds=90),
    "codi-inpaint": Run("digits_codi_inpaint", section="codi", bars="codi", seconds=90),
    "codi-super-alone": Run("digits_codi_super", alone(1800), section="codi", seeds=ONE),
    "codi-inpaint-alone": Run("digits_codi_inpaint", alone(2000), section="codi", seeds=ONE),
    "lowdiff": Run(
        "digits_lowdiff",
        students=tuple((".", name) for name in (DEFAULT, "16-3-step", "16-2-step", "8-2-step")),
        section="lowdiff",
        bars="lowdiff",
        seconds=175,
    ),
    # A batch at 4x4 costs a quarter: 0.4 of 3000 at 4x4 and 0.6 at 8x8 make 2100 at 8x8.
    "plain": Run(
        "digits_lowdiff",
        (
            "name=digits-plain",
            *("lowdiff.factors=[1]", "lowdiff.shares=[]", "lowdiff.steps=[[8]]"),
            "lowdiff.train.iterations=2100",
        ),
        section="lowdiff",
        seeds=ONE,
        seconds=175,
    ),
    "guide-transfer": Run(
        "digits_guide", section="transfer", bars="transfer", seconds=60, of="guide"
    ),
    "captioned": Run(
        "captioned_guided",
        students=(("4-step", DEFAULT), ("2-step", DEFAULT), (".", DEFAULT)),
        section="captioned_digits",
        seeds=ONE,
        seconds=190,
    ),
    "captioned-dmd2": Run("captioned_dmd2", section="captioned_digits", seeds=ONE, seconds=150),
    "captioned-msd": Run("captioned_msd", section="captioned_digits", seeds=ONE, seconds=290),
    **{
        f"msd-{students}-of-{total}": Run(
            "digits_msd",
            share_of(total, students),
            section="msd",
            seeds=ONE,
            seconds=20 + 30 * total,
            usual=total < ASKED,
        )
        for total in TOTALS
        for students in STUDENTS
    },
}
# (run, evaluations), the run and evaluations that it is compared with, and the largest ratio of Frechet distances.
PAIRS = (
    *(
        (("sfd-v", n), (name, n), 1.1)
        for n, name in enumerate(("sfd", "sfd-3", "sfd-4", "sfd-5"), 2)
    ),
    (("ctm", 4), ("ctm", 1), 1.0),
)


def comparisons(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what misses `PAIRS`, seed by seed, where both are there."""
    found: dict[tuple[str, float, int], float] = {}
    for line in lines:
        if RUNS[line["run"]].section == "digits":
            # Of several samplers of as many evaluations, the first is meant.
            place = (line["run"], line["nfe"], line["seed"])
            found.setdefault(place, line["report"]["frechet"])
    for seed in sorted({seed for *_, seed in found}):
        for own, other, limit in PAIRS:
            if (*own, seed) in found and (*other, seed) in found:
                ratio = found[*own, seed] / found[*other, seed]
                if ratio > limit:
                    names = [f"{run} at {nfe} evaluation(s)" for run, nfe in (own, other)]
                    yield f"seed {seed}: {names[0]} is {ratio:.3f} of {names[1]}, at most {limit:g} is required"
