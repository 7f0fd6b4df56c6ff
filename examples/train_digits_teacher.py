"""Train the packaged teacher from scratch: a class-conditional UNet2DModel on scikit-learn's digits.

About half a minute on one core. The same seed gives the same bytes on the same versions of the packages
and the same kind of processor::

    python examples/train_digits_teacher.py -o my_teacher        # train, write the folder, print figures
    python examples/train_digits_teacher.py --check              # train again, compare with the packaged files
"""

import argparse
import itertools
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional
from tqdm import tqdm

from edgedistill.data import Images, load_digits
from edgedistill.evaluation.report import Evaluator
from edgedistill.files import sha256, write_json
from edgedistill.models import store
from edgedistill.models.run import sample_torch
from edgedistill.teacher import PACKAGED, Teacher

SHIPPED = PACKAGED["digits"]
CLASSES = 10
NULL = CLASSES  # the label that stands for "no class", for classifier-free guidance
BATCH = 128
PEAK_LR, LAST_LR, WARM_UP = 2e-3, 1e-5, 50
LABEL_DROP = 0.12
EMA_DECAY = 0.995


def build_network() -> UNet2DModel:
    """Return the untrained network: 160401 parameters."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
        num_class_embeds=CLASSES + 1,
    )


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


def train(data: Images, steps: int, seed: int) -> UNet2DModel:
    """Train and return the network with its averaged weights."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    network, scheduler = build_network().train(), build_scheduler()
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, betas=(0.9, 0.99))
    average = EMAModel(network.parameters(), decay=EMA_DECAY)
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    bar = tqdm(range(steps), desc="teacher", disable=None)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of_batch(network, scheduler, images, labels, draw)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(network.parameters())
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    average.copy_to(network.parameters())
    return network.eval()


def loss_of_batch(
    network: UNet2DModel,
    scheduler: DDIMScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    draw: torch.Generator,
) -> torch.Tensor:
    """Return the mean squared error in v on random images, noise, classes and stratified times."""
    chosen = torch.randint(len(images), (BATCH,), generator=draw)
    x = images[chosen]
    noise = torch.randn(x.shape, generator=draw)
    strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=draw)) / BATCH
    t = (strata * scheduler.config.num_train_timesteps).long()
    dropped = torch.rand(BATCH, generator=draw) < LABEL_DROP
    classes = labels[chosen].masked_fill(dropped, NULL)
    z = scheduler.add_noise(x, noise, t)
    v = scheduler.get_velocity(x, noise, t)
    return functional.mse_loss(
        store.call(network, {"sample": z, "timestep": t, "class_labels": classes}), v
    )


def write(network: UNet2DModel, folder: Path) -> None:
    """Write a diffusers folder with weights in half precision."""
    store.save(network, folder / "unet", dtype=torch.float16)
    config = {k: v for k, v in build_scheduler().config.items() if not k.startswith("_")}
    write_json(
        folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **config}
    )


def check(made: Path) -> int:
    """Compare a folder with the packaged one, byte for byte; return the exit status."""
    names = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    different = [str(name) for name in names if sha256(made / name) != sha256(SHIPPED / name)]
    if different:
        print(
            f"Not the packaged bytes: {', '.join(different)}. Another version of torch or diffusers, or another "
            f"kind of processor, may round differently; this is torch {torch.__version__}."
        )
        return 1
    print("The packaged teacher, byte for byte.")
    return 0


def print_figures(folder: Path) -> None:
    """Measure 1000 samples at several numbers of steps, with and without guidance."""
    teacher, evaluator = Teacher.open(folder), Evaluator.open("digits")
    print("steps    w  Frechet (real v real)  recall  diversity  memorisation  accuracy")
    for steps, w in itertools.product((50, 8, 4, 2, 1), (0.5, 0.0)):
        samples = sample_torch({"unet": teacher.network}, teacher.table(steps, 1 + w), 1000)
        report = evaluator.report(samples, np.arange(1000) % CLASSES)
        print(
            f"{steps:5} {w:4} {report.frechet:8.3f} {report.floor:14.3f} {report.recall:7.3f} "
            f"{report.diversity:10.3f} {report.memorisation:13.3f} {report.accuracy:9.3f}"
        )


def main() -> int:
    """Train, then write and measure, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-o", "--output", type=Path, help="folder to write")
    what.add_argument("--check", action="store_true", help="compare with the packaged files")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums over several threads may differ in the last bit
    network = train(load_digits(), arguments.steps, arguments.seed)
    if arguments.check:
        with tempfile.TemporaryDirectory() as folder:
            write(network, Path(folder))
            return check(Path(folder))
    write(network, arguments.output)
    print_figures(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
