"""Decoding latents tile by tile: the memory of one tile instead of that of the picture."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgedistill.bundle import Artifact, NetworkFile
from edgedistill.contract import Feeds, Signature
from edgedistill.errors import ConfigError
from edgedistill.network import Session
from edgedistill.tables import Tables

Decode = Callable[[np.ndarray], np.ndarray]
Opener = Callable[[NetworkFile], Session]


@dataclass(frozen=True)
class Tiling:
    """How latents are cut, as diffusers' ``vae.enable_tiling()`` does it.

    Normalisation and attention see a tile alone, so that a picture in tiles is a little another one; the larger
    tiles and overlap are, the nearer it is.

    Fields:
        size: Sides of a tile, in pixels of the latent: diffusers' ``tile_latent_min_size``. Latents that are no
            larger stay whole.
        overlap: How many of them neighbours share, blended from one to the other; None: a quarter, as in diffusers.

    Raises:
        ConfigError: If a tile could not move on.
    """

    size: int = 32
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.shared < self.size:
            msg = f"A tile must be at least 1 pixel of the latent large and share fewer than that, got size {self.size} and overlap {self.shared}."
            raise ConfigError(msg)

    @property
    def shared(self) -> int:
        """The overlap in pixels of the latent."""
        return self.size // 4 if self.overlap is None else self.overlap


def in_tiles(opener: Opener, artifact: Artifact, tables: Tables, tiling: Tiling) -> Opener:
    """Return an opener of an artifact's networks whose decoders are called for one tile after another.

    Args:
        opener: Opens one as it is.
        artifact: Of a bundle.
        tables: The bundle's; they name the decoders.
        tiling: How to cut.

    Raises:
        ConfigError: If it has no decoder, or one whose graph takes latents of one size.
    """
    names = {table.decoder for table in tables.values()} & set(artifact.networks)
    decoders = [artifact.networks[name] for name in names if name is not None]
    if not decoders:
        msg = f"Artifact {artifact.name!r} calls no decoder of latents that could be given tiles; leave tiling out."
        raise ConfigError(msg)
    for file in decoders:
        sides = file.signature.inputs[0].shape[2:]
        fixed = any(isinstance(side, int) for side in sides)
        if fixed and artifact.format != "torch":  # which fixes no size
            msg = f"{file.path}: takes latents of {'x'.join(map(str, sides))} alone, and tiles are smaller; export a single root for ONNX Runtime or OpenVINO with --dynamic, or leave tiling out."
            raise ConfigError(msg)

    def open_one(file: NetworkFile) -> Session:
        session = opener(file)
        return tiled(session, file.signature, tiling) if file in decoders else session

    return open_one


def tiled(session: Session, signature: Signature, tiling: Tiling) -> Session:
    """Return a decoder that is called for one tile after another.

    Args:
        session: Takes latents of any height and width.
        signature: Its one input and one output; where it leaves the batch free, samples come one by one.
        tiling: How to cut.
    """
    (given,), (made,) = signature.inputs, signature.outputs

    def decode(latents: np.ndarray) -> np.ndarray:
        return session({given.graph_name: np.ascontiguousarray(latents)})[made.graph_name]

    def run(feeds: Feeds) -> dict[str, np.ndarray]:
        latents = feeds[given.graph_name]
        step = signature.batch or 1
        parts = (latents[start : start + step] for start in range(0, len(latents), step))
        return {made.graph_name: np.concatenate([decode_tiles(decode, z, tiling) for z in parts])}

    return run


def decode_tiles(decode: Decode, latents: np.ndarray, tiling: Tiling) -> np.ndarray:
    """Return the image of latents, made of overlapping tiles (diffusers' `AutoencoderKL.tiled_decode`).

    Args:
        decode: From latents of any size to an image that is larger by a whole factor; the array is the caller's.
        latents: (batch, channels, height, width).
        tiling: How to cut.
    """
    size, stride = tiling.size, tiling.size - tiling.shared
    height, width = latents.shape[2:]
    if max(height, width) <= size:
        return decode(latents)
    rows: list[np.ndarray] = []
    above: list[np.ndarray] = []
    for top in range(0, height, stride):
        row: list[np.ndarray] = []
        for left in range(0, width, stride):
            tile = decode(latents[:, :, top : top + size, left : left + size])
            factor = tile.shape[2] // min(size, height - top)
            if above:
                _blend(above[len(row)], tile, 2, tiling.shared * factor)
            if row:
                _blend(row[-1], tile, 3, tiling.shared * factor)
            row.append(tile)
        kept = stride * factor
        rows.append(np.concatenate([tile[:, :, :kept, :kept] for tile in row], axis=3))
        above = row
    return np.concatenate(rows, axis=2)


def _blend(before: np.ndarray, tile: np.ndarray, axis: int, extent: int) -> None:
    """Let a tile begin as the one before it ends, linearly over so many pixels of an axis."""
    extent = min(extent, before.shape[axis], tile.shape[axis])
    start, end = np.moveaxis(tile, axis, -1)[..., :extent], np.moveaxis(before, axis, -1)
    share = np.arange(extent, dtype=tile.dtype) / max(extent, 1)
    start[...] = end[..., end.shape[-1] - extent :] * (1 - share) + start * share
