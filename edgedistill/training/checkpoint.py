"""Checkpoints: one folder of safetensors and JSON, whole or not there, enough to go on bit for bit."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edgedistill.errors import BundleError, TrainingError
from edgedistill.files import read_json, write_json, written_aside
from edgedistill.models.store import save_weights
from edgedistill.training.sharded import pieces_like, whole

STATE = "state.safetensors"
POSITION = "position.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next iteration to do."""

    phase: int = 0
    iteration: int = 0


@dataclass
class Snapshot:
    """Everything that a run cannot compute again.

    Fields:
        position: The next iteration to do.
        tensors: Flat names to tensors: networks, averages, optimizer moments.
        scalars: Plain numbers that belong to them.
    """

    position: Position
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    def put(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors under a prefix; those that are cut up among processes as a whole."""
        for name, value in whole(tensors).items():
            self.tensors[f"{prefix}/{name}"] = value.detach().cpu().contiguous()

    def get(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under a prefix, by the rest of their names."""
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def put_optimizer(self, prefix: str, optimizer: torch.optim.Optimizer) -> None:
        """Add an optimizer's moments; learning rates are functions of the position and not saved."""
        for index, state in optimizer.state_dict()["state"].items():
            self.put(f"{prefix}/{index}", state)

    def load_optimizer(self, prefix: str, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimizer back its moments."""
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, value in self.get(prefix).items():
            index, key = name.split("/", 1)
            state.setdefault(int(index), {})[key] = pieces_like(value, parameters[int(index)])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


class CheckpointFolder:
    """The checkpoints of one run, of which the newest two are kept.

    Args:
        root: The folder.
        fingerprint: Of the settings; a checkpoint of other settings is refused.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.root = root
        self.fingerprint = fingerprint

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint aside, rename it, and drop all but the newest two.

        Raises:
            TrainingError: If the disk is full or cannot be written.
        """
        try:
            self._write(snapshot)
        except BundleError as error:
            msg = f"{str(error).rstrip('.')}; then go on with --resume."
            raise TrainingError(msg) from error
        for old in list(self._folders())[:-2]:
            shutil.rmtree(old)

    def _write(self, snapshot: Snapshot) -> None:
        position = snapshot.position
        with written_aside(self.root / f"{position.phase:03}-{position.iteration:08}") as folder:
            save_weights(snapshot.tensors, folder / STATE)
            record = {
                "fingerprint": self.fingerprint,
                "phase": position.phase,
                "iteration": position.iteration,
                "scalars": snapshot.scalars,
            }
            write_json(folder / POSITION, record)

    def newest(self) -> Snapshot | None:
        """Return the newest checkpoint, or None where there is none.

        Raises:
            TrainingError: If it was written under other settings, or is damaged.
        """
        folders = list(self._folders())
        if not folders:
            return None
        record = read_json(folders[-1] / POSITION)
        if record["fingerprint"] != self.fingerprint:
            msg = f"{folders[-1]}: belongs to a run with other settings; give those settings again, or start afresh with --overwrite."
            raise TrainingError(msg)
        try:
            tensors = load_file(folders[-1] / STATE)
        except (SafetensorError, FileNotFoundError) as error:
            msg = f"{folders[-1] / STATE}: damaged ({error}); remove {folders[-1].name} to go on from the checkpoint before."
            raise TrainingError(msg) from error
        position = Position(record["phase"], record["iteration"])
        return Snapshot(position, tensors, record["scalars"])

    def _folders(self) -> Iterator[Path]:
        return iter(sorted(p for p in self.root.glob("[0-9]*-[0-9]*") if (p / POSITION).is_file()))
