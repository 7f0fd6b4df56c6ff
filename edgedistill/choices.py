"""What the caller of a table may choose: conditions, and how strongly they guide."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgedistill.config import finite, rises

GUIDANCE_MODES = ("none", "cfg", "embedded", "baked")
CONDITION_FIELDS: Mapping[str, tuple[str, ...]] = {
    "class": ("size",),
    "text": ("encoder", "tokenizer", "length", "examples"),
    "image": ("shape", "value_range"),
    "mask": ("shape",),
    "size": ("shape",),
}
_MAY_HOLD = {"image": {"encoder"}, "text": {"further"}}
SIZES = 6
"""Numbers of a size: height and width before and after cropping, with the crop's top and left between them."""


@dataclass(frozen=True)
class Guidance:
    """How guidance enters.

    Fields:
        mode: ``none``; ``cfg`` (two calls per row); ``embedded`` (a network input); ``baked``.
        input: The network input, for ``embedded``; it is fed ``scale - 1`` (Meng's w).
        default: guidance_scale g used when the caller gives none; g = 1 is no guidance.
        range: Smallest and largest g that the network was trained for.
        null: What stands for "no condition" by the condition's name, for ``cfg``: a number, or of a text
            another text; a number of a text is what all its embeddings are filled with.
    """

    mode: str = "none"
    input: str | None = None
    default: float = 1.0
    range: tuple[float, float] = (1.0, 1.0)
    null: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """One thing the caller supplies per sample.

    Fields:
        name: The network input it feeds.
        kind: ``class``, ``text``, ``image`` or ``mask`` (1 where the sampler draws, 0 where it keeps), or
            ``size``: what Stable Diffusion XL is told of the picture's (arXiv:2307.01952, section 2.2).
        size: Of a class: number of classes the caller may choose from; None where that has no meaning.
        shape: Of an image or mask: (channels, height, width); of a size: that of the finished image.
        value_range: Of an image: values of black and white.
        encoder: Of a text: the network that makes the input of tokens. Of an image: the one that makes a
            latent of it, or None: it is used as it is.
        tokenizer: Of a text: name of the tokenizer's file, or of its folder, in the bundle.
        further: Of a text: further encoders that read it, each with its tokenizer, by name. What one makes
            under a name that is there already goes behind that on the last axis.
        length: Of a text: number of tokens it is padded or cut to.
        examples: Of a text: prompts that stand in where the caller gives none, and that probes are made of.
    """

    name: str
    kind: str
    size: int | None = None
    shape: tuple[int, int, int] | None = None
    value_range: tuple[float, float] | None = None
    encoder: str | None = None
    tokenizer: str | None = None
    length: int | None = None
    examples: tuple[str, ...] | None = None
    further: Mapping[str, str] | None = None

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the networks that make something of it."""
        return () if self.encoder is None else (self.encoder, *(self.further or ()))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the tokenizers that its encoders read with, in the same order."""
        return () if self.tokenizer is None else (self.tokenizer, *(self.further or {}).values())

    @property
    def whole_size(self) -> tuple[float, ...]:
        """Of a size: `SIZES` numbers that say the image is whole and of `shape`."""
        _, height, width = self.shape or (1, 1, 1)
        return (height, width, 0.0, 0.0, height, width)


def condition_problems(condition: Condition) -> Iterator[str]:
    """Yield what is wrong with a condition by itself."""
    name, kind = condition.name, condition.kind
    if kind not in CONDITION_FIELDS:
        yield f"condition kind must be one of {', '.join(CONDITION_FIELDS)}, got {kind!r}"
        return
    held = {k for k, v in vars(condition).items() if v not in (None, (), {})} - {"name", "kind"}
    wanted = set(CONDITION_FIELDS[kind])
    held -= _MAY_HOLD.get(kind, set())
    if held - wanted or (kind != "class" and held != wanted):
        told, got = ", ".join(sorted(wanted)), ", ".join(sorted(held))
        yield f"`{name}` of kind {kind} is told by {told}, got {got or 'nothing'}"
    elif min(condition.size or 1, condition.length or 1, *(condition.shape or (1,))) < 1:
        yield f"`{name}`: sizes must be positive"
    elif condition.value_range is not None and not rises(*condition.value_range):
        yield f"`{name}`: value range {list(condition.value_range)} is empty"


def guidance_problems(guidance: Guidance, conditions: Mapping[str, Condition]) -> Iterator[str]:
    """Yield what is wrong with the guidance of a table that has these conditions, by name."""
    if guidance.mode not in GUIDANCE_MODES:
        yield f"guidance mode must be one of {', '.join(GUIDANCE_MODES)}, got {guidance.mode!r}"
    if (guidance.mode == "embedded") != (guidance.input is not None):
        yield "guidance has an `input` exactly when its mode is 'embedded'"
    if (guidance.mode == "cfg") != bool(
        guidance.null
    ) or not guidance.null.keys() <= conditions.keys():
        yield "guidance has `null` values of conditions exactly when its mode is 'cfg'"
    elif not all(
        finite(value) or (isinstance(value, str) and conditions[name].kind == "text")
        for name, value in guidance.null.items()
    ):
        yield f"a `null` value is a number, or for a text a text, got {dict(guidance.null)}"
    low, high = guidance.range
    if not finite(low, high, guidance.default) or not low <= guidance.default <= high:
        yield f"guidance default {guidance.default} is outside of its range [{low}, {high}]"
