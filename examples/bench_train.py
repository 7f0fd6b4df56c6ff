"""A training step through the trainer beside the same step written by hand in plain PyTorch.

python examples/bench_train.py [--steps 40] [--rounds 5] [--json]

The step is stage 1 of guided distillation on the packaged teacher: three passes, a loss, a clipped Adam step. Both
run in turns, a round of each, in one process; the ratio of the medians over the rounds is printed. Exit status 1
above 1.05.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedistill.data import load_digits
from edgedistill.models.extend import extend
from edgedistill.models.inputs import Inputs
from edgedistill.teacher import Teacher
from edgedistill.training.logs import Unwatched
from edgedistill.training.prepare import prepare
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import start, train

RECIPE = Path(__file__).parent / "digits_guided.yaml"
BATCH, RATE, LIMIT = 64, 2e-3, 1.05


class Clock(Unwatched):
    """Takes the time between the first and the last iteration."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self, *_: Any) -> None:
        """Note when an iteration ended."""
        self.times.append(time.perf_counter())


def by_trainer(steps: int) -> float:
    """Return seconds per step of the trainer."""
    changes = [f"guided.fold.iterations={steps + 1}", "guided.start_steps=4", "guided.steps=[4]"]
    changes += [f"training.batch_size={BATCH}", "training.preview_every=0"]
    prepared = prepare(Recipe.load(RECIPE, changes))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        train(prepared, Path(folder), clock, start(prepared))
    return (clock.times[-1] - clock.times[0]) / steps


def by_hand(steps: int) -> float:
    """Return seconds per step of a plain loop."""
    teacher = Teacher.open("digits")
    student = extend(teacher.network, Inputs({"w": 1000.0})).requires_grad_(requires_grad=True)
    alphas, sigmas = _schedule()
    digits = load_digits("train")
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels).int()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0)
    network: nn.Module = copy.deepcopy(teacher.network)
    begun = 0.0
    for step in range(steps + 1):
        if step == 1:
            begun = time.perf_counter()
        chosen = torch.randint(0, len(images), (BATCH,))
        t = torch.randint(0, len(alphas), (BATCH,))
        w = torch.rand(BATCH)
        x, classes = images[chosen], labels[chosen]
        alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
        z = alpha * x + sigma * torch.randn_like(x)
        with torch.no_grad():
            guided = network(z, t, classes).sample
            free = network(z, t, torch.full_like(classes, 10)).sample
        scale = w[:, None, None, None]
        wanted = (1 + scale) * guided - scale * free
        loss = (student(z, t, classes, w=w) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return (time.perf_counter() - begun) / steps


def _schedule() -> tuple[Tensor, Tensor]:
    from diffusers import DDIMScheduler

    squares = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    return squares.sqrt(), (1 - squares).sqrt()


def main() -> int:
    """Measure, print, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    hand, trainer = [], []
    for _ in range(options.rounds):
        hand.append(by_hand(options.steps))
        trainer.append(by_trainer(options.steps))
    ratio = statistics.median(b / a for a, b in zip(hand, trainer, strict=True))
    record = {
        "by_hand_ms": 1000 * statistics.median(hand),
        "trainer_ms": 1000 * statistics.median(trainer),
        "ratio": ratio,
        "limit": LIMIT,
        "ok": ratio <= LIMIT,
    }
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        print(
            f"by hand {record['by_hand_ms']:.1f} ms, trainer {record['trainer_ms']:.1f} ms per step: "
            f"{ratio:.3f}x (at most {LIMIT}x)"
        )
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
