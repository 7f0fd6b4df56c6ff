"""The loop: runs the phases of any plan; no method overrides it."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgedistill.errors import TrainingError
from edgedistill.methods.plan import (
    Batch,
    Emission,
    OptimizerSettings,
    Phase,
    Plan,
    Role,
    Step,
    Update,
)
from edgedistill.models.denoiser import Denoiser
from edgedistill.training.checkpoint import CheckpointFolder, Position, Snapshot
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.ema import MovingAverage
from edgedistill.training.settings import TrainingSettings

State = Mapping[str, Tensor]


class BatchSource(Protocol):
    """Data by running position; the same position always gives the same samples."""

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:
        """Return the part of the global batch that begins at sample `start`."""


class Watcher(Protocol):
    """What is told about the progress of a run."""

    def begin(self, phase: Phase, position: Position) -> None:
        """A phase begins, or goes on at a position."""

    def step(self, phase: Phase, position: Position, losses: Mapping[str, float]) -> None:
        """An iteration is done; losses are empty where none are due."""

    def preview(self, phase: Phase, position: Position, network: nn.Module) -> None:
        """A sample grid is due."""

    def end(self) -> None:
        """The run is over, or broken off."""


@dataclass
class Trainer:
    """Runs a plan.

    Fields:
        plan: Roles and phases.
        data: Batches by position.
        settings: Of the loop.
        seed: Key of all randomness.
        checkpoints: Where snapshots go.
        emit: Writes a student from the (averaged) weights of each of its networks.
        watcher: Told about progress.
        accelerator: Device, precision and processes.
    """

    plan: Plan
    data: BatchSource
    settings: TrainingSettings
    seed: int
    checkpoints: CheckpointFolder
    emit: Callable[[Emission, Mapping[str, State]], None]
    watcher: Watcher
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.roles: dict[str, Role] = {role.name: role for role in self.plan.roles}
        self.denoisers: dict[str, Denoiser] = {
            role.name: role.denoiser.to(self.accelerator.device) for role in self.plan.roles
        }
        for role in self.plan.roles:
            role.denoiser.requires_grad_(role.trained).eval()
        self._plain = {name: item.network for name, item in self.denoisers.items()}
        for role in self.plan.roles:
            if role.trained:
                network = self._plain[role.name]
                ready = torch.compile(network) if self.settings.compile else network
                role.denoiser.network = self.accelerator.prepare_model(ready)
        self._averages: dict[str, MovingAverage] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._bad_steps = 0

    def run(self) -> None:
        """Run every phase from the newest checkpoint, or from the start.

        Raises:
            TrainingError: If the checkpoint does not fit, or losses are not finite (see `nan_policy`).
        """
        saved = self.checkpoints.newest()
        position = saved.position if saved is not None else Position()
        try:
            for index in range(position.phase, len(self.plan.phases)):
                phase = self.plan.phases[index]
                first = position.iteration if index == position.phase else 0
                self._enter(phase, fresh=first == 0, saved=saved)
                saved = None
                self.watcher.begin(phase, Position(index, first))
                self._run_phase(phase, index, first)
        finally:
            self.watcher.end()

    def _enter(self, phase: Phase, *, fresh: bool, saved: Snapshot | None) -> None:
        if saved is not None:
            self._restore_networks(saved)
        if fresh:
            for source, target in phase.copies:
                self._plain[target].load_state_dict(self._weights(source))
        self._averages = {
            role.name: MovingAverage(self._plain[role.name], role.ema)
            for role in self.plan.roles
            if role.trained and role.ema is not None
        }
        self._optimizers = {
            update.name: self.accelerator.prepare_optimizer(
                _optimizer(update.optimizer, [self._plain[name] for name in update.roles])
            )
            for update in phase.updates
        }
        if saved is not None and not fresh:
            self._restore_progress(saved)

    def _run_phase(self, phase: Phase, index: int, first: int) -> None:
        settings = self.settings
        for iteration in range(first, phase.iterations):
            losses: dict[str, Tensor] = {}
            for update in phase.updates:
                if (iteration - update.offset) % update.every == 0:
                    losses |= self._run_update(phase, index, iteration, update)
            done = Position(index, iteration + 1)
            due = done.iteration % settings.log_every == 0 or done.iteration == phase.iterations
            self.watcher.step(phase, done, {k: v.item() for k, v in losses.items()} if due else {})
            if settings.preview_every and done.iteration % settings.preview_every == 0:
                self.watcher.preview(phase, done, self._plain["student"])
            if (
                done.iteration % settings.checkpoint_every == 0
                and done.iteration < phase.iterations
            ):
                self._checkpoint(done)
        if phase.emits is not None and self.accelerator.is_main_process:
            networks = phase.emits.networks
            self.emit(phase.emits, {net: self._weights(role) for net, role in networks.items()})
        self._adopt_averages()
        self._checkpoint(Position(index + 1, 0))

    def _run_update(
        self, phase: Phase, index: int, iteration: int, update: Update
    ) -> dict[str, Tensor]:
        optimizer = self._optimizers[update.name]
        rate = update.optimizer.learning_rate * curve(update.optimizer, iteration, phase.iterations)
        for group in optimizer.param_groups:
            group["lr"] = rate
        carries: list[object] = [None] * self.settings.gradient_accumulation
        terms: dict[str, Tensor] = {}
        for position in range(update.unroll):
            optimizer.zero_grad()
            where = (index, iteration, update.name, position)
            terms = self._backward(update, where, carries)
            if self._healthy(phase, iteration, update, terms):
                optimizer.step()
                for name in update.roles:
                    if name in self._averages:
                        self._averages[name].update(self._plain[name])
            for name in update.zero_also:
                self._plain[name].zero_grad()
        return {f"{update.name}/{name}": value for name, value in terms.items()}

    def _backward(
        self, update: Update, where: tuple[int | str, ...], carries: list[object]
    ) -> dict[str, Tensor]:
        """Accumulate the gradients of one optimizer step; return the mean of each loss term."""
        pieces = self.settings.gradient_accumulation
        running = self._samples_before(int(where[0]), int(where[1]))
        sums: dict[str, Tensor] = {}
        for piece in range(pieces):
            part = self._part(piece)
            device = self.accelerator.device
            step = Step(
                self.denoisers,
                self.data.batch(running, part, device),
                PositionDraw(self.seed, where, part, device),
                int(where[3]),
                carries[piece],
            )
            with contextlib.ExitStack() as stack:
                if piece < pieces - 1:
                    for name in update.roles:
                        stack.enter_context(self.accelerator.no_sync(self.denoisers[name].network))
                with self.accelerator.autocast():
                    losses = update.loss(step)
                carries[piece] = losses.carry
                self.accelerator.backward(_total(losses.terms) / pieces)
            for name, value in losses.terms.items():
                sums[name] = (
                    sums.get(name, torch.zeros((), device=device)) + value.detach() / pieces
                )
        return sums

    def _healthy(
        self, phase: Phase, iteration: int, update: Update, terms: Mapping[str, Tensor]
    ) -> bool:
        """Clip the gradients and say whether the step may be made, by the NaN policy."""
        parameters = [p for name in update.roles for p in self._plain[name].parameters()]
        limit = self.settings.clip_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        if bool(torch.isfinite(_total(terms) + norm)):
            self._bad_steps = 0
            return True
        self._bad_steps += 1
        # Under fp16 the gradient scaler makes and skips such steps itself while it finds its scale.
        skip = self.settings.nan_policy == "skip" or self.accelerator.scaler is not None
        if skip and self._bad_steps <= self.settings.nan_limit:
            return self.accelerator.scaler is not None
        shown = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
        msg = (
            f"Phase {phase.name!r}, iteration {iteration}, update {update.name!r}: not finite "
            f"({shown}, gradient norm {norm.item():g}); lower the learning rate, or go on from the "
            "newest checkpoint with training.nan_policy=skip."
        )
        raise TrainingError(msg)

    def _part(self, piece: int) -> Slice:
        accelerator, total = self.accelerator, self.settings.batch_size
        parts = accelerator.num_processes * self.settings.gradient_accumulation
        size = total // parts
        first = (accelerator.process_index * self.settings.gradient_accumulation + piece) * size
        return Slice(total, first, first + size)

    def _samples_before(self, index: int, iteration: int) -> int:
        before = sum(phase.iterations for phase in self.plan.phases[:index])
        return (before + iteration) * self.settings.batch_size

    def _weights(self, role: str) -> State:
        average = self._averages.get(role)
        return average.state if average is not None else self._plain[role].state_dict()

    def _adopt_averages(self) -> None:
        """Go on from the averages: they are what the next phase copies and what was emitted."""
        for name, average in self._averages.items():
            self._plain[name].load_state_dict(average.state)

    def _checkpoint(self, position: Position) -> None:
        if not self.accelerator.is_main_process:
            return
        snapshot = Snapshot(position)
        for role in self.plan.roles:
            if role.saved:
                snapshot.put(f"role/{role.name}", self._plain[role.name].state_dict())
        for name, average in self._averages.items():
            snapshot.put(f"average/{name}", average.state)
            snapshot.scalars[f"average/{name}"] = average.updates
        if position.iteration:
            for name, optimizer in self._optimizers.items():
                snapshot.put_optimizer(f"optimizer/{name}", _inner(optimizer))
        self.checkpoints.save(snapshot)

    def _restore_networks(self, saved: Snapshot) -> None:
        for role in self.plan.roles:
            if role.saved:
                self._plain[role.name].load_state_dict(saved.get(f"role/{role.name}"))

    def _restore_progress(self, saved: Snapshot) -> None:
        for name, average in self._averages.items():
            average.load(saved.get(f"average/{name}"), saved.scalars[f"average/{name}"])
        for name, optimizer in self._optimizers.items():
            saved.load_optimizer(f"optimizer/{name}", _inner(optimizer))


def curve(settings: OptimizerSettings, iteration: int, iterations: int) -> float:
    """Return the factor on the peak learning rate at an iteration of a phase."""
    if iteration < settings.warmup:
        return (iteration + 1) / (settings.warmup + 1)
    done = (iteration - settings.warmup) / max(iterations - settings.warmup, 1)
    if settings.decay == "linear":
        return 1.0 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if settings.decay == "cosine" else 1.0


def _optimizer(settings: OptimizerSettings, networks: Sequence[nn.Module]) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[settings.kind](
        [p for network in networks for p in network.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
    )


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
