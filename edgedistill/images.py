"""Arrays to pictures: 8-bit images, grids and PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgedistill.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image


def to_uint8(images: np.ndarray, value_range: Sequence[float] = (-1.0, 1.0)) -> np.ndarray:
    """Map (batch, channels, height, width) in `value_range` to rounded 0..255, channels last."""
    low, high = value_range
    scaled = (np.asarray(images, dtype=np.float32) - low) / (high - low)
    return np.rint(scaled.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def to_pil(images: np.ndarray, value_range: Sequence[float] = (-1.0, 1.0)) -> "list[Image]":
    """Return one PIL image per sample: mode L for one channel, RGB for three."""
    from PIL import Image

    return [
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        for image in to_uint8(images, value_range)
    ]


def from_pil(
    image: "Image", channels: int, value_range: Sequence[float] = (-1.0, 1.0)
) -> np.ndarray:
    """Map a PIL image to float32 (channels, height, width) in `value_range`: grey for one channel, else RGB."""
    low, high = value_range
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    planes = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return planes * np.float32(high - low) + np.float32(low)


def grid(
    images: np.ndarray,
    columns: int | None = None,
    value_range: Sequence[float] = (-1.0, 1.0),
    scale: int = 1,
    rule: int = 96,
) -> "Image":
    """Lay samples out in rows with one pixel between them.

    Args:
        images: (batch, channels, height, width).
        columns: Samples per row; None: as square as it gets.
        value_range: Black and white.
        scale: Whole factor by which each pixel is repeated.
        rule: Grey, 0 to 255, of the lines between the samples.
    """
    from PIL import Image

    pixels = to_uint8(images, value_range).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), rule, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = 1 + index // columns * (height + 1), 1 + index % columns * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def png_bytes(image: "Image") -> bytes:
    """Return an image as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def save_png(image: "Image", path: Path) -> None:
    """Write a PNG; the file appears whole or not at all."""
    write_bytes(path, png_bytes(image))
