"""Weights as real folders hold them: in shards, as variants, in caches of links; each gives what the one plain file gives."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from edgedistill.errors import BundleError
from edgedistill.models import store
from edgedistill.models.source import open_network, open_source
from edgedistill.models.variant import open_variant
from edgedistill.student import Student
from edgedistill.weight_files import DIFFUSERS, find_weights, weights_in
from export.assemble import export_student
from export.formats import ExportOptions
from export.layouts import SINGLE_ROOT

# diffusers 0.39 converts tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
INDEX = f"{store.WEIGHTS}.index.json"


def weights(student: Student, name: str) -> dict[str, torch.Tensor]:
    """Return what a network of a student holds."""
    return open_network(student, name).state_dict()


def is_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Say whether names and every bit are the same."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def copy_of(root: Path, place: Path) -> Path:
    """Return a copy of a pipeline without the weights of its UNet and text encoder."""
    shutil.copytree(root, place)
    (place / "unet" / store.WEIGHTS).unlink()
    (place / "text_encoder" / "model.safetensors").unlink()
    return place


@pytest.fixture(scope="module")
def sharded(tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose UNet and text encoder are in shards, as diffusers and transformers write them."""
    source = tiny_pipelines / "sd"
    root = copy_of(source, tmp_path_factory.mktemp("sharded") / "sd")
    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    unet.save_pretrained(root / "unet", max_shard_size="100KB")
    text = CLIPTextModel.from_pretrained(source / "text_encoder")
    text.save_pretrained(root / "text_encoder", max_shard_size="20KB")
    return root


@pytest.fixture(scope="module")
def halves(tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose UNet, in shards, and text encoder are float16, as a variant beside nothing."""
    source = tiny_pipelines / "sd"
    root = copy_of(source, tmp_path_factory.mktemp("halves") / "sd")
    unet = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float16)
    unet.save_pretrained(root / "unet", variant="fp16", max_shard_size="100KB")
    text = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float16)
    text.save_pretrained(root / "text_encoder", variant="fp16")
    return root


def test_shards_are_the_weights_that_one_file_holds(sharded: Path, tiny_pipelines: Path) -> None:
    files = find_weights(sharded / "unet", DIFFUSERS)
    assert len(files.shards) > 2
    assert files.index == sharded / "unet" / INDEX
    student, plain = open_source(sharded), open_source(tiny_pipelines / "sd")
    for name in student.signatures:
        assert is_same(weights(student, name), weights(plain, name))


def test_every_shard_counts_for_the_fingerprint(sharded: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sharded, tmp_path / "sd"))
    before = open_source(root).fingerprint
    assert before == open_source(sharded).fingerprint
    last = weights_in(root / "unet")[-1]
    held = load_file(last)
    held[next(iter(held))] += 1
    save_file(held, last)
    assert open_source(root).fingerprint != before


def _lost(shard: Path) -> None:
    shard.unlink()


def _swapped(shard: Path) -> None:
    other = next(p for p in sorted(shard.parent.glob("*-of-*.safetensors")) if p != shard)
    shutil.copy2(other, shard)


def _cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-8])


def _not_finite(shard: Path) -> None:
    held = load_file(shard)
    held[next(iter(held))].view(-1)[0] = float("nan")
    save_file(held, shard)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lost, "no such file, and .*index.json says that it holds a part"),
        (_swapped, "does not hold what .*index.json says at"),
        (_cut, "not a whole safetensors file"),
        (_not_finite, ".* holds NaN or infinity"),
    ],
)
def test_a_bad_shard_is_named(
    damage: Callable[[Path], None], message: str, sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sharded / "unet", tmp_path / "unet"))
    shard = find_weights(folder, DIFFUSERS).shards[1]
    damage(shard)
    with pytest.raises(BundleError, match=f"{shard.name}: {message}"):
        store.load(folder)


def test_a_variant_is_taken_where_there_is_no_plain_file(
    halves: Path, tiny_pipelines: Path
) -> None:
    student, plain = open_source(halves), open_source(tiny_pipelines / "sd")
    for name in ("unet", "text_encoder"):
        held, whole = weights(student, name), weights(plain, name)
        assert {value.dtype for value in held.values()} == {torch.float32}
        assert is_same(held, {key: value.half().float() for key, value in whole.items()})
        assert not is_same(held, whole)


def test_a_plain_file_comes_first_and_a_variant_where_it_is_asked_for(
    halves: Path, tiny_pipelines: Path, tmp_path: Path
) -> None:
    both = Path(shutil.copytree(halves, tmp_path / "both"))
    shutil.copytree(tiny_pipelines / "sd", both, dirs_exist_ok=True)
    plain = open_source(tiny_pipelines / "sd")
    assert open_source(both).fingerprint == plain.fingerprint
    (tmp_path / "place").mkdir()
    student = open_variant(both, tmp_path / "place", variant="fp16")
    assert (student.name, student.provenance["variant"]) == ("both", "fp16")
    half = open_source(halves)
    for name in student.signatures:
        assert is_same(weights(student, name), weights(half, name))
    (tmp_path / "other").mkdir()
    with pytest.raises(BundleError, match="no network has weights of the variant 'bf16'"):
        open_variant(both, tmp_path / "other", variant="bf16")


def test_a_cache_of_relative_links_is_linked_to_what_they_lead_to(
    tiny_pipelines: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pipelines / "sd", tmp_path / "blobs")
    for path in sorted((tmp_path / "blobs").rglob("*")):
        link = tmp_path / "snapshot" / path.relative_to(tmp_path / "blobs")
        if path.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            ups = "/".join([".."] * len(link.relative_to(tmp_path).parts[1:]))
            link.symlink_to(f"{ups}/blobs/{path.relative_to(tmp_path / 'blobs')}")
    (tmp_path / "place").mkdir()
    student = open_variant(
        tmp_path / "snapshot", tmp_path / "place", vae=tiny_pipelines / "sd" / "vae"
    )
    assert is_same(weights(student, "unet"), weights(open_source(tiny_pipelines / "sd"), "unet"))


@pytest.mark.parametrize("kind", ["sharded", "halves"])
def test_what_is_exported_opens_in_diffusers_without_a_word_of_variants(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    student = open_source(request.getfixturevalue(kind), num_steps=1)
    export_student(student, tmp_path / "out", [], ExportOptions(layout=SINGLE_ROOT))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    for name in ("unet", "text_encoder"):
        opened, held = getattr(pipeline, name).state_dict(), weights(student, name)
        for key, value in held.items():
            np.testing.assert_array_equal(opened[key].float(), value)


def test_the_index_is_read_before_it_is_believed(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded / "unet", tmp_path / "unet"))
    for text in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": {"conv_in.weight": 1}}'):
        (folder / INDEX).write_text(text)
        with pytest.raises(BundleError, match="has no `weight_map` from tensors to files"):
            find_weights(folder, DIFFUSERS)
