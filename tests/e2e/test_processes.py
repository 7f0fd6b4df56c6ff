"""Two processes under `accelerate launch` give the losses and the student of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgedistill.models.store import WEIGHTS

RECIPES = {
    "guided": """
guided: {start_steps: 4, steps: [2], fold: {iterations: 4, weighting: snr_plus_one}, halve: {iterations: 4}}
""",
    "dmd2": """
dmd2:
  labels: [999, 499]
  guidance_scale: 1.5
  student_every: 2
  pairs: {count: 40, steps: 2}
  warm_up: {iterations: 3}
  match: {iterations: 4}
  adversarial: {iterations: 6, student_gan: 0.1, critic_gan: 0.1, regression: 0.1}
""",
}
COMMON = """
name: two
teacher: digits
data: digits
training: {batch_size: 8, gradient_accumulation: 2, log_every: 1, tensorboard: false}
"""


def launch(folder: Path, recipe: Path, processes: int) -> Path:
    output = folder / f"{processes}"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    command += ["-m", "edgedistill", "distill", recipe, "-o", output, "--quiet"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: edgedistill export") == 1
    return output


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_two_processes_give_the_losses_of_one(tmp_path: Path, method: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(COMMON + f"method: {method}\n" + RECIPES[method])
    one, two = launch(tmp_path, recipe, 1), launch(tmp_path, recipe, 2)
    lines = [(root / "training" / "losses.jsonl").read_text().splitlines() for root in (one, two)]
    records = [[json.loads(line) for line in part] for part in lines]
    assert len(records[0]) == len(records[1]) > 6
    for a, b in zip(*records, strict=True):
        assert a.keys() == b.keys()
        losses = [{k: v for k, v in record.items() if isinstance(v, float)} for record in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    networks = sorted(path.parent.name for path in one.glob(f"*/{WEIGHTS}"))
    for name in networks:
        weights = [load_file(root / name / WEIGHTS) for root in (one, two)]
        for key, value in weights[0].items():
            np.testing.assert_allclose(value, weights[1][key], rtol=0, atol=1e-4, err_msg=key)
