"""A folder of diffusers': where its parts lie and of which class they are, known before any weights are read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgedistill.contract import Signature
from edgedistill.errors import BundleError
from edgedistill.files import read_json
from edgedistill.models import store
from edgedistill.table import Condition
from edgedistill.text import Tokenizer

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
PROMPTS = "prompts.txt"
CONTROLNET = "controlnet"
CONTROLNETS = ("ControlNetModel",)
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
DENOISERS: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "transformer": ("DiTTransformer2DModel",),
}
ENCODERS: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
_EXAMPLES = ("a photograph of a cat", "a ship at sea", "a bowl of fruit", "a street in the rain")
_KNOWN = {
    *DENOISERS,
    *ENCODERS,
    *(name.replace("text_encoder", "tokenizer") for name in ENCODERS),
    "vae",
    "scheduler",
    CONTROLNET,
}
# Their pipelines draw without them, too.
_OPTIONAL = {"safety_checker", "feature_extractor", "image_encoder"}
# Parts of pipelines that their networks cannot be called without, where no index tells of them.
_UNKNOWN = (
    "text_encoder_3",
    "prior",
    "movq",
    "vqvae",
    "image_encoder_2",
    "controlnet_1",
    "unet_2",
    "adapter",
    "motion_adapter",
)
_PARTS = "one has unet/ or transformer/, scheduler/, and perhaps text_encoder/, tokenizer/, vae/ and controlnet/"
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


class Encoder(Protocol):
    """What is asked of a text encoder here."""

    @property
    def signature(self) -> Signature:
        """Tokens in, embeddings out."""

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that have an embedding."""


@dataclass(frozen=True)
class Parts:
    """What was found.

    Fields:
        root: The folder.
        name: Of the network that draws: a key of `DENOISERS`.
        folder: Where it lies: below the root, or the root itself.
        scheduler: The file of the scheduler's configuration.
        index: The contents of ``model_index.json``; empty where there is none.
    """

    root: Path
    name: str
    folder: Path
    scheduler: Path
    index: Mapping[str, Any]

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that are there."""
        return tuple(name for name in ENCODERS if (self.root / name).is_dir())

    @property
    def vae(self) -> Path | None:
        """The autoencoder's folder."""
        folder = self.root / "vae"
        return folder if folder.is_dir() else None

    @property
    def controlnet(self) -> Path | None:
        """The folder of the ControlNet."""
        folder = self.root / CONTROLNET
        return folder if folder.is_dir() else None

    @property
    def examples(self) -> tuple[str, ...]:
        """Prompts that stand in where none are given: the lines of ``prompts.txt``, or a few of everything."""
        if not (self.root / PROMPTS).is_file():
            return _EXAMPLES
        lines = (self.root / PROMPTS).read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip()) or _EXAMPLES


def find_parts(root: Path) -> Parts:
    """Find the parts of a pipeline, or of a network that lies by itself.

    Args:
        root: Holds ``unet/`` or ``transformer/``, and ``scheduler/``; or is the network's own folder, with
            ``scheduler_config.json`` in it, in ``scheduler/`` beside it, or in its parent.

    Raises:
        BundleError: If a part is missing or not known, or ``model_index.json`` asks for one that is not, or for
            code that is not diffusers' or transformers' own.
    """
    index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    for problem in _index_problems(index):
        msg = f"{root / INDEX}: {problem}."
        raise BundleError(msg)
    for name in _UNKNOWN:
        if (root / name).is_dir():
            msg = f"{root / name}: pipelines with this part are not known; {_PARTS}."
            raise BundleError(msg)
    held = [name for name in DENOISERS if (root / name).is_dir()]
    folder = root / held[0] if held else root
    if not (folder / "config.json").is_file():
        msg = f"{folder / 'config.json'}: no such file; a pipeline's folder has {' or '.join(DENOISERS)} with one in it, a network's has its own."
        raise BundleError(msg)
    kind = store.class_name(read_json(folder / "config.json"))
    fitting = [name for name, kinds in DENOISERS.items() if kind in kinds]
    if not fitting or held[1:] or (held and held != fitting):
        known = ", ".join(kind for kinds in DENOISERS.values() for kind in kinds)
        msg = f"{folder}: is a {kind}; the network that draws is one of {known}."
        raise BundleError(msg)
    return Parts(root, fitting[0], folder, _scheduler_file(root), index)


def _index_problems(index: Any) -> Iterator[str]:
    own = "only parts of diffusers and transformers are read, and no code is run that comes with a model"
    if not isinstance(index, dict):
        yield f"is not the index of a pipeline; {own}"
        return
    if not isinstance(index.get("_class_name", ""), str):
        yield f"asks for the pipeline {index['_class_name']!r}; {own}"
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        library, kind = (*entry, None, None)[:2]
        if library is not None and library not in _LIBRARIES:
            yield f"asks for `{name}` from {library}.{kind}; {own}"
        elif (library, kind) != (None, None) and name not in _KNOWN | _OPTIONAL:
            yield (
                f"asks for `{name}`, a {kind}, and pipelines with this part are not known; {_PARTS}. Where the "
                "pipeline draws without it, too, put [null, null] in its place"
            )


def _scheduler_file(root: Path) -> Path:
    places = [root / "scheduler" / SCHEDULER, root / SCHEDULER, root.parent / SCHEDULER]
    places.append(root.parent / "scheduler" / SCHEDULER)
    for path in places:
        if path.is_file():
            return path
    msg = f"{root}: has no {SCHEDULER} in scheduler/ or beside the network; without it the schedule and the prediction type are unknown: put it there from where the network is from."
    raise BundleError(msg)


def conditions_of(
    denoiser: Signature,
    *,
    classes: int | None,
    image_shape: tuple[int, int, int],
    text: Mapping[str, Any] | None,
) -> tuple[Condition, ...]:
    """Return what may be asked of a network that draws, as tables say it.

    Args:
        denoiser: What it takes.
        classes: Number of classes that may be asked for, or None.
        image_shape: (channels, height, width) of finished images.
        text: Further fields of the text's condition; None: no prompts are read.
    """
    made = []
    if (labels := denoiser.input("class")) is not None:
        made.append(Condition(labels.name, "class", classes))
    if (words := denoiser.input("text")) is not None and text is not None:
        made.append(Condition(words.name, "text", **text))
    if (size := denoiser.input("size")) is not None:
        made.append(Condition(size.name, "size", shape=image_shape))
    return tuple(made)


def space_of(vae: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a state means: ``kind`` pixel or latent; then ``scale`` and ``shift`` of the latents.

    Args:
        vae: Configuration of the autoencoder, or None.
    """
    if vae is None:
        return {"kind": "pixel", "value_range": [-1.0, 1.0]}
    from edgedistill.models.vae import scale_and_shift

    scale, shift = scale_and_shift(vae)
    return {"kind": "latent", "value_range": [-1.0, 1.0], "scale": scale, "shift": shift}


def refuse_strangers(
    name: str,
    network: str,
    denoiser: Signature,
    encoders: Sequence[Encoder],
    tokenizer: Tokenizer | None,
    vae: Mapping[str, Any] | None,
) -> None:
    """Refuse parts that cannot belong together, and networks that draw on more than their state.

    Args:
        name: Of the whole, for messages.
        network: Name of the network that draws.
        denoiser: What it takes.
        encoders: Those that read its prompts; what they make under one name is put side by side.
        tokenizer: Theirs.
        vae: Configuration of the autoencoder, or None.

    Raises:
        BundleError: Saying which.
    """
    taken, made = (int(side[0].shape[1]) for side in (denoiser.inputs, denoiser.outputs))
    if taken != made:
        why = "what the others are given, such as mask and picture of an inpainting model, is not known here; give a text-to-image model, which inpaints with a `mask` too"
        if made == 2 * taken:
            why = "a UNet that predicts a variance beside its mean is not known here; give one whose `out_channels` are its `in_channels`"
        elif made > taken:
            why = "what the further ones are is not known here; give one whose `out_channels` are its `in_channels`"
        msg = f"{name}: {network}/ takes {taken} channels and makes {made}: {why}."
        raise BundleError(msg)
    problems = []
    widths: dict[str, int] = {}
    for spec in (spec for encoder in encoders for spec in encoder.signature.outputs):
        widths[spec.name] = widths.get(spec.name, 0) + int(spec.shape[-1])
    for spec in denoiser.inputs:
        if spec.kind in ("text", "pooled") and encoders and widths.get(spec.name) != spec.shape[-1]:
            found = widths.get(spec.name, "no")
            problems.append(
                f"text_encoder/ makes {found} numbers of `{spec.name}`, {network}/ takes {spec.shape[-1]}"
            )
    words = tokenizer.vocabulary_size if tokenizer is not None else 0
    if encoders and words > (known := min(item.vocabulary_size for item in encoders)):
        problems.append(f"tokenizer/ knows more words than text_encoder/, {known}")
    if vae is not None and vae["latent_channels"] != taken:
        problems.append(
            f"vae/ makes latents of {vae['latent_channels']} channels, {network}/ takes {taken}"
        )
    if problems:
        msg = f"{name}: parts of different pipelines: {'; '.join(problems)}."
        raise BundleError(msg)


def refuse_other_controlnet(root: Path, denoiser: Signature, controlnet: Signature) -> None:
    """Refuse a ControlNet that is for another network.

    Args:
        root: The pipeline's folder.
        denoiser: Of the network, which takes residuals.
        controlnet: Of the ControlNet.

    Raises:
        BundleError: Naming the first tensor that differs.
    """
    taken = {spec.name: spec.shape for spec in denoiser.inputs}
    shared = [spec for spec in controlnet.inputs if spec.kind != "image"]
    for spec in (*shared, *controlnet.outputs):
        if taken.get(spec.name) != spec.shape:
            found, wanted = list(spec.shape), list(taken.get(spec.name, ()))
            msg = f"{root}: {CONTROLNET}/ is for another network: its `{spec.name}` is {found}, that of unet/ {wanted or 'not there'}."
            raise BundleError(msg)
    if len(controlnet.outputs) != sum(spec.kind == "residual" for spec in denoiser.inputs):
        msg = f"{root}: {CONTROLNET}/ is for another network: it makes {len(controlnet.outputs)} residuals, unet/ has more blocks."
        raise BundleError(msg)
