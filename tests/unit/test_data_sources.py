"""Captions, shards and saved sets: where labels and sentences come from, and what stays on disk."""

import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedistill.data import Images, open_dataset, sources
from edgedistill.data.captions import NAMES, TEMPLATES, digits_of
from edgedistill.data.dataset import LazyPixels
from edgedistill.errors import ConfigError, MissingDependencyError


def picture(value: int, size: tuple[int, int] = (4, 6), mode: str = "L") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, value).save(stream, "PNG")
    return stream.getvalue()


def fill(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def pack(path: Path, files: Mapping[str, bytes | str], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def levels(data: Images) -> list[float]:
    """Return the 8-bit value of each one-coloured image."""
    return [round((float(image.mean()) + 1) * 127.5) for image in data.images[:]]


def test_every_digit_has_a_sentence_that_names_it() -> None:
    plain = open_dataset("digits")
    for split, count in (("train", 1200), ("test", 597)):
        data = open_dataset("captioned_digits", split)
        assert len(data.captions) == count
        np.testing.assert_array_equal(digits_of(data.captions), data.labels)
    train = open_dataset("captioned_digits")
    np.testing.assert_array_equal(train.images, plain.images)
    assert len(set(train.captions)) == 70
    first = [TEMPLATES["train"][i].format(NAMES[plain.labels[i]]) for i in range(7)]
    assert list(train.captions[:7]) == first


def test_held_out_sentences_are_new_but_their_words_are_not() -> None:
    seen, held_out = (open_dataset("captioned_digits", split).captions for split in TEMPLATES)
    assert not set(seen) & set(held_out)
    assert {word for text in held_out for word in text.split()} <= {
        word for text in seen for word in text.split()
    }


@pytest.mark.parametrize("text", ["a handwritten", "one or two"])
def test_a_caption_that_names_no_digit_or_two_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must name one digit"):
        digits_of(["a zero", text])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,caption,label\nb.png,second,1\nsub/a.png,first,0\n"),
        (
            "metadata.jsonl",
            '{"file_name": "b.png", "text": "second", "label": 1}\n\n'
            '{"file_name": "sub/a.png", "text": "first", "label": 0}\n',
        ),
    ],
)
def test_a_list_says_which_images_there_are_and_what_they_show(
    tmp_path: Path, name: str, content: str
) -> None:
    files = {"sub/a.png": picture(51), "b.png": picture(102), "c.png": picture(0), name: content}
    data = open_dataset(str(fill(tmp_path, files)))
    assert data.captions == ["second", "first"]
    assert data.labels.tolist() == [1, 0]
    assert levels(data) == [102, 51]


def test_texts_beside_images_are_captions_in_class_folders_too(tmp_path: Path) -> None:
    files = {"train/x/1.png": picture(1), "train/x/1.txt": " one \n"}
    files |= {"train/y/2.png": picture(2), "train/y/2.txt": "two"}
    data = open_dataset(str(fill(tmp_path, files)))
    assert (data.captions, data.labels.tolist(), levels(data)) == (["one", "two"], [0, 1], [1, 2])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": picture(1), "a.txt": "one", "b.png": picture(2)}, r"b\.png: has no caption"),
        ({"metadata.csv": "file_name,text\n../a.png,no\n"}, r"names '\.\./a\.png', which is not"),
        ({"metadata.csv": "image,text\na.png,no\n"}, "every entry must have a `file_name`"),
        ({"metadata.jsonl": "{"}, r"metadata\.jsonl: cannot be read"),
        (
            {
                "metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png"}',
                "a.png": picture(1),
            },
            "entry 1 has no `text`",
        ),
        (
            {"metadata.csv": "file_name,label\na.png,cat\n", "a.png": picture(1)},
            "labels must be whole numbers",
        ),
    ],
)
def test_folders_that_contradict_themselves_are_refused(
    tmp_path: Path, files: dict[str, bytes | str], message: str
) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    folder = fill(tmp_path / "set", files)
    with pytest.raises(ConfigError, match=message):
        open_dataset(str(folder))


def test_an_archive_may_hold_captions(tmp_path: Path) -> None:
    images = np.zeros((2, 1, 1, 1), np.uint8)
    np.savez(tmp_path / "two.npz", images=images, captions=np.array(["one", "three"]))
    assert open_dataset(str(tmp_path / "two.npz")).captions == ["one", "three"]
    np.savez(tmp_path / "odd.npz", images=images, captions=np.array(["one"]))
    with pytest.raises(ConfigError, match="2 images have 1 captions"):
        open_dataset(str(tmp_path / "odd.npz"))


def make_shards(folder: Path) -> Path:
    first = {"0.png": picture(10), "0.txt": "ten", "0.cls": "1"}
    first |= {"readme": "no sample", "1.cls": "0", "1.png": picture(20), "1.txt": "twenty"}
    second = {"x/0.v2.json": "{}", "x/0.json": json.dumps({"caption": "thirty", "label": 2})}
    second |= {"x/0.jpg": picture(30)}
    folder.mkdir()
    pack(folder / "part-0.tar", first)
    pack(folder / "part-1.tar", second)
    return folder


def test_shards_are_one_set_whose_images_stay_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    data = open_dataset(str(make_shards(tmp_path / "shards")))
    assert isinstance(data.images, LazyPixels)
    assert (data.captions, data.labels.tolist()) == (["ten", "twenty", "thirty"], [1, 0, 2])
    assert (data.images.shape, len(data)) == ((3, 1, 6, 4), 3)
    chosen = data.images[np.array([2, 0])]
    assert (chosen.dtype, chosen.shape) == (np.float32, (2, 1, 6, 4))
    assert [round((float(image[0, 0, 0]) + 1) * 127.5) for image in chosen] == [30, 10]
    assert data.images[1].shape == (1, 6, 4)
    assert data.images[:0].shape == (0, 1, 6, 4)
    np.testing.assert_array_equal(np.asarray(data.images)[[2, 0]], chosen)
    (one,) = levels(open_dataset(str(tmp_path / "shards" / "part-1.tar")))
    assert one == 30


def test_a_small_set_is_read_at_once(tmp_path: Path) -> None:
    data = open_dataset(str(make_shards(tmp_path / "shards")))
    assert isinstance(data.images, np.ndarray)
    assert levels(data) == [10, 20, 30]


def test_images_of_a_large_set_are_checked_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    files = {"0.png": picture(1), "1.png": picture(2, size=(5, 5)), "2.png": b"no image"}
    pack(tmp_path / "odd.tar", files)
    images = open_dataset(str(tmp_path / "odd.tar")).images
    with pytest.raises(
        ConfigError, match=r"odd\.tar:1: is \(5, 5, 1\), but .*odd\.tar:0 is \(6, 4, 1\)"
    ):
        images[:2]
    with pytest.raises(ConfigError, match=r"odd\.tar:2: cannot be read as an image"):
        images[2]


def test_tar_files_that_hold_no_samples_are_refused(tmp_path: Path) -> None:
    pack(tmp_path / "zipped.tar", {"0.png": picture(1)}, mode="w:gz")
    with pytest.raises(ConfigError, match=r"zipped\.tar: cannot be read as an uncompressed tar"):
        open_dataset(str(tmp_path / "zipped.tar"))
    pack(tmp_path / "empty.tar", {"0.txt": "no image"})
    with pytest.raises(ConfigError, match=r"empty\.tar: holds no image"):
        open_dataset(str(tmp_path / "empty.tar"))
    pack(tmp_path / "half.tar", {"0.png": picture(1), "0.txt": "x", "1.png": picture(2)})
    with pytest.raises(ConfigError, match=r"half\.tar: entry 1 has no `caption`"):
        open_dataset(str(tmp_path / "half.tar"))


def test_images_are_brought_to_a_wanted_shape_by_their_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = (200, 100, 50)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide[:4, 6:10]).save(tmp_path / "small.png")
    data = open_dataset(str(tmp_path), shape=(3, 4, 4))
    assert data.images.shape == (2, 3, 4, 4)
    expected = np.array([200, 100, 50], np.float32) / 127.5 - 1
    whole = np.broadcast_to(expected[:, None, None], (2, 3, 4, 4))
    np.testing.assert_allclose(data.images, whole, atol=0.1)  # resizing sees a little of the black
    grey = open_dataset(str(tmp_path), shape=(1, 8, 4))
    assert grey.images.shape == (2, 1, 8, 4)


def test_what_datasets_saved_needs_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"edgedistill\[data\]"):
        open_dataset(str(tmp_path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_datasets_saved_is_read_with_labels_and_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    library.disable_progress_bars()
    pictures = [Image.new("L", (4, 6), value) for value in (7, 8, 9)]
    rows = {"picture": pictures, "label": [2, 0, 1], "text": ["a", "b", "c"]}
    table = library.Dataset.from_dict(rows).cast_column("picture", library.Image())
    library.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "set")
    data = open_dataset(str(tmp_path / "set"))
    assert isinstance(data.images, LazyPixels)
    assert (levels(data), data.labels.tolist(), data.captions) == ([7, 8, 9], [2, 0, 1], [*"abc"])
    assert levels(open_dataset(str(tmp_path / "set"), "test")) == [8]
    table.remove_columns("picture").save_to_disk(tmp_path / "blind")
    with pytest.raises(ConfigError, match="no column of images.* label, text"):
        open_dataset(str(tmp_path / "blind"))
