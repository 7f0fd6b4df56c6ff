"""The plan of a recipe without carrying it out: roles, phases, updates, samples, memory, arithmetic, time."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from edgedistill.contract import BATCH, LENGTH
from edgedistill.methods.plan import Batch, Phase, Plan, Role, Step, Update
from edgedistill.teacher import Teacher
from edgedistill.training.checkpoint import Position
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.logs import Unwatched
from edgedistill.training.memory import checkpoint_blocks
from edgedistill.training.prepare import Prepared, prepare, sketch
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import start, train

META = torch.device("meta")
ADAM_STATES = 2


@dataclass
class Stopwatch(Unwatched):
    """Measures the mean seconds per iteration of each phase, from where each of its updates has run once."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _began: float = 0.0

    def step(self, phase: Phase, position: Position, losses: Mapping[str, float]) -> None:  # noqa: ARG002
        """An iteration is done; the clock is read."""
        now, timed = time.perf_counter(), position.iteration - _warming(phase)
        if timed == 0:
            self._began = now
        elif timed > 0:
            self.seconds[phase.name] = (now - self._began) / timed


def _warming(phase: Phase) -> int:
    """Return after how many iterations each update has run once."""
    return 1 + max(update.offset for update in phase.updates)


def timed_iterations(phase: Phase, least: int) -> int:
    """Return how many iterations tell the time of a phase: until each update has run, and then whole cycles of them.

    Args:
        phase: Its updates may be due every few iterations, in turn.
        least: How many they are at least.
    """
    cycle = math.lcm(*(update.every for update in phase.updates))
    cycles = max(1, -(-(least - _warming(phase)) // cycle))
    return _warming(phase) + cycles * cycle


class _Highest(PositionDraw):
    """Draws that choose the dearest for the whole batch: the largest stage, the most steps."""

    def shared_integer(self, low: int, high: int) -> int:  # noqa: ARG002
        """Return the highest number."""
        return high - 1


@dataclass(frozen=True)
class Cost:
    """What one optimizer step of an update takes at most on one device.

    Fields:
        activations: Bytes that its backward pass keeps from the forward pass; in float32, since tensors
            without numbers know no mixed precision.
        flops: Of the forward passes; the backward pass takes about twice what it differentiates.
    """

    activations: int
    flops: int


def describe(
    recipe: Recipe, *, is_sketch: bool = False, least_timed: int = 4, processes: int = 1
) -> dict[str, Any]:
    """Return the plan of a recipe as JSON data.

    Args:
        recipe: What would be done.
        is_sketch: Read the teacher's configurations alone: no weights, no data, no time is measured.
        least_timed: Least number of iterations of each phase that are run to measure the time (see
            `timed_iterations`); 0: none are.
        processes: Among which the batch is divided; memory and arithmetic are those of one.

    Raises:
        BundleError, ConfigError: As `prepare`.
    """
    seconds = {} if is_sketch or not least_timed else _seconds(recipe, least_timed)
    prepared = sketch(recipe)
    plan, costs = prepared.plan, _costs(prepared, processes)
    return {
        "recipe": recipe.to_json(),
        "processes": processes,
        "measured": bool(seconds),
        "roles": [_role(plan, role) for role in plan.roles],
        "phases": [
            {
                "name": phase.name,
                "iterations": phase.iterations,
                "samples": phase.iterations * recipe.training.batch_size,
                "updates": [
                    {
                        "name": update.name,
                        "steps": list(update.roles),
                        "every": update.every,
                        "unroll": update.unroll,
                        "forward_flops": costs[phase.name, update.name].flops,
                        "activation_bytes": costs[phase.name, update.name].activations,
                    }
                    for update in phase.updates
                ],
                "device_bytes": _device_bytes(plan, phase, costs),
                "emits": phase.emits.name if phase.emits else None,
                "seconds_per_iteration": seconds.get(phase.name),
            }
            for phase in plan.phases
        ],
    }


def _seconds(recipe: Recipe, least: int) -> dict[str, float]:
    watch = Stopwatch()
    prepared = prepare(recipe)
    short = tuple(
        dataclasses.replace(phase, iterations=timed_iterations(phase, least), emits=None)
        for phase in prepared.plan.phases
    )
    trial = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, phases=short))
    with tempfile.TemporaryDirectory() as folder:
        train(trial, Path(folder), watch, start(trial))
    return watch.seconds


def _role(plan: Plan, role: Role) -> dict[str, Any]:
    trained = sum(p.numel() for n, p in role.network.named_parameters() if role.is_trained(n))
    return {
        "name": role.name,
        "parameters": sum(p.numel() for p in role.network.parameters()),
        "trained": trained,
        "follows": role.follows.role if role.follows else None,
        "saved": plan.changes(role),
    }


def _device_bytes(plan: Plan, phase: Phase, costs: Mapping[tuple[str, str], Cost]) -> int:
    """Weights of all roles, gradients and Adam's moments of those that the phase steps, and activations."""
    stepped = {name for update in phase.updates for name in update.roles}
    total = 0
    for role in plan.roles:
        for name, parameter in role.network.named_parameters():
            grown = 1 + ADAM_STATES if role.name in stepped and role.is_trained(name) else 0
            total += parameter.numel() * parameter.element_size() * (1 + grown)
    return total + max(costs[phase.name, update.name].activations for update in phase.updates)


def _costs(prepared: Prepared, processes: int) -> dict[tuple[str, str], Cost]:
    """Return the cost of each update by (phase, update), from its loss run without numbers."""
    settings = prepared.recipe.training
    modules = {role.name: role.module.to(META) for role in prepared.plan.roles}
    for role in prepared.plan.roles:
        if settings.gradient_checkpointing:
            checkpoint_blocks(role.network)
        for name, parameter in role.network.named_parameters():
            parameter.requires_grad_(role.is_trained(name))
    pieces = settings.gradient_accumulation * processes
    part = Slice(settings.batch_size, 0, max(1, settings.batch_size // pieces))
    batch = blank_batch(prepared.teacher, part.stop)
    return {
        (phase.name, update.name): _cost(
            update, modules, batch, _Highest(prepared.recipe.seed, ("plan",), part, META)
        )
        for phase in prepared.plan.phases
        for update in phase.updates
    }


def _cost(update: Update, modules: Mapping[str, Any], batch: Batch, draw: PositionDraw) -> Cost:
    held = (p for module in modules.values() for p in module.parameters())
    weights = {parameter.untyped_storage()._cdata for parameter in held}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Tensors that are views of one another, or of a weight, share their memory.
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    carry: Any = None
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        for index in range(update.unroll):
            # Of an unrolled update, the first position that makes a step.
            losses = update.loss(Step(modules, batch, draw, index, carry))
            carry = losses.carry
            if losses.terms or losses.done:
                break
    return Cost(sum(kept.values()), int(counter.get_total_flops()))


def blank_batch(teacher: Teacher, count: int) -> Batch:
    """Return a batch of a teacher's shapes without numbers."""
    x = torch.empty(count, *teacher.shape, device=META)
    conditions = {}
    for spec in teacher.signature.inputs:
        if spec.kind not in ("x", "t"):
            length = teacher.text_encoder.length if teacher.text_encoder is not None else 1
            sizes = {BATCH: count, LENGTH: length}
            shape = [
                sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape
            ]
            conditions[spec.name] = torch.empty(
                *(int(size) for size in shape), dtype=getattr(torch, spec.dtype), device=META
            )
    return Batch(x, conditions, dict(conditions) if teacher.null else {})


def plan_text(plan: Mapping[str, Any]) -> str:
    """Return what `describe` made as lines for people."""
    recipe = plan["recipe"]
    training = recipe["training"]
    lines = [
        f"recipe {recipe['name']}: {recipe['method']}, seed {recipe['seed']}, batch {training['batch_size']}"
        f" among {plan['processes']} process(es) in {training['gradient_accumulation']} piece(s) each,"
        f" precision {training['mixed_precision']}",
        "",
        f"{'role':<12}{'parameters':>15}{'trained':>15}  average of",
    ]
    for role in plan["roles"]:
        lines.append(
            f"{role['name']:<12}{role['parameters']:>15,}{role['trained']:>15,}  {role['follows'] or '-'}"
        )
    lines += [
        "",
        f"{'phase':<16}{'iterations':>11}{'samples':>13}{'GiB':>8}{'s/iteration':>13}{'minutes':>9}  writes",
    ]
    for phase in plan["phases"]:
        seconds = phase["seconds_per_iteration"]
        times = ("-", "-")
        if seconds is not None:
            times = (f"{seconds:.3f}", f"{seconds * phase['iterations'] / 60:.1f}")
        lines.append(
            f"{phase['name']:<16}{phase['iterations']:>11,}{phase['samples']:>13,}"
            f"{phase['device_bytes'] / 2**30:>8.2f}{times[0]:>13}{times[1]:>9}  {phase['emits'] or '-'}"
        )
        for update in phase["updates"]:
            repeated = f" x {update['unroll']}" if update["unroll"] > 1 else ""
            lines.append(
                f"  update {update['name']}: steps {', '.join(update['steps'])}{repeated} every {update['every']},"
                f" at most {update['forward_flops'] / 1e12:.3g} TFLOP forward"
            )
    lines += [
        "",
        "GiB: weights of all roles, gradients, Adam's moments and activations of one process, all in float32: mixed",
        "precision keeps about half of the activations. Data-parallel copies and the allocator's slack come on top.",
    ]
    return "\n".join(lines)
