"""Multi-student distillation: K one-step students, each for a part of what can be asked (Song et al., arXiv:2410.23274).

The conditions are parted among the students; each is distilled as if there were no other, on the data of
its part, and at sampling a router picks the one that a request needs. A student of another architecture
than the teacher first learns the teacher's scores (`edgedistill.methods.scores`); then come distribution
matching and its adversarial stage, which are those of `edgedistill.methods.dmd2`.

There is no public code. Decided here: prompts are parted by planes through their pooled embeddings
(`edgedistill.methods.partition`), where the paper does not say which directions it takes; the fake score of
every student starts from the teacher, and its head afresh. Pairs of the regression, where there is one, are
shared by all students whatever they ask for, which the paper found to matter; that is a setting.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.dmd2 import Distillation, DMD2Settings
from edgedistill.methods.partition import class_ranges, principal_planes
from edgedistill.methods.plan import Emission, Phase, Plan, Role, Subset, Update
from edgedistill.methods.scores import ScoreSettings, is_other_architecture, score_loss
from edgedistill.router import Router, route

ROUTED = "routed"  # name of the student that holds all


@dataclass(frozen=True)
class MSDSettings:
    """Settings of multi-student distillation.

    Fields:
        students: K. Classes are parted into ranges that follow one another; prompts need a power of two.
        only: Trains this student alone, so that K jobs train them at the same time; `edgedistill join` puts
            what they write together. None: all, one after the other, in a run that holds all K in its memory
            and in every checkpoint, however many it trains at a time: where K students are much, train them
            by `only`, whose runs are of the same size whatever K is.
        score: The stage before the others, for students of another architecture than the teacher.
        dmd2: The other stages.
        share_pairs: Whether a regression onto the teacher's samples uses those of all students' parts.
        through: Whose prompts the planes are laid through: the ``data``'s, or the ``examples`` that come with
            the teacher, in its ``prompts.txt``, which part by what is asked for where the data differ more in
            their wording.
        embeddings: Number of samples of the data that are looked at.
    """

    students: int = 4
    only: int | None = None
    score: ScoreSettings = field(default_factory=ScoreSettings)
    dmd2: DMD2Settings = field(default_factory=DMD2Settings)
    share_pairs: bool = True
    through: Literal["data", "examples"] = "data"
    embeddings: int = 10000

    def __post_init__(self) -> None:
        if self.students < 1 or self.embeddings < 1:
            msg = f"`students` and `embeddings` must be at least 1, got {self.students} and {self.embeddings}."
            raise ConfigError(msg)
        if self.only is not None and not 0 <= self.only < self.students:
            msg = f"`only` must name a student from 0 to {self.students - 1}, got {self.only}."
            raise ConfigError(msg)

    @property
    def trained(self) -> tuple[int, ...]:
        """The students of this run."""
        return tuple(range(self.students)) if self.only is None else (self.only,)


def plan(settings: MSDSettings, context: Context) -> Plan:
    """Lay out the students' training, one after the other; the last phase leaves all of them behind.

    Raises:
        ConfigError: As `dmd2.plan`, or if the conditions cannot be parted among as many students.
    """
    router = partition(settings, context)
    shared = Distillation(settings.dmd2, context)
    roles = [*shared.roles(), Role("blank", shared.head())]
    phases: list[Phase] = []
    subsets = {}
    for k in settings.trained:
        chosen = part_of(router, k)
        method = shared
        if not settings.share_pairs:
            method = Distillation(settings.dmd2, context, chosen)
        student = Role(f"student {k}", method.student(), trained=True)
        roles.append(student)
        subsets[f"part {k}"] = chosen
        phases += _phases(settings, method, student.name, f"part {k}")
    networks = {f"{router.network}.{k}": f"student {k}" for k in settings.trained}
    name = ROUTED if settings.only is None else f"student-{settings.only}"
    emission = Emission(name, replace(shared.table, router=router), networks)
    phases[-1] = replace(phases[-1], emits=emission)
    return Plan(tuple(roles), tuple(phases), subsets)


def partition(settings: MSDSettings, context: Context) -> Router:
    """Part what can be asked: by classes where there are some, else by prompts.

    Raises:
        ConfigError: If there is neither, they cannot be parted among as many students, or prompts are to be parted
            by examples that there are none of.
    """
    for condition in context.conditions:
        if condition.kind == "class" and condition.size is not None:
            return class_ranges(condition.size, settings.students, condition.name)
        if condition.kind == "text":
            embeddings = _embeddings(settings, context)
            return principal_planes(embeddings, settings.students, context.pooled)
    msg = "Students share classes or prompts; this teacher has neither."
    raise ConfigError(msg)


def _embeddings(settings: MSDSettings, context: Context) -> np.ndarray:
    if context.samples is None:
        # A sketch of the plan: any planes will do.
        return np.random.default_rng(0).normal(size=(64 * settings.students, 16))
    if settings.through == "examples":
        if context.examples is None:
            msg = "`through: examples` parts by the teacher's example prompts, and there are none; set `through: data`."
            raise ConfigError(msg)
        return context.examples
    asked = context.samples.first(min(settings.embeddings, len(context.samples)))
    return asked.conditions[context.pooled].numpy()


def part_of(router: Router, student: int) -> Subset:
    """Return what picks the samples that the router gives to a student."""

    def chosen(conditions: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(route(router, conditions) == student)

    return chosen


def _phases(settings: MSDSettings, method: Distillation, student: str, part: str) -> list[Phase]:
    """Lay out one student's training; its critic starts anew."""
    fresh = (("teacher", "fake"), ("blank", "head"))
    first, *others = (replace(phase, emits=None) for phase in method.phases(student, part))
    phases = [replace(first, copies=fresh), *others]
    if is_other_architecture(method.context):
        loss = score_loss(settings.score, method.context, student)
        update = Update("student", (student,), loss, settings.score.optimizer, source=part)
        phases.insert(0, Phase("scores", settings.score.iterations, (update,)))
    return [replace(phase, name=f"{student}: {phase.name}") for phase in phases]
