"""Sets of images by name, from a file or from a folder."""

import zipfile
from pathlib import Path

import numpy as np

from edgedistill.data.captions import load_captioned_digits
from edgedistill.data.dataset import Images, from_uint8
from edgedistill.data.digits import load_digits
from edgedistill.errors import ConfigError

NAMED = {"digits": load_digits, "captioned_digits": load_captioned_digits}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow would clip them to 8 bits


def open_dataset(name: str, split: str = "train") -> Images:
    """Open a set of images by name or path.

    Args:
        name: ``"digits"``; or an ``.npz`` file with the array ``images``, 8-bit (count, height, width,
            channels) or float32 (count, channels, height, width) in [-1, 1], and perhaps ``labels``; or a
            folder of image files; or a folder with one subfolder of image files per class.
        split: ``"train"`` or ``"test"``; where a folder has subfolders of these two names they are used,
            otherwise a file or folder is one whole and only ``"train"`` is there.

    Raises:
        ConfigError: If there is nothing there, the images differ in size, or an array is not as above.
    """
    if name in NAMED:
        return NAMED[name](split)
    path = Path(name)
    if (path / split).is_dir():
        return read_folder(path / split)
    if split != "train":
        msg = f"{path}: has no split {split!r}; put the images into the subfolders 'train' and 'test'."
        raise ConfigError(msg)
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_npz(path)
    msg = f"{path}: no such file or folder; give 'digits', an .npz file or a folder of images."
    raise ConfigError(msg)


def read_npz(path: Path) -> Images:
    """Read a numpy archive as `open_dataset` describes it.

    Raises:
        ConfigError: As `open_dataset`.
    """
    if not zipfile.is_zipfile(path):
        msg = (
            f"{path}: not an .npz archive; make one with numpy.savez(path, images=..., labels=...)."
        )
        raise ConfigError(msg)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("images", "labels") if name in archive}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        msg = f"{path}: not an .npz archive of plain arrays ({error})."
        raise ConfigError(msg) from error
    if "images" not in arrays:
        msg = f"{path}: holds no array `images`."
        raise ConfigError(msg)
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype == np.uint8:
        images = from_uint8(images)
    return Images(images, None if labels is None else labels.astype(np.int64))


def read_folder(folder: Path) -> Images:
    """Read image files; subfolders in alphabetical order are the classes 0, 1, ...

    Raises:
        ConfigError: As `open_dataset`.
    """
    classes = sorted(item for item in folder.iterdir() if item.is_dir())
    groups = [_image_files(item) for item in classes or [folder]]
    files = [path for group in groups for path in group]
    if not files or not all(groups):
        empty = next((str(c) for c, g in zip(classes, groups, strict=False) if not g), str(folder))
        msg = f"{empty}: holds no image ({', '.join(SUFFIXES)})."
        raise ConfigError(msg)
    pixels = [_read_image(path) for path in files]
    for path, image in zip(files, pixels, strict=True):
        if image.shape != pixels[0].shape:
            msg = f"{path}: is {image.shape}, but {files[0]} is {pixels[0].shape} (height, width, channels); all images must agree."
            raise ConfigError(msg)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return Images(from_uint8(np.stack(pixels)), labels if classes else None)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode in _WIDE_MODES:
                msg = f"{path}: holds more than 8 bits per channel (mode {image.mode}); convert it to 8 bits."
                raise ConfigError(msg)
            return np.atleast_3d(
                np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
            )
    except (UnidentifiedImageError, OSError) as error:
        msg = f"{path}: cannot be read as an image ({error})."
        raise ConfigError(msg) from error
