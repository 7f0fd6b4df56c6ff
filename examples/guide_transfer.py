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

from edgedistill.data.digits import Images, load_digits
from edgedistill.evaluation.report import Evaluator, QualityReport, fit_classifier
from edgedistill.models import store
from edgedistill.models.replace import replace_network
from edgedistill.models.run import sample_torch
from edgedistill.student import Student
from edgedistill.teacher import Teacher
from train_digits_teacher import losses, write

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
    source = losses(network, data, 0)
    for step in tqdm(range(steps), desc="fine-tuning", disable=None):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / 10) * (1 - step / steps)
        next(source).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return network.eval().requires_grad_(requires_grad=False)


def transfer(
    guide: Student, output: Path, *, degrees: float = 15.0, inverted: bool = False, steps: int = 150
) -> dict[str, tuple[int, QualityReport]]:
    """Fine-tune the digits teacher, plug the guide in, and measure both.

    Args:
        guide: Distilled from the packaged teacher.
        output: Folder for ``teacher``, the fine-tune, and ``student``, the guide on it.
        degrees, inverted: See `changed`.
        steps: Of fine-tuning; 0: none.

    Returns:
        Evaluations and figures by sampler, as `figures`.
    """
    splits = [load_digits("train"), load_digits("test")]
    if steps:
        splits = [changed(data, degrees, inverted=inverted) for data in splits]
    train, held_out = splits
    write(fine_tune(Teacher.open("digits").network, train, steps), output / "teacher")
    student = replace_network(guide, "unet", output / "teacher" / "unet", output / "student")
    evaluator = Evaluator(train, held_out, classifier=fit_classifier(train))
    return figures(Teacher.open(output / "teacher"), student, evaluator)


def figures(
    teacher: Teacher, student: Student, evaluator: Evaluator
) -> dict[str, tuple[int, QualityReport]]:
    """Sample with two passes, with one, and with one and the guide, from the same noise.

    Returns:
        Evaluations of the base and figures by sampler, the first of them the guided many-step teacher, which
        the errors are measured to.
    """
    rows = student.table.nfe
    plain = {"unet": teacher.network}
    guided = {name: store.load(student.folder(name)) for name in student.signatures}
    samplers = {
        f"guided teacher, {TEACHER_STEPS} rows": (plain, teacher.table(TEACHER_STEPS, G)),
        f"guided teacher, {rows} rows": (plain, teacher.table(rows, G)),
        f"no guidance, {rows} rows": (plain, teacher.table(rows, 1.0)),
        f"guide, {rows} rows": (guided, student.table),
    }
    made = {
        name: sample_torch(modules, table, COUNT, guidance_scale=G if modules is guided else None)
        for name, (modules, table) in samplers.items()
    }
    best, labels = next(iter(made.values())), np.arange(COUNT) % 10
    return {
        name: (samplers[name][1].nfe, evaluator.report(samples, labels, best))
        for name, samples in made.items()
    }


def main() -> int:
    """Fine-tune, plug in, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("student", type=Path, help="a guide, distilled from the packaged teacher")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--degrees", type=float, default=15.0, help="turn the digits (default 15)")
    parser.add_argument("--inverted", action="store_true", help="swap black and white instead")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = transfer(
        Student.open(options.student),
        options.output,
        degrees=options.degrees,
        inverted=options.inverted,
        steps=options.steps,
    )
    _, best = next(iter(found.values()))
    print(f"{'':26}  evaluations  Frechet  / guided  error to guided  accuracy")
    for name, (nfe, report) in found.items():
        print(
            f"{name:26} {nfe:12} {report.frechet:8.3f} {report.frechet / best.frechet:9.3f} "
            f"{report.mse_to_reference:16.5f} {report.accuracy:9.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
