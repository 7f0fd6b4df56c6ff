"""Folders of image files: by class, with a list of captions, or with a text beside each image."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.data.dataset import Images, LazyPixels, identity_of
from edgedistill.data.pictures import SUFFIXES, Shape, read_picture
from edgedistill.errors import ConfigError

LISTS = ("metadata.csv", "metadata.jsonl")
CAPTION_KEYS = ("caption", "text", "prompt")
LABEL_KEYS = ("label", "cls")


def read_folder(folder: Path, shape: Shape | None = None) -> Images:
    """Read image files.

    Subfolders in alphabetical order are the classes 0, 1, ... Captions come from ``metadata.csv`` or
    ``metadata.jsonl`` (``file_name`` and ``caption``, ``text`` or ``prompt``, perhaps ``label``), which
    then says which images there are; or from a text file beside each image (``7.png``, ``7.txt``).

    Args:
        folder: The folder.
        shape: As `edgedistill.data.pictures.to_uint8`.

    Raises:
        ConfigError: If there is no image, a class is empty, the images differ in size, or some have
            captions and some not.
    """
    listing = next((folder / name for name in LISTS if (folder / name).is_file()), None)
    if listing is not None:
        rows = _rows(listing)
        files = [_listed(folder, row, listing) for row in rows]
        labels, captions = columns(rows, str(listing))
    else:
        files, labels = _by_class(folder)
        captions = _beside(files)
    pixels = LazyPixels(
        len(files),
        lambda number: read_picture(files[number], str(files[number]), shape),
        lambda number: str(files[number]),
        identity_of(files, shape),
    )
    return Images(pixels, labels, captions)


def columns(
    rows: Sequence[dict[str, Any]], source: str
) -> tuple[np.ndarray | None, list[str] | None]:
    """Return labels and captions of rows of named values.

    Raises:
        ConfigError: If some rows have them and some not, or a label is no whole number.
    """
    labels, captions = (_column(rows, keys, source) for keys in (LABEL_KEYS, CAPTION_KEYS))
    try:
        numbers = None if labels is None else np.array([int(item) for item in labels], np.int64)
    except ValueError as error:
        msg = f"{source}: labels must be whole numbers ({error})."
        raise ConfigError(msg) from error
    return numbers, None if captions is None else [str(item) for item in captions]


def _column(rows: Sequence[dict[str, Any]], keys: Sequence[str], source: str) -> list[Any] | None:
    key = next((key for key in keys if any(key in row for row in rows)), None)
    if key is None:
        return None
    values = [row.get(key) for row in rows]
    if any(value is None for value in values):
        msg = f"{source}: entry {values.index(None)} has no `{key}`, others have."
        raise ConfigError(msg)
    return values


def _by_class(folder: Path) -> tuple[list[Path], np.ndarray | None]:
    classes = sorted(item for item in folder.iterdir() if item.is_dir())
    groups = [_image_files(item) for item in classes or [folder]]
    for place, group in zip(classes or [folder], groups, strict=True):
        if not group:
            msg = f"{place}: holds no image ({', '.join(SUFFIXES)})."
            raise ConfigError(msg)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return [path for group in groups for path in group], labels if classes else None


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _beside(files: Sequence[Path]) -> list[str] | None:
    texts = [path.with_suffix(".txt") for path in files]
    there = [path.is_file() for path in texts]
    if not any(there):
        return None
    if not all(there):
        msg = f"{files[there.index(False)]}: has no caption beside it (.txt), other images have."
        raise ConfigError(msg)
    return [path.read_text(encoding="utf-8").strip() for path in texts]


def _rows(listing: Path) -> list[dict[str, Any]]:
    try:
        with listing.open(encoding="utf-8", newline="") as stream:
            if listing.suffix == ".csv":
                rows: list[Any] = list(csv.DictReader(stream))
            else:
                rows = [json.loads(line) for line in stream if line.strip()]
    except (ValueError, csv.Error) as error:
        msg = f"{listing}: cannot be read ({error})."
        raise ConfigError(msg) from error
    if not rows or not all(isinstance(row, dict) and row.get("file_name") for row in rows):
        msg = f"{listing}: every entry must have a `file_name`, and there must be some."
        raise ConfigError(msg)
    return rows


def _listed(folder: Path, row: dict[str, Any], listing: Path) -> Path:
    path = folder / str(row["file_name"])
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        msg = f"{listing}: names {row['file_name']!r}, which is not there."
        raise ConfigError(msg)
    return path
