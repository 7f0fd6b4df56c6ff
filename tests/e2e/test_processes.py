"""Two processes under `accelerate launch` give the losses and the students of one, also where FSDP cuts networks up."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgedistill.models.store import WEIGHTS
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill

# Every optimizer step moves the weights by RATE, so that a gradient that is cut or summed wrongly shows.
RATE = 1e-3
RECIPES = {
    "guided": """
guided:
  start_steps: 4
  steps: [2]
  fold: {iterations: 4, weighting: snr_plus_one, OPTIMIZER}
  halve: {iterations: 4, OPTIMIZER}
""",
    "dmd2": """
dmd2:
  labels: [999, 499]
  guidance_scale: 1.5
  student_every: 2
  pairs: {count: 40, steps: 2}
  warm_up: {iterations: 3, OPTIMIZER}
  match: {iterations: 4, OPTIMIZER}
  adversarial: {iterations: 6, student_gan: 0.1, critic_gan: 0.1, regression: 0.1, OPTIMIZER}
""",
    "msd": """
student: {width: 0.5}
msd:
  students: 2
  score: {iterations: 3, features: 0.0, OPTIMIZER}
  dmd2:
    labels: [999]
    student_every: 2
    match: {iterations: 3, OPTIMIZER}
    adversarial: {iterations: 4, student_gan: 0.1, critic_gan: 0.1, OPTIMIZER}
""",
    "ctm": """
ctm:
  grid: {kind: trailing, points: 5, sigma_max: 80}
  solver: dpm
  most_steps: 2
  average: 0.5
  steps: [1, 2]
  consistency: {iterations: 4, OPTIMIZER}
  adversarial: {iterations: 4, critic: pixels, width: 8, OPTIMIZER}
""",
    "sfd": """
sfd:
  stamps: [3, 5]
  inserted: 1
  main: {iterations: 4, OPTIMIZER}
  second: {stamps: 3, inserted: 1, iterations: 4, OPTIMIZER}
""",
}
COMMON = """
name: two
teacher: digits
data: digits
training: {batch_size: 8, gradient_accumulation: PIECES, log_every: 1, checkpoint_every: 2, tensorboard: false}
"""
# CTM weighs its losses by their gradients over a piece, and which samples make a piece depends on the processes.
PIECES = {"ctm": 1}
EVERY_RECIPE = """
import sys
from edgedistill.cli import main
sys.exit(max(main(["distill", path, "-o", path + "-2", "--quiet"]) for path in sys.argv[1:]))
"""
# accelerate takes FSDP for GPUs alone. All below works on CPUs, so it is told of it once it is there.
IN_PIECES = """
import sys
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from edgedistill.cli import main
from edgedistill.training.loop import Trainer

def begin(self, *arguments, **settings):
    init(self, *arguments, **settings)
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP

def save_and_leave(self, position):
    save(self, position)
    if position.iteration:
        self.accelerator.wait_for_everyone()
        sys.exit()

init, Accelerator.__init__ = Accelerator.__init__, begin
leaves, *paths = sys.argv[1:]
if leaves == "leaves":
    save, Trainer._checkpoint = Trainer._checkpoint, save_and_leave
for path in paths:
    if main(["distill", path, "-o", path + "-pieces", "--quiet", "--resume"]):
        sys.exit(f"{path}: not trained")
"""
KINDS = {"2": (EVERY_RECIPE, tuple(RECIPES)), "pieces": (IN_PIECES, ("guided", "dmd2"))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of students METHOD-1, made here."""
    root = tmp_path_factory.mktemp("processes")
    for method, settings in RECIPES.items():
        text = f"method: {method}\n{COMMON}{settings}".replace("PIECES", str(PIECES.get(method, 2)))
        optimizer = f"optimizer: {{learning_rate: {RATE}}}"
        (root / method).write_text(text.replace("OPTIMIZER", optimizer))
        distill(Recipe.load(root / method), root / f"{method}-1", quiet=True)
    return root


@pytest.fixture(scope="module")
def by_two(trained: Path) -> Callable[[str], Path]:
    """Of a kind: the folder of students METHOD-KIND, made by two processes of a launch."""

    @functools.cache
    def launch(kind: str) -> Path:
        script, (text, methods) = trained / f"{kind}.py", KINDS[kind]
        script.write_text(text)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--multi_gpu", str(script)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        paths = [str(trained / method) for method in methods]
        # What is cut up leaves off behind its first checkpoint, and is gone on with.
        turns = [paths] if kind == "2" else [["leaves", paths[0]], ["stays", *paths]]
        for words in turns:
            done = subprocess.run(
                [*command, *words],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("next: edgedistill export") == len(methods)
        return trained

    return launch


def flat(weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


# Sums are rounded in another order: 2e-6 of a loss. Adam divides a gradient by its own size, so a bias that a
# normalisation takes out again goes by RATE wherever rounding leads it: 3e-4 of a small student's weights.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind, (_, methods) in KINDS.items() for method in methods],
)
def test_two_processes_give_the_losses_of_one(
    trained: Path, by_two: Callable[[str], Path], kind: str, method: str
) -> None:
    one, two = trained / f"{method}-1", by_two(kind) / f"{method}-{kind}"
    lines = [(root / "training" / "losses.jsonl").read_text().splitlines() for root in (one, two)]
    records = [[json.loads(line) for line in part] for part in lines]
    assert len(records[0]) == len(records[1]) > 6
    for a, b in zip(*records, strict=True):
        assert a.keys() == b.keys()
        losses = [{k: v for k, v in record.items() if isinstance(v, float)} for record in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    networks = sorted(path.parent.name for path in one.glob(f"*/{WEIGHTS}"))
    assert len(networks) == (2 if method == "msd" else 1)
    for name in networks:
        a, b = (flat(load_file(root / name / WEIGHTS)) for root in (one, two))
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(a), name
