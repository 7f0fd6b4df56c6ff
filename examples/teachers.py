"""What the scripts that train the packaged teachers share: schedule, loop, and the comparison with the packaged files."""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from edgedistill.files import sha256, write_json

BATCH = 128
PEAK_LR, LAST_LR, WARM_UP = 2e-3, 1e-5, 50
EMA_DECAY = 0.995


def build_scheduler() -> DDIMScheduler:
    """Return the cosine schedule with v-prediction, sampled from the very last timestep on."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def learning_rate(step: int, steps: int) -> float:
    """Rise over `WARM_UP` steps, then fall along a cosine."""
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LAST_LR + (PEAK_LR - LAST_LR) * (1 + math.cos(math.pi * progress)) / 2


def stratified_times(scheduler: DDIMScheduler, draw: torch.Generator) -> Tensor:
    """Return int64 (BATCH,) timesteps, one of each of as many equal parts of the schedule."""
    strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=draw)) / BATCH
    return (strata * scheduler.config.num_train_timesteps).long()


def fit(parameters: Iterable[nn.Parameter], losses: Iterator[Tensor], steps: int) -> None:
    """Train, and leave the averages of the weights in their place.

    Args:
        parameters: Of all that is trained.
        losses: Computes a loss of a new batch whenever it is asked for one.
        steps: Of the optimizer.
    """
    held = list(parameters)
    optimiser = torch.optim.AdamW(held, lr=PEAK_LR, betas=(0.9, 0.99))
    average = EMAModel(held, decay=EMA_DECAY)
    bar = tqdm(range(steps), desc="teacher", disable=None)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = next(losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(held)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    average.copy_to(held)


def write_scheduler(folder: Path) -> None:
    """Write the schedule's file into a teacher's folder."""
    config = {k: v for k, v in build_scheduler().config.items() if not k.startswith("_")}
    write_json(
        folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **config}
    )


def check(made: Path, shipped: Path) -> int:
    """Compare a folder with the packaged one, byte for byte; return the exit status."""
    names = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    different = [str(name) for name in names if sha256(made / name) != sha256(shipped / name)]
    if different:
        print(
            f"Not the packaged bytes: {', '.join(different)}. Another version of torch, diffusers or transformers, "
            f"or another kind of processor, may round differently; this is torch {torch.__version__}."
        )
        return 1
    print(f"The packaged {shipped.name}, byte for byte.")
    return 0


def run(
    about: str,
    steps: int,
    shipped: Path,
    train: Callable[[int, int], Any],
    write: Callable[[Any, Path], None],
    print_figures: Callable[[Path], None],
) -> int:
    """Read the command line; train, then write and measure, or compare; return the exit status.

    Args:
        about: Of the script.
        steps: Unless told otherwise.
        shipped: The packaged folder.
        train: Takes steps and seed, returns what was trained.
        write: Writes that as a folder.
        print_figures: Measures a folder.
    """
    parser = argparse.ArgumentParser(description=about)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-o", "--output", type=Path, help="folder to write")
    what.add_argument("--check", action="store_true", help="compare with the packaged files")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums over several threads may differ in the last bit
    made = train(options.steps, options.seed)
    if options.check:
        with tempfile.TemporaryDirectory() as folder:
            write(made, Path(folder))
            return check(Path(folder), shipped)
    write(made, options.output)
    print_figures(options.output)
    return 0
