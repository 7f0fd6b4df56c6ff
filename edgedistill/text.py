"""Prompts to token numbers, without torch: a `tokenizer.json` on the `tokenizers` package."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedistill.errors import BundleError, ConfigError, require
from edgedistill.files import read_json, write_bytes

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
_READING = ("normalizer", "pre_tokenizer", "model", "post_processor")
_CLIP_FILES = ("vocab.json", "merges.txt")
# How OpenAI's CLIP cuts text: contractions, words, single digits, runs of anything else.
_CLIP_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"


def open_readers(paths: Sequence[Path]) -> "Callable[[Sequence[str], int], np.ndarray]":
    """Return what turns prompts into tokens, of one tokenizer or of several that read the same.

    Args:
        paths: As `Tokenizer.open` takes them, one per encoder.

    Returns:
        A function of prompts and a length to int32 (prompts, length), with an axis of encoders behind the
        first where there are several.

    Raises:
        BundleError, MissingDependencyError: As `Tokenizer.open`.
    """
    readers = [Tokenizer.open(path) for path in paths]
    if len(readers) == 1:
        return readers[0].encode
    return lambda prompts, length: np.stack(
        [reader.encode(prompts, length) for reader in readers], axis=1
    )


class Tokenizer:
    """A text encoder's tokenizer.

    Args:
        inner: The tokenizer of the `tokenizers` package; its padding says what fills short prompts.

    Raises:
        BundleError: If it does not say what it pads with.
    """

    def __init__(self, inner: "tokenizers.Tokenizer") -> None:
        if inner.padding is None:
            msg = f"The tokenizer names no padding token; add `padding` to {FILE}, or `pad_token` to tokenizer_config.json."
            raise BundleError(msg)
        self._inner = inner

    @classmethod
    def open(cls, path: Path) -> "Tokenizer":
        """Open a ``tokenizer.json``, or a folder with one, or with CLIP's ``vocab.json`` and ``merges.txt``.

        The padding token is that of the file itself, or else of ``tokenizer_config.json`` or
        ``special_tokens_map.json`` beside it.

        Raises:
            BundleError: If there is no such file, it is damaged, or no padding token is named.
            MissingDependencyError: If `tokenizers` is not installed.
        """
        file = path / FILE if path.is_dir() else path
        folder = file.parent
        if file.is_file():
            inner = _read(file)
        elif all((folder / name).is_file() for name in _CLIP_FILES):
            inner = _clip(folder)
        else:
            msg = f"{path}: holds neither {FILE} nor {' with '.join(_CLIP_FILES)}; other kinds of tokenizers are not read."
            raise BundleError(msg)
        if inner.padding is None and (token := _padding_token(folder)) is not None:
            _pad_with(inner, token, folder)
        return cls(inner)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens; the numbers run from 0."""
        return int(self._inner.get_vocab_size())

    @property
    def padding(self) -> int:
        """The token that fills short prompts."""
        return int(self._inner.padding["pad_id"])

    def padded_with(self, number: int) -> "Tokenizer":
        """Return the same tokenizer with another token that fills short prompts."""
        inner = _library().Tokenizer.from_str(self._inner.to_str())
        inner.enable_padding(pad_id=number, pad_token=inner.id_to_token(number))
        return Tokenizer(inner)

    def reads_like(self, other: "Tokenizer") -> bool:
        """Whether both make the same tokens of a prompt, padding aside."""
        mine, theirs = (json.loads(item._inner.to_str()) for item in (self, other))
        return all(mine[part] == theirs[part] for part in _READING)

    def encode(self, prompts: Sequence[str], length: int) -> np.ndarray:
        """Turn prompts into token numbers.

        Args:
            prompts: Any number of texts; the empty one is "no condition".
            length: Tokens per prompt, start and end included; longer prompts are cut, the end token stays.

        Returns:
            int32 (len(prompts), length).

        Raises:
            ConfigError: If `length` leaves no room for start, end and one word.
        """
        if length < 3:
            msg = f"A prompt needs at least 3 tokens (start, word, end), got {length}."
            raise ConfigError(msg)
        padding = self._inner.padding
        self._inner.enable_truncation(length)
        self._inner.enable_padding(
            length=length, pad_id=padding["pad_id"], pad_token=padding["pad_token"]
        )
        made = [item.ids for item in self._inner.encode_batch(list(prompts))]
        return np.array(made, np.int32).reshape(len(made), length)

    def save(self, path: Path) -> None:
        """Write one ``tokenizer.json`` that `open` reads without any file beside it."""
        write_bytes(path, self._inner.to_str(pretty=True).encode())


def _library() -> Any:
    return require("tokenizers", "text")


def _read(file: Path) -> "tokenizers.Tokenizer":
    read_json(file)  # says clearly what is no JSON
    try:
        return _library().Tokenizer.from_file(str(file))
    except Exception as error:
        # The Rust library raises plain Exception whatever is wrong.
        if type(error) is not Exception:
            raise
        msg = f"{file}: not a tokenizer as the `tokenizers` package writes it ({error})."
        raise BundleError(msg) from error


def _clip(folder: Path) -> "tokenizers.Tokenizer":
    """Build CLIP's tokenizer from its vocabulary and merges (arXiv:2103.00020, section 2.4)."""
    library = _library()
    ranks = read_json(folder / _CLIP_FILES[0])
    lines = (folder / _CLIP_FILES[1]).read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    model = library.models.BPE(
        vocab=ranks,
        merges=merges,
        unk_token=_CLIP_END,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    made = library.Tokenizer(model)
    norm, pre = library.normalizers, library.pre_tokenizers
    spaces = norm.Replace(library.Regex(r"\s+"), " ")
    made.normalizer = norm.Sequence([norm.NFC(), spaces, norm.Lowercase()])
    pieces = pre.Split(library.Regex(_CLIP_PIECES), behavior="removed", invert=True)
    made.pre_tokenizer = pre.Sequence([pieces, pre.ByteLevel(add_prefix_space=False)])
    start, end = ((token, ranks[token]) for token in (_CLIP_START, _CLIP_END))
    made.post_processor = library.processors.RobertaProcessing(
        sep=end, cls=start, add_prefix_space=False, trim_offsets=False
    )
    made.add_special_tokens([_CLIP_START, _CLIP_END])
    return made


def _padding_token(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = read_json(folder / name).get("pad_token")
            if token is not None:
                return str(token["content"] if isinstance(token, dict) else token)
    return None


def _pad_with(inner: "tokenizers.Tokenizer", token: str, folder: Path) -> None:
    number = inner.token_to_id(token)
    if number is None:
        msg = f"{folder}: the padding token {token!r} is not in the vocabulary."
        raise BundleError(msg)
    inner.enable_padding(pad_id=number, pad_token=token)
