"""Every method stopped in the middle of every phase: all that it saves is what a run that was never stopped saves."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from edgedistill.methods.plan import Phase, Plan
from edgedistill.training.checkpoint import CheckpointFolder, Position, Snapshot
from edgedistill.training.logs import Unwatched
from edgedistill.training.prepare import prepare
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import start, train

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted([*EXAMPLES.glob("digits_*.yaml"), EXAMPLES / "captioned_msd.yaml"])


class StoppingAt(Unwatched):
    """A watcher that ends the run after an iteration, before its checkpoint."""

    def __init__(self, place: Position) -> None:
        self._place = place

    def step(self, phase: Phase, position: Position, losses: Mapping[str, float]) -> None:  # noqa: ARG002
        if position == self._place:
            raise KeyboardInterrupt


def fingerprints(snapshot: Snapshot) -> dict[str, str]:
    """Return the digest of every tensor of a checkpoint, and its numbers."""
    tensors = {name: value.numpy().tobytes() for name, value in snapshot.tensors.items()}
    made = {name: hashlib.sha256(value).hexdigest() for name, value in tensors.items()}
    return {**made, "scalars": repr(snapshot.scalars)}


def students(folder: Path) -> dict[str, bytes]:
    """Return the weights of all that a run leaves behind."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_run_that_was_stopped_in_every_phase_saves_the_same_bits(
    path: Path,
    short: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = short(path, "training.checkpoint_every=1")
    saved: dict[str, dict[Position, dict[str, str]]] = {"whole": {}, "pieces": {}}
    save = CheckpointFolder.save

    def note(folder: CheckpointFolder, snapshot: Snapshot) -> None:
        saved[folder.root.parent.name][snapshot.position] = fingerprints(snapshot)
        save(folder, snapshot)

    def run(name: str, watcher: Unwatched) -> Plan:
        prepared = prepare(recipe)
        train(prepared, tmp_path / name, watcher, start(prepared))
        return prepared.plan

    monkeypatch.setattr(CheckpointFolder, "save", note)
    phases = run("whole", Unwatched()).phases
    for index, phase in enumerate(phases):
        with pytest.raises(KeyboardInterrupt):
            run("pieces", StoppingAt(Position(index, phase.iterations // 2)))
    run("pieces", Unwatched())
    assert len(saved["whole"]) == sum(phase.iterations for phase in phases)
    assert saved["pieces"] == saved["whole"]
    made = {name: students(tmp_path / name / "students") for name in saved}
    assert made["pieces"] == made["whole"]
    assert len(made["whole"]) > 0
