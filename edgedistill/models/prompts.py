"""What reads prompts in a folder of diffusers': a tokenizer with a text encoder, or two of each for the same words."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from edgedistill.errors import BundleError
from edgedistill.files import read_json
from edgedistill.models import store
from edgedistill.models.parts import ENCODERS, INDEX
from edgedistill.models.text import TextEncoder
from edgedistill.models.text_pair import TextEncoderPair
from edgedistill.text import Tokenizer


@dataclass(frozen=True, eq=False)
class Reader:
    """An opened reader of prompts.

    Fields:
        encoder: From tokens to the inputs of the denoiser.
        tokenizer: From prompts to tokens; None in a sketch.
        parts: The networks as they lie in their folders.
        files: What else it depends on.
    """

    encoder: TextEncoder | TextEncoderPair
    tokenizer: Tokenizer | None
    parts: Mapping[Path, nn.Module]
    files: tuple[Path, ...]


def open_reader(root: Path, *, bare: bool) -> Reader:
    """Open the reader of a pipeline's folder, or its configurations alone where it is `bare`.

    Args:
        root: Holds ``text_encoder/`` and ``tokenizer/``, and for Stable Diffusion XL both once more with
            ``_2``.
        bare: No weights and no tokenizers.

    Raises:
        BundleError: If a part is missing, damaged or of another class, or the tokenizers read prompts
            differently.
    """
    first: Any = store.open_one_of(root / "text_encoder", ENCODERS["text_encoder"], bare=bare)
    parts = {root / "text_encoder": first}
    tokenizer = None if bare else Tokenizer.open(root / "tokenizer")
    files = tuple(sorted(path for path in root.glob("tokenizer*/*") if path.is_file()))
    if not (root / "text_encoder_2").is_dir():
        return Reader(first, tokenizer, parts, files)
    kinds = ENCODERS["text_encoder_2"]
    second: Any = store.open_one_of(root / "text_encoder_2", kinds, bare=bare)
    parts[root / "text_encoder_2"] = second
    index = root / INDEX
    said = read_json(index) if index.is_file() else {}
    pair = TextEncoderPair(
        first,
        second,
        0 if tokenizer is None else _second_padding(root, tokenizer),
        zero_empty=bool(said.get("force_zeros_for_empty_prompt", True)),
    )
    return Reader(pair, tokenizer, parts, (*files, index) if said else files)


def _second_padding(root: Path, first: Tokenizer) -> int:
    second = Tokenizer.open(root / "tokenizer_2")
    if not second.reads_like(first):
        msg = f"{root / 'tokenizer_2'}: reads prompts differently than tokenizer/; two encoders share one tokenizer, padding aside."
        raise BundleError(msg)
    return second.padding
