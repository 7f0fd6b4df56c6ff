"""Bits per dimension of images under a teacher, or under a CTM student, along the probability-flow ODE.

edgedistill distill examples/digits_ctm.yaml -o digits-ctm --set ctm.guidance_scale=1.0
python examples/likelihood.py digits-ctm --data digits --split test --levels 17 [--count 100]
python examples/likelihood.py digits --data digits --split test --levels 17     # the teacher, to compare

The model is a student folder, its bundle, or a teacher. It has to be unguided: samples of a guided one do not
follow the density of its denoiser.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from edgedistill.bundle import Bundle
from edgedistill.data import Images, open_dataset
from edgedistill.errors import ConfigError, EdgeDistillError
from edgedistill.evaluation.likelihood import bits_per_dim, log_likelihood
from edgedistill.manifest import MANIFEST as BUNDLE
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.student import MANIFEST, Student
from edgedistill.table import SamplerTable
from edgedistill.teacher import Teacher

BATCH = 50


def open_denoiser(model: str) -> Denoiser:
    """Open a student, the bundle of one, or a teacher, as a denoiser.

    Raises:
        ConfigError: If it is no CTM student without guidance, or works on latents.
    """
    root = Path(model)
    if (root / MANIFEST).is_file():
        student = Student.open(root)
        return _of_table(student.table, store.load(student.folder("unet")), model)
    if (root / BUNDLE).is_file():
        bundle = Bundle.open(root)
        file = bundle.artifact(runtime="torch").networks["unet"]
        return _of_table(bundle.table, store.load(bundle.path(file.path)), model)
    teacher = Teacher.open(model)
    _require_pixels(teacher.space["kind"], model)
    schedule = Schedule.from_config(teacher.scheduler)
    return Denoiser(teacher.network, schedule, PredictionType(teacher.prediction_type))


def _of_table(table: SamplerTable, network: nn.Module, model: str) -> Denoiser:
    method, guidance = table.annotations.get("method"), table.guidance.mode
    if method != "ctm" or guidance != "none":
        msg = (
            f"{model}: a student has a likelihood where it is CTM's, which stays a denoiser at every time, and has no "
            f"guidance; got method {method!r}, guidance {guidance!r}. Train one with --set ctm.guidance_scale=1.0."
        )
        raise ConfigError(msg)
    _require_pixels(table.space["kind"], model)
    schedule = Schedule.from_config(table.annotations["scheduler"])
    return Denoiser(network, schedule, PredictionType(table.annotations["prediction_type"]))


def _require_pixels(space: str, model: str) -> None:
    if space != "pixel":
        msg = f"{model}: works on {space}s, whose density is not that of images; choose a model of pixels."
        raise ConfigError(msg)


def bits_of_images(
    denoiser: Denoiser, data: Images, count: int, levels: int, seed: int = 0
) -> np.ndarray:
    """Return bits per dimension of the first images of a set, float64 (count,).

    Args:
        denoiser: Unguided; of pixels.
        data: Images in [-1, 1] whose numbers have `levels` evenly spread values, the ends among them.
        count: How many images, or all where there are fewer.
        levels: Of a number, such as 256.
        seed: Of the noise that spreads every value over its cell.

    Raises:
        ConfigError: If the network takes something that the data do not tell.
    """
    known = {"x", "t", "s"} | ({"class"} if data.labels is not None else set())
    if unknown := [spec.name for spec in denoiser.signature.inputs if spec.kind not in known]:
        msg = f"The network takes {', '.join(unknown)}, which these data do not tell; choose data with labels, or another model."
        raise ConfigError(msg)
    draw = np.random.default_rng(seed)
    cell = 2 / (levels - 1)
    made = []
    count = min(count, len(data))
    for start in tqdm(range(0, count, BATCH), disable=None):
        part = slice(start, min(start + BATCH, count))
        images = data.images[part]
        x = images + cell * draw.uniform(-0.5, 0.5, images.shape)
        labels = None if data.labels is None else torch.from_numpy(data.labels[part]).int()
        given = {} if labels is None else {"class_labels": labels}
        found = log_likelihood(denoiser, torch.from_numpy(x).float(), given)
        made.append(bits_per_dim(found, x[0].size, levels - 1).numpy())
    return np.concatenate(made)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", help="a CTM student's folder, its bundle, or a teacher")
    parser.add_argument("--data", default="digits", help="a set, .npz or folder (default digits)")
    parser.add_argument("--split", default="test", help="train or test (default)")
    parser.add_argument("--count", type=int, default=100, help="images (default 100)")
    parser.add_argument(
        "--levels", type=int, default=256, help="values of a number (default 256; digits have 17)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.count < 1 or options.levels < 2:
        parser.error("--count must be at least 1, and --levels at least 2")
    torch.set_num_threads(1)
    try:
        denoiser = open_denoiser(options.model)
        data = open_dataset(options.data, options.split)
        bits = bits_of_images(denoiser, data, options.count, options.levels, options.seed)
    except EdgeDistillError as error:
        parser.error(str(error))
    error = bits.std() / len(bits) ** 0.5
    print(f"{bits.mean():.3f} +- {error:.3f} bits per dimension, of {len(bits)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
