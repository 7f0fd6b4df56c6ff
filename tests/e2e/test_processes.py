"""Two processes under `accelerate launch` give the losses and the students of one."""

import json
import os
import subprocess
import sys
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
training: {batch_size: 8, gradient_accumulation: PIECES, log_every: 1, tensorboard: false}
"""
# CTM weighs its losses by their gradients over a piece, and which samples make a piece depends on the processes.
PIECES = {"ctm": 1}
EVERY_RECIPE = """
import sys
from edgedistill.cli import main
sys.exit(max(main(["distill", path, "-o", path + "-2", "--quiet"]) for path in sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of students METHOD-1, made here, and METHOD-2, made by two processes of a launch."""
    root = tmp_path_factory.mktemp("processes")
    for method, settings in RECIPES.items():
        text = f"method: {method}\n{COMMON}{settings}".replace("PIECES", str(PIECES.get(method, 2)))
        optimizer = f"optimizer: {{learning_rate: {RATE}}}"
        (root / method).write_text(text.replace("OPTIMIZER", optimizer))
        distill(Recipe.load(root / method), root / f"{method}-1", quiet=True)
    script = root / "every_recipe.py"
    script.write_text(EVERY_RECIPE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu", str(script), *(str(root / method) for method in RECIPES)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: edgedistill export") == len(RECIPES)
    return root


def flat(weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


# Sums are rounded in another order: 2e-6 of a loss. Adam divides a gradient by its own size, so a bias that a
# normalisation takes out again goes by RATE wherever rounding leads it: 3e-4 of a small student's weights.
@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_two_processes_give_the_losses_of_one(trained: Path, method: str) -> None:
    one, two = trained / f"{method}-1", trained / f"{method}-2"
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
