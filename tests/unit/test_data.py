"""Digits, archives and folders become checked arrays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedistill.data import Images, load_digits, open_dataset
from edgedistill.errors import ConfigError


def save_images(
    folder: Path, count: int, size: tuple[int, int] = (4, 6), mode: str = "RGB"
) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new(mode, size, index * 51 if mode == "L" else (index * 51, 0, 255)).save(
            folder / f"{index}.png"
        )


def test_digits_are_split_by_class_without_overlap() -> None:
    train, test = load_digits("train"), load_digits("test")
    assert (train.images.shape, test.images.shape) == ((1200, 1, 8, 8), (597, 1, 8, 8))
    assert (train.images.min(), train.images.max()) == (-1, 1)
    shares = [np.bincount(part.labels) / len(part) for part in (train, test)]
    assert np.abs(shares[0] - shares[1]).max() < 0.002
    rows = {part.tobytes() for part in train.images}
    assert not any(image.tobytes() in rows for image in test.images)


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got 'validation'"):
        load_digits("validation")
    save_images(tmp_path / "all", 2)
    with pytest.raises(ConfigError, match="has no split 'test'"):
        open_dataset(str(tmp_path / "all"), "test")


def test_class_subfolders_become_labels_in_alphabetical_order(tmp_path: Path) -> None:
    save_images(tmp_path / "train" / "cat", 2)
    save_images(tmp_path / "train" / "ant", 3)
    images = open_dataset(str(tmp_path))
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.images.shape == (5, 3, 6, 4)
    assert images.images[1, :, 0, 0] == pytest.approx([51 / 127.5 - 1, -1, 1])


def test_a_flat_folder_of_grey_images_has_no_labels(tmp_path: Path) -> None:
    save_images(tmp_path / "grey", 3, mode="L")
    images = open_dataset(str(tmp_path / "grey"))
    assert images.labels is None
    assert images.images[:, 0, 0, 0] == pytest.approx([-1, -0.6, -0.2])


def test_an_archive_of_8_bit_images_is_scaled(tmp_path: Path) -> None:
    pixels = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    np.savez(tmp_path / "two.npz", images=pixels, labels=np.array([3, 4], np.int32))
    images = open_dataset(str(tmp_path / "two.npz"))
    assert images.images.ravel().tolist() == [-1, 1]
    assert (images.labels.dtype, images.labels.tolist()) == (np.int64, [3, 4])


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path / "a", 1)
    save_images(tmp_path / "b", 1, size=(5, 6))
    with pytest.raises(
        ConfigError, match=r"b.0\.png: is \(6, 5, 3\), but .*a.0\.png is \(6, 4, 3\)"
    ):
        open_dataset(str(tmp_path))


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path / "a", 1)
    save_images(tmp_path / "b", 0)
    with pytest.raises(ConfigError, match="b: holds no image"):
        open_dataset(str(tmp_path))


def test_images_that_8_bits_cannot_hold_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ConfigError, match=r"deep\.png: holds more than 8 bits"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.npz", None, "no such file or folder"),
        ("text.npz", b"not an archive", "not an .npz archive"),
        ("pictures/broken.png", b"\x89PNG\r\n\x1a\n", "cannot be read as an image"),
    ],
)
def test_files_that_are_not_what_they_seem_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_dataset(str(path if path.suffix == ".npz" else path.parent))


def test_an_archive_of_pickles_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", images=np.array([{}], object))
    with pytest.raises(ConfigError, match="not an .npz archive of plain arrays"):
        open_dataset(str(tmp_path / "objects.npz"))


def test_an_archive_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "labels.npz", labels=np.arange(3))
    with pytest.raises(ConfigError, match="holds no array `images`"):
        open_dataset(str(tmp_path / "labels.npz"))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8, 8), np.float32), None, r"\(count, channels, height, width\)"),
        (np.zeros((2, 1, 8, 8)), None, "float32 in .-1, 1., got float64"),
        (np.full((2, 1, 8, 8), 255, np.float32), None, "float32 in .-1, 1."),
        (np.full((2, 1, 8, 8), np.nan, np.float32), None, "float32 in .-1, 1."),
        (np.zeros((2, 1, 8, 8), np.float32), np.zeros(3, np.int64), "2 images have"),
        (np.zeros((2, 1, 8, 8), np.float32), np.array([0, -1]), "int64 from 0"),
    ],
)
def test_arrays_that_are_no_images_are_refused(
    images: np.ndarray, labels: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Images(images, labels)
