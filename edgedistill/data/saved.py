"""Sets that the `datasets` package wrote with `save_to_disk`, read through it from its Arrow files."""

from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.data.dataset import Images, LazyPixels, identity_of
from edgedistill.data.folders import CAPTION_KEYS, LABEL_KEYS
from edgedistill.data.pictures import Shape, to_uint8
from edgedistill.errors import ConfigError, require

MARK = "state.json"


def read_saved(folder: Path, shape: Shape | None = None) -> Images:
    """Open a saved `Dataset`; images are decoded when they are asked for.

    Args:
        folder: What `save_to_disk` wrote, one split.
        shape: As `edgedistill.data.pictures.to_uint8`.

    Raises:
        ConfigError: If it has no column of images, or cannot be read.
        MissingDependencyError: If `datasets` is not installed.
    """
    library = require("datasets", "data")
    try:
        table = library.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        msg = f"{folder}: cannot be read as what `datasets` saved ({error})."
        raise ConfigError(msg) from error
    features = table.features
    pictures = [name for name, kind in features.items() if isinstance(kind, library.Image)]
    if not pictures or not len(table):
        msg = (
            f"{folder}: has no column of images, or no rows; its columns are {', '.join(features)}."
        )
        raise ConfigError(msg)
    label, caption = (
        next((key for key in keys if key in features), None) for keys in (LABEL_KEYS, CAPTION_KEYS)
    )

    def name(number: int) -> str:
        return f"{folder}, row {number}"

    images: Any = table.select_columns(pictures[0])

    def read(number: int) -> np.ndarray:
        return to_uint8(images[number][pictures[0]], name(number), shape)

    return Images(
        LazyPixels(len(table), read, name, identity_of(sorted(folder.iterdir()), shape)),
        None if label is None else np.array(table[label][:], np.int64),
        None if caption is None else [str(text) for text in table[caption][:]],
    )
