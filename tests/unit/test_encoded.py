"""Training data as networks see it: made once, kept by fingerprint, drawn in an order of the seed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from edgedistill.data import Images, open_dataset
from edgedistill.data.captions import digits_of
from edgedistill.errors import ConfigError
from edgedistill.teacher import Teacher
from edgedistill.training import encoded
from edgedistill.training.draw import EpochOrder, Slice
from edgedistill.training.encoded import encode

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reader() -> Teacher:
    """The packaged teacher that reads prompts."""
    return Teacher.open("captioned_digits")


@pytest.fixture(scope="module")
def latent(reader: Teacher) -> Teacher:
    """A teacher that reads prompts and works on latents of 16x16 images."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.5,
    )
    return dataclasses.replace(reader, vae=vae.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def pictures() -> Images:
    images = np.random.default_rng(0).uniform(-1, 1, (23, 1, 16, 16)).astype(np.float32)
    captions = [("a handwritten one", "the digit two", "")[i % 3] for i in range(23)]
    return Images(images, np.arange(23) % 4, captions)


def test_pixels_and_classes_come_in_the_order_of_the_seed() -> None:
    digits, teacher = open_dataset("digits"), Teacher.open("digits")
    data = encode(digits, teacher, seed=3)
    assert len(data) == 1200
    batch = data.batch(1195, Slice(8, 0, 8), CPU)  # over the border of an epoch
    chosen = EpochOrder(3, 1200).indices(1195, 8).numpy()
    np.testing.assert_array_equal(batch.x.numpy(), digits.images[chosen])
    assert batch.conditions["class_labels"].tolist() == digits.labels[chosen].tolist()
    assert batch.null["class_labels"].tolist() == [10] * 8
    assert batch.conditions["class_labels"].dtype == batch.null["class_labels"].dtype == torch.int32
    other = encode(digits, teacher, seed=4).first(8)
    assert not torch.equal(other.x, data.first(8).x)


def test_the_parts_of_a_batch_are_the_batch(reader: Teacher) -> None:
    data = encode(open_dataset("captioned_digits"), reader, seed=0)
    whole = data.batch(32, Slice(8, 0, 8), CPU)
    parts = [data.batch(32, Slice(8, start, start + 4), CPU) for start in (0, 4)]
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    for name, value in whole.conditions.items():
        assert torch.equal(torch.cat([part.conditions[name] for part in parts]), value)


def test_captions_are_embedded_as_the_teacher_does_it(reader: Teacher) -> None:
    captioned = open_dataset("captioned_digits")
    batch = encode(captioned, reader, seed=1).first(6)
    chosen = EpochOrder(1, 1200).indices(0, 6).tolist()
    expected, null = reader.embed([captioned.captions[i] for i in chosen]), reader.embed([""] * 6)
    assert set(batch.conditions) == set(batch.null) == {"encoder_hidden_states", "pooled"}
    for name in batch.conditions:
        np.testing.assert_allclose(batch.conditions[name], expected[name], atol=1e-5)
        np.testing.assert_allclose(batch.null[name], null[name], atol=1e-5)
    np.testing.assert_array_equal(batch.x.numpy(), captioned.images[chosen])


@pytest.mark.parametrize("piece", [5, 4096])
def test_latents_are_scaled_whatever_the_pieces(
    latent: Teacher, pictures: Images, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "PIECE", piece)
    with torch.no_grad():
        expected = latent.vae.encode(torch.from_numpy(pictures.images)).latents * 0.5
    chosen = EpochOrder(0, 23).indices(0, 23)
    for cache in (None, tmp_path):
        batch = encode(pictures, latent, seed=0, cache=cache).first(23)
        torch.testing.assert_close(batch.x, expected[chosen], rtol=0, atol=1e-5)
        texts = latent.embed([pictures.captions[i] for i in chosen])
        np.testing.assert_allclose(batch.conditions["pooled"], texts["pooled"], atol=1e-5)
    names = sorted(path.name for path in tmp_path.glob("latents-*/*"))
    assert names == [f"{number:05}.safetensors" for number in range(-(-23 // piece))]


def test_what_was_encoded_once_is_not_encoded_again(
    latent: Teacher, pictures: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(pictures, latent, seed=0, cache=tmp_path).first(9)

    def fail(*_: object) -> None:
        msg = "encoded again"
        raise RuntimeError(msg)

    monkeypatch.setattr(Teacher, "encode", fail)
    again = encode(pictures, latent, seed=0, cache=tmp_path).first(9)
    assert torch.equal(again.x, first.x)
    assert torch.equal(again.conditions["pooled"], first.conditions["pooled"])
    darker = dataclasses.replace(pictures, images=pictures.images * np.float32(0.5))
    with pytest.raises(RuntimeError, match="encoded again"):
        encode(darker, latent, seed=0, cache=tmp_path)
    other = dataclasses.replace(latent, fingerprint="other")
    with pytest.raises(RuntimeError, match="encoded again"):
        encode(pictures, other, seed=0, cache=tmp_path)


def test_a_failure_half_way_leaves_nothing_behind(
    latent: Teacher, pictures: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "PIECE", 5)
    whole, calls = Teacher.encode, []

    def fail_at_third(self: Teacher, images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(Teacher, "encode", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        encode(pictures, latent, seed=0, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert encode(pictures, latent, seed=0, cache=tmp_path).first(2).x.shape == (2, 1, 8, 8)


def test_subsets_part_the_data_by_class_or_by_text(
    reader: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "_ASKED_AT_ONCE", 500)
    digits = encode(open_dataset("digits"), Teacher.open("digits"), seed=0)
    low = digits.subset(lambda given: given["class_labels"] < 3)
    high = digits.subset(lambda given: given["class_labels"] >= 3)
    assert len(low) + len(high) == 1200
    assert set(low.first(len(low)).conditions["class_labels"].tolist()) == {0, 1, 2}

    captioned = open_dataset("captioned_digits")
    three = reader.embed(["a handwritten three"])["pooled"]
    data = encode(captioned, reader, seed=0)
    near = data.subset(lambda given: np.abs(given["pooled"] - three).max(1) < 1e-5)
    wanted = [i for i, text in enumerate(captioned.captions) if text == "a handwritten three"]
    made = near.first(len(near)).x.numpy()
    assert len(near) == len(wanted) > 5
    assert {x.tobytes() for x in made} == {captioned.images[i].tobytes() for i in wanted}
    assert set(digits_of([captioned.captions[i] for i in wanted])) == {3}
    again = near.subset(lambda given: np.arange(len(given["pooled"])) < 2)
    assert len(again) == 2
    with pytest.raises(ConfigError, match="holds no sample"):
        data.subset(lambda given: np.zeros(len(given["pooled"]), bool))


def test_data_that_do_not_fit_are_refused(reader: Teacher, pictures: Images) -> None:
    digits, teacher = open_dataset("digits"), Teacher.open("digits")
    with pytest.raises(ConfigError, match=r"images are \(1, 16, 16\), not \(1, 8, 8\)"):
        encode(pictures, reader, seed=0)
    with pytest.raises(ConfigError, match="it reads prompts, and the images have no captions"):
        encode(digits, reader, seed=0)
    with pytest.raises(ConfigError, match=r"labelled with its classes 0\.\.9"):
        encode(Images(digits.images), teacher, seed=0)
    with pytest.raises(ConfigError, match=r"labelled with its classes 0\.\.9"):
        encode(Images(digits.images, digits.labels + 1), teacher, seed=0)
