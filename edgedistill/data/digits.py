"""The 1797 handwritten digits that come with scikit-learn (UCI optdigits), 8x8 grey."""

import functools

import numpy as np

from edgedistill.data.dataset import Images
from edgedistill.errors import ConfigError, require

TRAIN_SIZE = 1200
SPLITS = ("train", "test")


def load_digits(split: str = "train") -> Images:
    """Return one part of the stratified split 1200 / 597 (``random_state=0``).

    Args:
        split: ``"train"`` or ``"test"``.

    Returns:
        Images float32 (1200 or 597, 1, 8, 8) in [-1, 1] with labels 0..9.

    Raises:
        ConfigError: If the split is another word.
        MissingDependencyError: If scikit-learn is not installed.
    """
    if split not in SPLITS:
        msg = f"The digits have the splits {' and '.join(SPLITS)}, got {split!r}."
        raise ConfigError(msg)
    return _both()[SPLITS.index(split)]


@functools.cache
def _both() -> tuple[Images, Images]:
    datasets = require("sklearn.datasets", "train")
    selection = require("sklearn.model_selection", "train")
    digits = datasets.load_digits()
    pixels = (digits.images[:, None] / 8.0 - 1.0).astype(np.float32)  # 0..16 -> -1..1
    labels = digits.target.astype(np.int64)
    train, test = selection.train_test_split(
        np.arange(len(labels)), train_size=TRAIN_SIZE, stratify=labels, random_state=0
    )
    return Images(pixels[train], labels[train]), Images(pixels[test], labels[test])
