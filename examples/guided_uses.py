"""What a folded student of the digits does besides drawing: encode, transfer style, edit, draw parts anew.

python examples/guided_uses.py -o guided-uses [--docs docs/guidance.md]

Trains an encoder and a decoder first, if FOLDER does not hold them; some minutes on two cores.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import edgedistill
from documents import listed, machine, paragraphs, put, table
from edgedistill.data import load_digits
from edgedistill.environment import versions
from edgedistill.evaluation.report import Evaluator
from edgedistill.pipeline import Pipeline
from edgedistill.student import Student
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill
from export.assemble import export_student

RECIPE = Path(__file__).parent / "digits_guided.yaml"
ENCODERS = ("guided.direction=encode", "guided.default_guidance_scale=1.0", "guided.steps=[32,4]")
DECODERS = ("guided.steps=[4,2]",)
PAIRS = ((32, 4, 1.0), (4, 4, 1.0), (4, 2, 1.0), (4, 4, 1.5))
"""Rows to encode and to decode, and the guidance scale that is encoded with."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
DIGITS = load_digits("test")
IMAGES, LABELS = DIGITS.images, DIGITS.labels
TARGETS = (LABELS + 1) % 10


@dataclass(frozen=True)
class Uses:
    """Opened students by their rows, and what knows digits.

    Fields:
        encoders, decoders: By rows.
        evaluator: Of the digits.
    """

    encoders: dict[int, Pipeline]
    decoders: dict[int, Pipeline]
    evaluator: Evaluator

    def known(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of images that the classifier gives their class."""
        return self.evaluator.report(images, labels).accuracy or 0.0


def opened(folder: Path, sets: Sequence[str], rows: Sequence[int]) -> dict[int, Pipeline]:
    """Open students by their rows; what is not there is trained and exported first."""
    if not folder.exists():
        distill(Recipe.load(RECIPE, sets), folder, quiet=True)
    found = {}
    for count in rows:
        earlier = folder / f"{count}-step"  # the last student is the folder itself
        student = Student.open(earlier if earlier.is_dir() else folder)
        bundle = export_student(student, folder.with_name(f"{folder.name}-{count}-step"), ["onnx"])
        found[count] = edgedistill.load(bundle, "onnxruntime")
    return found


def apart(made: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean squared difference."""
    return float(np.square(made - wanted).mean())


def encodings(uses: Uses) -> Iterator[list[str]]:
    """Yield the lines of the table of encoding: what comes back, and what another class makes of it."""
    for rows, back, scale in PAIRS:
        encode, decode = uses.encoders[rows], uses.decoders[back]
        noise = [encode(class_labels=LABELS, image=IMAGES, guidance_scale=scale).array]
        again = decode(class_labels=LABELS, noise=noise, guidance_scale=scale).array
        styled = decode(class_labels=TARGETS, noise=noise).array
        yield [
            f"{rows}, {back}" + (f", both at guidance scale {scale:g}" if scale != 1 else ""),
            f"{10 * np.log10(4 / apart(again, IMAGES)):.1f} dB",
            f"{uses.known(again, LABELS):.3f}",
            f"{uses.known(styled, TARGETS):.3f}",
            f"{apart(styled, IMAGES):.3f}",
        ]
    fresh = uses.decoders[4](class_labels=TARGETS, seed=0).array
    yield [
        "other noise",
        "",
        "",
        f"{uses.known(fresh, TARGETS):.3f}",
        f"{apart(fresh, IMAGES):.3f}",
    ]


def edits(uses: Uses) -> Iterator[list[str]]:
    """Yield the lines of the table of edits."""
    for strength in STRENGTHS:
        made = uses.decoders[4](class_labels=TARGETS, image=IMAGES, strength=strength).array
        share = uses.known(made, TARGETS)
        yield [f"strength {strength:g}", f"{apart(made, IMAGES):.3f}", f"{share:.3f}"]
    mask = np.zeros_like(IMAGES)
    mask[:, :, 4:] = 1
    made = uses.decoders[4](class_labels=LABELS, image=IMAGES, mask=mask).array
    kept = np.array_equal(made[:, :, :4], IMAGES[:, :, :4])
    share = uses.known(made, LABELS)
    told = "lower half drawn anew, own class" + (", the upper bit for bit" if kept else "")
    yield [told, f"{apart(made, IMAGES):.3f}", f"{share:.3f}"]


def markdown(uses: Uses) -> str:
    """Return the tables, with what they were made with."""
    found = listed(("torch", "onnxruntime"), versions())
    headers = ("rows to encode, decode", "PSNR of held-out digits", "known again")
    more = ("given the next class: known as it", "squared distance to the source")
    return "\n\n".join(
        [
            paragraphs(f"{len(IMAGES)} held-out digits, seed 0; {machine()}; {found}."),
            table((*headers, *more), encodings(uses)),
            table(
                ("edit in 4 rows", "squared distance to the image", "known as asked"), edits(uses)
            ),
        ]
    )


def main() -> int:
    """Train what lacks, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the students")
    parser.add_argument("--docs", type=Path, help="put the tables between this file's markers too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoders = opened(options.output / "encoder", ENCODERS, (32, 4))
    decoders = opened(options.output / "decoder", DECODERS, (4, 2))
    text = markdown(Uses(encoders, decoders, Evaluator.open("digits")))
    print(text)
    if options.docs:
        put(text, options.docs, Path(__file__).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
