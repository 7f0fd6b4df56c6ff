"""Train the packaged teacher from scratch: a class-conditional UNet2DModel on scikit-learn's digits.

About half a minute on one core. The same seed gives the same bytes on the same versions of the packages
and the same kind of processor::

    python examples/train_digits_teacher.py -o my_teacher        # train, write the folder, print figures
    python examples/train_digits_teacher.py --check              # train again, compare with the packaged files
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional

from edgedistill.data import Images, load_digits
from edgedistill.evaluation.report import Evaluator
from edgedistill.models import store
from edgedistill.models.run import sample_torch
from edgedistill.teacher import PACKAGED, Teacher
from teachers import BATCH, build_scheduler, fit, run, stratified_times, write_scheduler

SHIPPED = PACKAGED["digits"]
CLASSES = 10
NULL = CLASSES  # the label that stands for "no class", for classifier-free guidance
LABEL_DROP = 0.12


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


def train(steps: int, seed: int) -> UNet2DModel:
    """Train and return the network with its averaged weights."""
    torch.manual_seed(seed)
    network = build_network().train()
    fit(network.parameters(), losses(network, load_digits(), seed), steps)
    return network.eval()


def losses(network: UNet2DModel, data: Images, seed: int) -> Iterator[Tensor]:
    """Yield the mean squared error in v on random images, noise, classes and stratified times, without end."""
    draw, scheduler = torch.Generator().manual_seed(seed), build_scheduler()
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    while True:
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        x = images[chosen]
        noise = torch.randn(x.shape, generator=draw)
        t = stratified_times(scheduler, draw)
        dropped = torch.rand(BATCH, generator=draw) < LABEL_DROP
        classes = labels[chosen].masked_fill(dropped, NULL)
        z, v = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
        inputs = {"sample": z, "timestep": t, "class_labels": classes}
        yield functional.mse_loss(store.call(network, inputs), v)


def write(network: UNet2DModel, folder: Path) -> None:
    """Write a diffusers folder with weights in half precision."""
    store.save(network, folder / "unet", dtype=torch.float16)
    write_scheduler(folder)


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


if __name__ == "__main__":
    sys.exit(run(__doc__.split("\n", maxsplit=1)[0], 500, SHIPPED, train, write, print_figures))
