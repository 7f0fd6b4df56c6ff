"""Prompts become the tokens and embeddings that the stock libraries make of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from edgedistill.errors import BundleError, ConfigError
from edgedistill.models import store
from edgedistill.models.text import TextEncoder
from edgedistill.teacher import PACKAGED
from edgedistill.text import Tokenizer

FOLDER = PACKAGED["captioned_digits"] / "tokenizer"
PROMPTS = ["a handwritten three", "", "A   café, don't: 3 naïve\tcats!", "the " * 30]


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """CLIP's files with every byte, and a few merges."""
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = ["t h", "th e</w>", "c a", "ca t", "' t</w>", "t h</w>"]
    words = letters + [f"{c}</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|endoftext|>"}}')
    return folder


def test_prompts_are_padded_and_cut_with_the_end_token_kept() -> None:
    tokens = Tokenizer.open(FOLDER).encode(["a handwritten three", "", "the digit " * 9], 6)
    assert (tokens.dtype, tokens.shape) == (np.int32, (3, 6))
    words = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    names = {number: word for word, number in words.items()}
    assert [[names[n] for n in row] for row in tokens.tolist()] == [
        ["[START]", "a", "handwritten", "three", "[END]", "[PAD]"],
        ["[START]", "[END]", "[PAD]", "[PAD]", "[PAD]", "[PAD]"],
        ["[START]", "the", "digit", "the", "digit", "[END]"],
    ]


def test_no_prompts_are_no_rows_and_too_few_tokens_are_refused() -> None:
    tokenizer = Tokenizer.open(FOLDER)
    assert tokenizer.encode([], 5).shape == (0, 5)
    with pytest.raises(ConfigError, match="at least 3 tokens"):
        tokenizer.encode(["a"], 2)


def test_clips_own_files_give_the_tokens_that_transformers_gives(clip_folder: Path) -> None:
    ours = Tokenizer.open(clip_folder)
    theirs = CLIPTokenizerFast(
        str(clip_folder / "vocab.json"),
        str(clip_folder / "merges.txt"),
        pad_token="<|endoftext|>",
    )
    expected = theirs(PROMPTS, padding="max_length", truncation=True, max_length=20).input_ids
    np.testing.assert_array_equal(ours.encode(PROMPTS, 20), expected)
    assert ours.vocabulary_size == 520


def test_a_saved_tokenizer_needs_no_file_beside_it(tmp_path: Path, clip_folder: Path) -> None:
    ours = Tokenizer.open(clip_folder)
    ours.save(tmp_path / "alone" / "tokenizer.json")
    again = Tokenizer.open(tmp_path / "alone" / "tokenizer.json")
    np.testing.assert_array_equal(again.encode(PROMPTS, 9), ours.encode(PROMPTS, 9))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither tokenizer.json nor vocab.json with merges.txt"),
        ({"tokenizer.json": "{"}, "not a JSON file"),
        ({"tokenizer.json": "{}"}, "not a tokenizer as the `tokenizers` package writes it"),
        ({"tokenizer.json": None}, "names no padding token"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"pad_token": "nothing"}'},
            "'nothing' is not in the vocabulary",
        ),
    ],
)
def test_folders_that_hold_no_tokenizer_are_refused(
    tmp_path: Path, files: dict[str, str | None], message: str
) -> None:
    whole = json.loads((FOLDER / "tokenizer.json").read_text())
    unpadded = json.dumps({**whole, "padding": None})
    for name, content in files.items():
        (tmp_path / name).write_text(unpadded if content is None else content)
    with pytest.raises(BundleError, match=message):
        Tokenizer.open(tmp_path)


def make_stock(**settings: int) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        **settings,
    )
    return CLIPTextModel(config).eval()


@pytest.mark.parametrize(("end", "expected"), [(9, 2), (2, 4)])
def test_the_encoder_is_the_stock_one_for_new_and_old_end_tokens(end: int, expected: int) -> None:
    stock = make_stock(eos_token_id=end)
    tokens = torch.tensor([[1, 5, 9, 0, 29, 0, 0], [1, 9, 3, 29, 4, 9, 2]])
    ours = TextEncoder(stock)
    with torch.no_grad():
        hidden, pooled = ours(tokens.int())
        theirs = stock(tokens)
    torch.testing.assert_close(hidden, theirs.last_hidden_state, rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled, theirs.pooler_output, rtol=0, atol=1e-6)
    assert torch.equal(pooled[0], hidden[0, expected])


def test_a_token_does_not_see_the_ones_behind_it() -> None:
    encoder = TextEncoder(make_stock(eos_token_id=9))
    tokens = torch.tensor([[1, 5, 6, 9, 0, 0, 0], [1, 5, 6, 9, 7, 8, 3]])
    with torch.no_grad():
        hidden, _ = encoder(tokens)
    torch.testing.assert_close(hidden[0, :4], hidden[1, :4], rtol=0, atol=1e-6)
    assert (hidden[0, 4:] - hidden[1, 4:]).abs().max() > 0.1


def test_a_stored_encoder_opens_here_and_in_transformers(tmp_path: Path) -> None:
    encoder = TextEncoder(make_stock(eos_token_id=9))
    store.save(encoder, tmp_path)
    tokens = torch.tensor([[1, 5, 9, 0, 0, 0, 0]])
    again, stock = store.load(tmp_path), CLIPTextModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = encoder(tokens)[0]
        assert torch.equal(again(tokens)[0], expected)
        torch.testing.assert_close(stock(tokens).last_hidden_state, expected, rtol=0, atol=1e-6)
    inputs, outputs = store.signature(again).inputs, store.signature(again).outputs
    assert [(s.name, s.shape, s.dtype) for s in inputs] == [("input_ids", ("batch", 7), "int32")]
    assert [(s.name, s.shape) for s in outputs] == [
        ("encoder_hidden_states", ("batch", 7, 16)),
        ("pooled", ("batch", 16)),
    ]


def test_what_transformers_stored_opens_here_old_buffers_too(tmp_path: Path) -> None:
    stock = make_stock(eos_token_id=9)
    stock.save_pretrained(tmp_path)
    weights = store.load_weights(tmp_path / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    store.save_weights(weights, tmp_path / "model.safetensors", {"format": "pt"})
    tokens = torch.tensor([[1, 5, 9, 0, 0, 0, 0]])
    with torch.no_grad():
        hidden, _ = store.load(tmp_path)(tokens)
        torch.testing.assert_close(hidden, stock(tokens).last_hidden_state, rtol=0, atol=1e-6)
