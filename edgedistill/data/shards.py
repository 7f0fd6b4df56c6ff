"""WebDataset shards: tar files in which the files of one sample lie together under one name.

Plain tar files are read through an index of where each image begins, so that samples can be taken in any
order; labels and captions are read with the index.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from edgedistill.data.dataset import Images, LazyPixels, identity_of
from edgedistill.data.folders import columns
from edgedistill.data.pictures import SUFFIXES, Shape, read_picture
from edgedistill.errors import ConfigError

_TEXTS = {".txt": "caption", ".caption": "caption", ".cls": "label"}


@dataclass
class _Sample:
    """Where the image of one sample lies, and what is said of it."""

    key: str
    shard: Path
    offset: int = -1
    size: int = 0
    row: dict[str, Any] = field(default_factory=dict)


def read_shards(shards: Sequence[Path], shape: Shape | None = None) -> Images:
    """Open tar files as one set; images are decoded when they are asked for.

    Args:
        shards: Uncompressed tar files. A sample is an image with ``.txt`` (caption), ``.cls`` (label) or
            ``.json`` (``caption``, ``text`` or ``prompt``; ``label`` or ``cls``) of the same name up to
            the first dot.
        shape: As `edgedistill.data.pictures.to_uint8`.

    Raises:
        ConfigError: If a file is not such a tar file, there is no image, or some samples have captions
            or labels and some not.
    """
    samples = [sample for shard in shards for sample in _index(shard)]
    source = str(shards[0]) if len(shards) == 1 else f"{shards[0].parent} ({len(shards)} shards)"
    if not samples:
        msg = f"{source}: holds no image ({', '.join(SUFFIXES)})."
        raise ConfigError(msg)
    labels, captions = columns([sample.row for sample in samples], source)

    def name(number: int) -> str:
        return f"{samples[number].shard}:{samples[number].key}"

    def read(number: int) -> Any:
        sample = samples[number]
        with sample.shard.open("rb") as stream:
            stream.seek(sample.offset)
            return read_picture(io.BytesIO(stream.read(sample.size)), name(number), shape)

    pixels = LazyPixels(len(samples), read, name, identity_of(shards, shape))
    return Images(pixels, labels, captions)


def _index(shard: Path) -> list[_Sample]:
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isreg():
                    _add(samples, shard, member, archive)
    except (tarfile.TarError, ValueError, OSError) as error:
        msg = f"{shard}: cannot be read as an uncompressed tar file of samples ({error})."
        raise ConfigError(msg) from error
    return [sample for sample in samples.values() if sample.offset >= 0]


def _add(
    samples: dict[str, _Sample], shard: Path, member: tarfile.TarInfo, archive: tarfile.TarFile
) -> None:
    path = PurePosixPath(member.name)
    stem, _, ending = path.name.partition(".")
    key, suffix = str(path.with_name(stem)) if stem else str(path), f".{ending.lower()}"
    sample = samples.setdefault(key, _Sample(key, shard))
    if suffix in SUFFIXES:
        sample.offset, sample.size = member.offset_data, member.size
    elif suffix in _TEXTS:
        sample.row[_TEXTS[suffix]] = _content(archive, member).read().decode().strip()
    elif suffix == ".json":
        described = json.load(_content(archive, member))
        sample.row = {**(described if isinstance(described, dict) else {}), **sample.row}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    assert stream is not None  # a regular file has contents
    return stream
