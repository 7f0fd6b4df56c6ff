"""The loop: runs the phases of any plan; no method overrides it."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
from edgedistill.training.memory import checkpoint_blocks
from edgedistill.training.settings import TrainingSettings
from edgedistill.training.sharded import load_whole, shard, whole

State = Mapping[str, Tensor]
Networks = Mapping[str, nn.Module]


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

    def preview(self, student: Emission, position: Position, networks: Networks) -> None:
        """A sample grid is due."""

    def end(self) -> None:
        """The run is over, or broken off."""


@dataclass
class Trainer:
    """Runs a plan.

    Fields:
        plan: Roles and phases.
        data: Batches by position, of everything (``data``) and of the plan's subsets.
        settings: Of the loop.
        seed: Key of all randomness.
        checkpoints: Where snapshots go.
        emit: Writes a student from the (averaged) weights of each of its networks.
        watcher: Told about progress.
        accelerator: Device, precision and processes.
    """

    plan: Plan
    data: Mapping[str, BatchSource]
    settings: TrainingSettings
    seed: int
    checkpoints: CheckpointFolder
    emit: Callable[[Emission, Mapping[str, State]], None]
    watcher: Watcher
    accelerator: Accelerator

    def __post_init__(self) -> None:
        device = self.accelerator.device
        self.roles: dict[str, Role] = {role.name: role for role in self.plan.roles}
        self._modules: dict[str, nn.Module] = {}
        self._plain = {role.name: role.network for role in self.plan.roles}
        for role in self.plan.roles:
            self._modules[role.name] = role.module.to(device).eval()
            if self.settings.gradient_checkpointing:
                checkpoint_blocks(role.network)
            for name, parameter in role.network.named_parameters():
                parameter.requires_grad_(role.is_trained(name))
            if self.accelerator.is_fsdp2:
                shard(self.accelerator, role.network)
            if role.trained:
                self._wrap(role)
        self._followed = dict.fromkeys(self.roles, 0)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._bad_steps = 0

    def _wrap(self, role: Role) -> None:
        """Compile a network and hand it to accelerate; losses then call what came out."""
        network = role.network
        ready: Any = torch.compile(network) if self.settings.compile else network
        prepared = ready if self.accelerator.is_fsdp2 else self.accelerator.prepare_model(ready)
        if isinstance(role.module, Denoiser):
            role.module.network = prepared
        else:
            self._modules[role.name] = prepared

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
            self._followed = dict.fromkeys(self.roles, 0)
            for source, target in phase.copies:
                self._plain[target].load_state_dict(self._plain[source].state_dict())
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
            memos: list[dict[str, Any]] = [{} for _ in range(settings.gradient_accumulation)]
            for update in phase.updates:
                if (iteration - update.offset) % update.every == 0:
                    losses |= self._run_update(phase, (index, iteration), update, memos)
            done = Position(index, iteration + 1)
            due = done.iteration % settings.log_every == 0 or done.iteration == phase.iterations
            self.watcher.step(phase, done, {k: v.item() for k, v in losses.items()} if due else {})
            if settings.preview_every and done.iteration % settings.preview_every == 0:
                self._preview(phase, done)
            if (
                done.iteration % settings.checkpoint_every == 0
                and done.iteration < phase.iterations
            ):
                self._checkpoint(done)
        if phase.emits is not None and self._collects:
            networks = phase.emits.networks
            states = {name: whole(self._plain[r].state_dict()) for name, r in networks.items()}
            if self.accelerator.is_main_process:
                self.emit(phase.emits, states)
        self._checkpoint(Position(index + 1, 0))

    @property
    def _collects(self) -> bool:
        """Whether this process takes part in what the main one writes: pieces come from all."""
        return self.accelerator.is_main_process or self.accelerator.is_fsdp2

    def _preview(self, phase: Phase, position: Position) -> None:
        if phase.preview is not None:
            networks = {name: self._plain[r] for name, r in phase.preview.networks.items()}
            self.watcher.preview(phase.preview, position, networks)

    def _run_update(
        self,
        phase: Phase,
        place: tuple[int, int],
        update: Update,
        memos: Sequence[dict[str, Any]],
    ) -> dict[str, Tensor]:
        optimizer = self._optimizers[update.name]
        index, iteration = place
        rate = update.optimizer.learning_rate * curve(update.optimizer, iteration, phase.iterations)
        for group in optimizer.param_groups:
            group["lr"] = rate
        carries: list[object] = [None] * len(memos)
        terms: dict[str, Tensor] = {}
        for position in range(update.unroll):
            optimizer.zero_grad()
            where = (index, iteration, update.name, position)
            made, done = self._backward(update, where, carries, memos)
            if made and self._healthy(phase, iteration, update, made):
                optimizer.step()
                self._follow(update.roles)
            for name in update.zero_also:
                self._plain[name].zero_grad()
            terms |= made
            if done:
                break
        return {f"{update.name}/{name}": value for name, value in terms.items()}

    @torch.no_grad()
    def _follow(self, stepped: Sequence[str]) -> None:
        """Take the new weights of `stepped` into the averages that follow them."""
        for role in self.plan.roles:
            follow = role.follows
            if follow is None or follow.role not in stepped:
                continue
            count = self._followed[role.name]
            self._followed[role.name] += 1
            rate = min(follow.rate, (1 + count) / (10 + count)) if follow.warmed else follow.rate
            source = self._plain[follow.role].state_dict()
            for name, average in self._plain[role.name].state_dict().items():
                if average.is_floating_point():
                    average.lerp_(source[name], 1 - rate)
                else:
                    average.copy_(source[name])

    def _backward(
        self,
        update: Update,
        where: tuple[int | str, ...],
        carries: list[object],
        memos: Sequence[dict[str, Any]],
    ) -> tuple[dict[str, Tensor], bool]:
        """Accumulate the gradients of one optimizer step; return the means of its terms and whether it ends."""
        pieces = len(memos)
        running = self._samples_before(int(where[0]), int(where[1]))
        device = self.accelerator.device
        sums: dict[str, Tensor] = {}
        done = False
        for piece, memo in enumerate(memos):
            part = self._part(piece)
            batch = self.data[update.source].batch(running, part, device)
            draw = PositionDraw(self.seed, where, part, device)
            step = Step(self._modules, batch, draw, int(where[3]), carries[piece], memo)
            with contextlib.ExitStack() as stack:
                if piece < pieces - 1:
                    for name in update.roles:
                        stack.enter_context(self.accelerator.no_sync(self._callable(name)))
                with self.accelerator.autocast():
                    losses = update.loss(step)
                carries[piece], done = losses.carry, losses.done
                if losses.terms:
                    self.accelerator.backward(_total(losses.terms) / pieces)
            for name, value in losses.terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / pieces
        if self.accelerator.num_processes > 1:
            # Every process must judge the step alike, and people see the loss of the whole batch.
            sums = {name: self.accelerator.reduce(v, "mean") for name, v in sums.items()}
        return sums, done

    def _callable(self, role: str) -> nn.Module:
        module = self._modules[role]
        return module.network if isinstance(module, Denoiser) else module

    def _healthy(
        self, phase: Phase, iteration: int, update: Update, terms: Mapping[str, Tensor]
    ) -> bool:
        """Clip the gradients and say whether the step may be made, by the NaN policy."""
        parameters = [p for name in update.roles for p in self._plain[name].parameters()]
        limit = self.settings.clip_norm or math.inf
        norm = whole({"": self.accelerator.clip_grad_norm_(parameters, limit)})[""]
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

    def _checkpoint(self, position: Position) -> None:
        if not self._collects:
            return
        snapshot = Snapshot(position)
        for role in filter(self.plan.changes, self.plan.roles):
            snapshot.put(f"role/{role.name}", self._plain[role.name].state_dict())
        if position.iteration:
            snapshot.scalars["followed"] = dict(self._followed)
            for name, optimizer in self._optimizers.items():
                snapshot.put_optimizer(f"optimizer/{name}", _inner(optimizer))
        if self.accelerator.is_main_process:
            self.checkpoints.save(snapshot)

    def _restore_networks(self, saved: Snapshot) -> None:
        for role in filter(self.plan.changes, self.plan.roles):
            load_whole(self._plain[role.name], saved.get(f"role/{role.name}"))

    def _restore_progress(self, saved: Snapshot) -> None:
        self._followed = dict(saved.scalars["followed"])
        for name, optimizer in self._optimizers.items():
            saved.load_optimizer(f"optimizer/{name}", _inner(optimizer))


def curve(settings: OptimizerSettings, iteration: int, iterations: int) -> float:
    """Return the factor on the peak learning rate at an iteration of a phase."""
    if iteration < settings.warmup:
        return (iteration + 1) / (settings.warmup + 1)
    done = (iteration - settings.warmup) / max(iterations - settings.warmup, 1)
    if settings.decay == "linear":
        return 1.0 - done
    if settings.decay == "step":
        return 1.0 if done < 0.5 else 0.1
    return 0.5 * (1 + math.cos(math.pi * done)) if settings.decay == "cosine" else 1.0


def _optimizer(settings: OptimizerSettings, networks: Sequence[nn.Module]) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
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
