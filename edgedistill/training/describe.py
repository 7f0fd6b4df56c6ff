"""The plan of a recipe without carrying it out: roles, phases, updates, samples, time."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.methods.plan import Phase
from edgedistill.training.checkpoint import Position
from edgedistill.training.logs import Unwatched
from edgedistill.training.prepare import prepare
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import start, train


@dataclass
class _Stopwatch(Unwatched):
    """Measures seconds per iteration, the first of each phase left out."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _last: float = 0.0

    def begin(self, phase: Phase, position: Position) -> None:  # noqa: ARG002
        self._last = 0.0

    def step(self, phase: Phase, position: Position, losses: Mapping[str, float]) -> None:  # noqa: ARG002
        now = time.perf_counter()
        if self._last:
            self.seconds[phase.name] = min(
                self.seconds.get(phase.name, float("inf")), now - self._last
            )
        self._last = now


def describe(recipe: Recipe, *, timed_iterations: int = 4) -> dict[str, Any]:
    """Return the plan of a recipe without carrying it out: roles, phases, updates, samples, time.

    Args:
        recipe: What would be done.
        timed_iterations: Iterations of each phase that are run to measure the time; 0: none.

    Raises:
        BundleError, ConfigError: As `prepare`.
    """
    prepared = prepare(recipe)
    seconds: dict[str, float] = {}
    if timed_iterations:
        watch = _Stopwatch()
        short = tuple(
            dataclasses.replace(phase, iterations=timed_iterations, emits=None)
            for phase in prepared.plan.phases
        )
        plan = dataclasses.replace(prepared.plan, phases=short)
        trial = dataclasses.replace(prepare(recipe), plan=plan)
        with tempfile.TemporaryDirectory() as folder:
            train(trial, Path(folder), watch, start(trial))
        seconds = watch.seconds
    return {
        "recipe": recipe.to_json(),
        "roles": [
            {
                "name": role.name,
                "parameters": sum(p.numel() for p in role.network.parameters()),
                "trained": role.trained,
                "follows": role.follows.role if role.follows else None,
            }
            for role in prepared.plan.roles
        ],
        "phases": [
            {
                "name": phase.name,
                "iterations": phase.iterations,
                "samples": phase.iterations * recipe.training.batch_size,
                "updates": [
                    {"name": u.name, "steps": list(u.roles), "every": u.every, "unroll": u.unroll}
                    for u in phase.updates
                ],
                "emits": phase.emits.name if phase.emits else None,
                "seconds_per_iteration": seconds.get(phase.name),
            }
            for phase in prepared.plan.phases
        ],
    }
