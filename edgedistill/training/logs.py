"""What a person sees of a run: a bar, losses on disk and in TensorBoard, sample grids."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from edgedistill.errors import require
from edgedistill.images import grid, save_png
from edgedistill.methods.plan import Emission, Phase
from edgedistill.table import SamplerTable
from edgedistill.training.checkpoint import Position

Networks = Mapping[str, nn.Module]
Preview = Callable[[Networks, SamplerTable], np.ndarray]


class Unwatched:
    """Tells nobody anything."""

    def begin(self, phase: Phase, position: Position) -> None:
        """A phase begins."""

    def step(self, phase: Phase, position: Position, losses: Mapping[str, float]) -> None:
        """An iteration is done."""

    def preview(self, student: Emission, position: Position, networks: Networks) -> None:
        """A sample grid is due."""

    def end(self) -> None:
        """The run is over."""


class RunLog:
    """Watches a run: tqdm on stderr, ``losses.jsonl``, TensorBoard events and ``samples/*.png``.

    A resumed run first drops what was logged after its checkpoint, so that no iteration stands twice.

    Args:
        folder: Where files go.
        preview: Draws samples, (batch, channels, height, width) in [-1, 1], from a network and a table.
        tensorboard: Whether to write event files.
        quiet: No bar.
    """

    def __init__(self, folder: Path, preview: Preview, *, tensorboard: bool, quiet: bool) -> None:
        self._folder = folder
        self._preview = preview
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._losses = folder / "losses.jsonl"
        self._writer: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            require("tensorboard", "train")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def begin(self, phase: Phase, position: Position) -> None:
        """Open a bar for the phase."""
        self._drop_after(position)
        self._close_bar()
        self._bar = tqdm(
            total=phase.iterations,
            initial=position.iteration,
            desc=phase.name,
            unit="it",
            disable=self._quiet or None,
            dynamic_ncols=True,
        )

    def step(self, phase: Phase, position: Position, losses: Mapping[str, float]) -> None:
        """Move the bar, and log the losses where there are any."""
        if self._bar is not None:
            self._bar.update(1)
        if not losses:
            return
        record = {"phase": position.phase, "name": phase.name, "iteration": position.iteration}
        with self._losses.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**record, **losses}) + "\n")
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in losses.items()})
        if self._writer is not None:
            for name, value in losses.items():
                self._writer.add_scalar(f"{phase.name}/{name}", value, position.iteration)

    def preview(self, student: Emission, position: Position, networks: Networks) -> None:
        """Write a sample grid."""
        images = self._preview(networks, student.table)
        name = f"{position.phase:02}-{student.name}-{position.iteration:06}.png"
        save_png(grid(images, scale=4), self._folder / "samples" / name)
        if self._writer is not None:
            self._writer.add_images(student.name, images * 0.5 + 0.5, position.iteration)

    def end(self) -> None:
        """Close everything."""
        self._close_bar()
        if self._writer is not None:
            self._writer.close()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _drop_after(self, position: Position) -> None:
        if not self._losses.is_file():
            return
        here = (position.phase, position.iteration)
        kept = []
        for line in self._losses.read_text(encoding="utf-8").splitlines(keepends=True):
            # A killed run may leave half a line at the end.
            record = json.loads(line) if line.endswith("}\n") else None
            if record is not None and (record["phase"], record["iteration"]) <= here:
                kept.append(line)
        self._losses.write_text("".join(kept), encoding="utf-8")
