"""Decoding in tiles: diffusers' own arithmetic, whole where one tile is enough, never more than a tile at once."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from edgedistill.bundle import Artifact, NetworkFile
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import ConfigError
from edgedistill.table import Next, Row, SamplerTable, Stage
from edgedistill.tiling import Tiling, decode_tiles, in_tiles, tiled

FACTOR = 2
STAGE = Stage((4, 8, 8), (Row(("unet",), next=Next(x0=1.0)),))


def signature(batch: int | str = "batch", *, free: bool = True) -> Signature:
    small, large = (("h", "w"), ("H", "W")) if free else ((8, 8), (16, 16))
    latents = TensorSpec("latent_sample", (batch, 4, *small), "float32", "latent", "z")
    images = TensorSpec("sample", (batch, 3, *large), "float32", "image", "picture")
    return Signature((latents,), (images,))


class Enlarge:
    """A decoder that sees single pixels, so that tiles of it are the whole; it notes what it is given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        self.shapes.append(latents.shape)
        return latents[:, :3].repeat(FACTOR, 2).repeat(FACTOR, 3)

    def session(self, feeds) -> dict[str, np.ndarray]:
        return {"picture": self(feeds["z"])}


@pytest.fixture(scope="module")
def stock() -> AutoencoderKL:
    torch.manual_seed(0)
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    return AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, **kinds).eval()


@pytest.mark.parametrize(
    ("size", "overlap", "height", "width"),
    [(8, None, 20, 20), (8, None, 9, 23), (4, None, 5, 4), (12, 6, 30, 13), (8, 0, 20, 12)],
)
def test_tiles_are_blended_as_diffusers_blends_them(stock, rng, size, overlap, height, width):
    tiling = Tiling(size, overlap)
    stock.tile_latent_min_size, stock.tile_sample_min_size = size, FACTOR * size
    stock.tile_overlap_factor = tiling.shared / size
    latents = rng.standard_normal((2, 4, height, width)).astype(np.float32)
    with torch.inference_mode():
        wanted = stock.tiled_decode(torch.from_numpy(latents)).sample.numpy()
        got = decode_tiles(
            lambda tile: stock.decode(torch.tensor(tile)).sample.numpy(), latents, tiling
        )
        whole = stock.decode(torch.from_numpy(latents)).sample.numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(got - whole).max() > 1e-2


def test_latents_no_larger_than_a_tile_stay_whole(rng):
    decode = Enlarge()
    latents = rng.standard_normal((2, 4, 8, 5)).astype(np.float32)
    whole = decode_tiles(decode, latents, Tiling(8))
    np.testing.assert_array_equal(whole, Enlarge()(latents))
    assert decode.shapes == [latents.shape]


@pytest.mark.parametrize(("batch", "most"), [("batch", 1), (1, 1), (2, 2)])
def test_no_call_is_larger_than_a_tile(rng, batch, most):
    decode = Enlarge()
    latents = rng.standard_normal((4, 4, 21, 30)).astype(np.float32)
    run = tiled(decode.session, signature(batch), Tiling(8, 3))
    np.testing.assert_allclose(run({"z": latents})["picture"], Enlarge()(latents), atol=1e-6)
    assert max(np.prod(shape) for shape in decode.shapes) == most * 4 * 8 * 8
    assert {shape[0] for shape in decode.shapes} == {most}


@pytest.mark.parametrize("settings", [{"size": 0}, {"size": 8, "overlap": 8}, {"overlap": -1}])
def test_tiles_that_cannot_move_on_are_refused(settings):
    with pytest.raises(ConfigError, match="share fewer than that, got size"):
        Tiling(**settings)


def tables(decoder: str | None) -> dict[str, SamplerTable]:
    return {"default": SamplerTable((STAGE,), 1, decoder=decoder)}


def artifact(format_: str, *, free: bool) -> Artifact:
    files = {"vae_decoder": NetworkFile("vae_decoder/model.onnx", signature(free=free))}
    return Artifact(f"{format_}-float32", format_, format_, "float32", files)


@pytest.mark.parametrize("form", ["onnx", "openvino", "coreml"])
def test_a_graph_of_one_size_is_refused_by_name(form):
    with pytest.raises(ConfigError, match=r"model\.onnx: takes latents of 8x8 alone.*--dynamic"):
        in_tiles(lambda _: {}, artifact(form, free=False), tables("vae_decoder"), Tiling(4))


def test_what_calls_no_decoder_is_refused():
    with pytest.raises(ConfigError, match="'onnx-float32' calls no decoder of latents"):
        in_tiles(lambda _: {}, artifact("onnx", free=True), tables(None), Tiling(4))


def test_pytorch_takes_any_size_and_other_networks_are_left_alone(rng):
    held, decode = artifact("torch", free=False), Enlarge()
    opener = in_tiles(lambda _: decode.session, held, tables("vae_decoder"), Tiling(4))
    other = NetworkFile("unet", signature(free=False))
    assert opener(other) == decode.session
    latents = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    made = opener(held.networks["vae_decoder"])({"z": latents})["picture"]
    np.testing.assert_allclose(made, Enlarge()(latents), atol=1e-6)
    assert len(decode.shapes) == 9
