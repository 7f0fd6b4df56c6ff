"""A guide on a base that it never saw: fine-tune the digits teacher, plug the same guide in, measure.

edgedistill distill examples/digits_guide.yaml -o digits-guide
python examples/guide_transfer.py digits-guide -o turned [--degrees 15 | --inverted] [--steps 150]

Writes FOLDER/teacher, the fine-tuned teacher, and FOLDER/student, the guided student on it.
"""

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from scipy.ndimage import rotate
from tqdm import tqdm
from train_digits_teacher import build_scheduler, loss_of_batch, write

from edgedistill.data.digits import Images, load_digits
from edgedistill.evaluation.report import Evaluator, fit_classifier
from edgedistill.models import store
from edgedistill.models.replace import replace_network
from edgedistill.models.run import sample_torch
from edgedistill.student import Student
from edgedistill.teacher import Teacher

PEAK_LR = 1e-3
COUNT = 1000
TEACHER_STEPS, G = 50, 1.5


def changed(data: Images, degrees: float, *, inverted: bool) -> Images:
    """Turn every digit about its middle, or swap black and white."""
    if inverted:
        return dataclasses.replace(data, images=-data.images)
    turned = rotate(data.images, degrees, axes=(2, 3), reshape=False, order=1, cval=-1.0)
    return dataclasses.replace(data, images=turned)


def fine_tune(network: UNet2DModel, data: Images, steps: int) -> UNet2DModel:
    """Go on training a copy, as the teacher was trained."""
    network = copy.deepcopy(network).train().requires_grad_(requires_grad=True)
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, betas=(0.9, 0.99))
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    draw = torch.Generator().manual_seed(0)
    for step in tqdm(range(steps), desc="fine-tuning", disable=None):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss_of_batch(network, build_scheduler(), images, labels, draw).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return network.eval().requires_grad_(requires_grad=False)


def print_figures(teacher: Teacher, student: Student, evaluator: Evaluator) -> None:
    """Sample with two passes, with one, and with one and the guide, from the same noise."""
    rows, labels = student.table.nfe, np.arange(COUNT) % 10
    modules = {name: store.load(student.root / name) for name in student.signatures}
    plain = {"unet": teacher.network}
    guided = sample_torch(plain, teacher.table(TEACHER_STEPS, G), COUNT)
    made = {
        f"guided teacher, {TEACHER_STEPS} rows of two passes": guided,
        f"guided teacher, {rows} rows of two passes": sample_torch(
            plain, teacher.table(rows, G), COUNT
        ),
        f"no guidance, {rows} rows": sample_torch(plain, teacher.table(rows, 1.0), COUNT),
        f"guide, {rows} rows": sample_torch(modules, student.table, COUNT, guidance_scale=G),
    }
    best = evaluator.frechet(guided)
    print(f"{'':36}  Frechet  / guided  error to guided  accuracy")
    for name, samples in made.items():
        report = evaluator.report(samples, labels, guided)
        print(
            f"{name:36} {report.frechet:8.3f} {report.frechet / best:9.3f} "
            f"{report.mse_to_reference:16.5f} {report.accuracy:9.3f}"
        )


def main() -> int:
    """Fine-tune, plug in, measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("student", type=Path, help="a guide, distilled from the packaged teacher")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--degrees", type=float, default=15.0, help="turn the digits (default 15)")
    parser.add_argument("--inverted", action="store_true", help="swap black and white instead")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    splits = (load_digits("train"), load_digits("test"))
    if options.steps:
        splits = tuple(changed(x, options.degrees, inverted=options.inverted) for x in splits)
    network = fine_tune(Teacher.open("digits").network, splits[0], options.steps)
    write(network, options.output / "teacher")
    student = replace_network(
        Student.open(options.student),
        "unet",
        options.output / "teacher" / "unet",
        options.output / "student",
    )
    evaluator = Evaluator(*splits, classifier=fit_classifier(splits[0]))
    print_figures(Teacher.open(options.output / "teacher"), student, evaluator)
    return 0


if __name__ == "__main__":
    sys.exit(main())
