"""The digits with a sentence for each: captions from templates, some of them held out."""

from collections.abc import Sequence

import numpy as np

from edgedistill.data.dataset import Images
from edgedistill.data.digits import load_digits
from edgedistill.errors import ConfigError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = {
    "train": (
        "a handwritten {}",
        "the digit {}",
        "a picture of the number {}",
        "a small grey {}",
        "the number {} written by hand",
        "a scan of the handwritten digit {}",
        "an image of a {}",
    ),
    # Every word of these is in a training template; the sentences are not.
    "test": ("a picture of a handwritten {}", "the digit {} written by hand"),
}


def caption(digit: int, template: int, split: str = "train") -> str:
    """Return the sentence that a template of a split makes of a digit; templates are counted round."""
    templates = TEMPLATES[split]
    return templates[template % len(templates)].format(NAMES[digit])


def load_captioned_digits(split: str = "train") -> Images:
    """Return the digits of one split, image i with template i of that split, counted round.

    Args:
        split: ``"train"``, or ``"test"`` with images and templates that no teacher was trained on.

    Returns:
        `load_digits` with captions.

    Raises:
        ConfigError, MissingDependencyError: As `load_digits`.
    """
    digits = load_digits(split)
    assert digits.labels is not None
    captions = tuple(caption(int(digit), i, split) for i, digit in enumerate(digits.labels))
    return Images(digits.images, digits.labels, captions)


def digits_of(captions: Sequence[str]) -> np.ndarray:
    """Return the digit that each caption names, int64.

    Raises:
        ConfigError: If one names none, or several.
    """
    found = [[d for d, name in enumerate(NAMES) if name in text.split()] for text in captions]
    for text, digits in zip(captions, found, strict=True):
        if len(digits) != 1:
            msg = f"Caption {text!r} must name one digit from {NAMES[0]} to {NAMES[-1]} in words."
            raise ConfigError(msg)
    return np.array([digits[0] for digits in found], np.int64)
