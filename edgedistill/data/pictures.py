"""One picture from a file, a stream or PIL, as 8-bit numbers of a wanted shape."""

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgedistill.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Shape = tuple[int, int, int]
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow would clip them to 8 bits


def read_picture(source: Path | IO[bytes], name: str, shape: Shape | None = None) -> np.ndarray:
    """Read an image file.

    Args:
        source: Path or stream.
        name: For messages.
        shape: As `to_uint8`.

    Returns:
        8-bit (height, width, channels).

    Raises:
        ConfigError: If it is no image, or holds more than 8 bits per channel.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source) as image:
            return to_uint8(image, name, shape)
    except (UnidentifiedImageError, OSError) as error:
        msg = f"{name}: cannot be read as an image ({error})."
        raise ConfigError(msg) from error


def to_uint8(image: "Image", name: str, shape: Shape | None = None) -> np.ndarray:
    """Turn a PIL image into 8-bit numbers, channels last.

    Args:
        image: Any mode of up to 8 bits per channel; what is not grey becomes RGB.
        name: For messages.
        shape: (channels, height, width) to bring it to: 1 or 3 channels, the middle of it, resized; None:
            as it is.

    Raises:
        ConfigError: If it holds more than 8 bits per channel.
    """
    from PIL import Image, ImageOps

    if image.mode in _WIDE_MODES:
        msg = (
            f"{name}: holds more than 8 bits per channel (mode {image.mode}); convert it to 8 bits."
        )
        raise ConfigError(msg)
    grey = image.mode in ("1", "L") if shape is None else shape[0] == 1
    plain: Any = image.convert("L" if grey else "RGB")
    if shape is not None and plain.size != shape[:0:-1]:
        plain = ImageOps.fit(plain, shape[:0:-1], Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(plain))
