"""Sets of images by name, from a file or from a folder."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from edgedistill.data.captions import load_captioned_digits
from edgedistill.data.dataset import Images, LazyPixels, from_uint8
from edgedistill.data.digits import load_digits
from edgedistill.data.folders import read_folder
from edgedistill.data.pictures import Shape
from edgedistill.data.saved import MARK, read_saved
from edgedistill.data.shards import read_shards
from edgedistill.errors import ConfigError

NAMED = {"digits": load_digits, "captioned_digits": load_captioned_digits}
IN_MEMORY = 256 * 2**20
"""Bytes up to which a set is read at once; a larger one stays on disk."""


def open_dataset(name: str, split: str = "train", shape: Shape | None = None) -> Images:
    """Open a set of images by name or path.

    Args:
        name: ``"digits"`` or ``"captioned_digits"``; or an ``.npz`` file with the array ``images``, 8-bit
            (count, height, width, channels) or float32 (count, channels, height, width) in [-1, 1], and
            perhaps ``labels`` and ``captions``; or a folder of image files, by class or with captions
            (see `edgedistill.data.folders.read_folder`); or a ``.tar`` file, or a folder of such (see
            `edgedistill.data.shards.read_shards`); or a folder that `datasets` saved.
        split: ``"train"`` or ``"test"``; where a folder has subfolders of these two names they are used,
            otherwise a file or folder is one whole and only ``"train"`` is there.
        shape: (channels, height, width) to bring image files to: their middle, resized; None: as they are.

    Raises:
        ConfigError: If there is nothing there, the images differ in size, or an array is not as above.
        MissingDependencyError: If a package that the kind of set needs is not installed.
    """
    if name in NAMED:
        return NAMED[name](split)
    path = Path(name)
    if (path / split).is_dir():
        return _settled(_read_any_folder(path / split, shape))
    if split != "train":
        msg = f"{path}: has no split {split!r}; put the images into the subfolders 'train' and 'test'."
        raise ConfigError(msg)
    if path.is_dir():
        return _settled(_read_any_folder(path, shape))
    if path.is_file():
        return _settled(read_shards([path], shape)) if path.suffix == ".tar" else read_npz(path)
    msg = f"{path}: no such file or folder; give 'digits', an .npz or .tar file or a folder of images."
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
            names = ("images", "labels", "captions")
            arrays = {name: archive[name] for name in names if name in archive}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        msg = f"{path}: not an .npz archive of plain arrays ({error})."
        raise ConfigError(msg) from error
    if "images" not in arrays:
        msg = f"{path}: holds no array `images`."
        raise ConfigError(msg)
    images, labels, captions = (arrays.get(name) for name in names)
    assert images is not None
    if images.dtype == np.uint8:
        images = from_uint8(images)
    return Images(
        images,
        None if labels is None else labels.astype(np.int64),
        None if captions is None else [str(text) for text in captions],
    )


def _read_any_folder(folder: Path, shape: Shape | None) -> Images:
    if (folder / MARK).is_file():
        return read_saved(folder, shape)
    if shards := sorted(folder.glob("*.tar")):
        return read_shards(shards, shape)
    return read_folder(folder, shape)


def _settled(data: Images) -> Images:
    """Read a small set at once, so that what is wrong with an image is found now."""
    pixels = data.images
    if not isinstance(pixels, LazyPixels) or pixels.nbytes > IN_MEMORY:
        return data
    return dataclasses.replace(data, images=np.asarray(pixels))
