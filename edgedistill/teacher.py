"""The teacher: a frozen network with the scheduler, text encoder and autoencoder it was trained with."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedistill import text
from edgedistill.compiler import FAMILIES, compile_scheduler
from edgedistill.contract import Signature
from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import read_json, sha256
from edgedistill.prediction import prediction_of
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, Guidance, SamplerTable

if TYPE_CHECKING:
    from torch import nn

    from edgedistill.models.text import TextEncoder
    from edgedistill.models.text_pair import TextEncoderPair
    from edgedistill.models.vae import Autoencoder

_ASSETS = Path(str(resources.files("edgedistill"))) / "assets"
PACKAGED = {name: _ASSETS / f"{name}_teacher" for name in ("digits", "captioned_digits")}
ARCHITECTURES = _ASSETS / "architectures"
SCHEDULER = "scheduler_config.json"
PROMPTS = "prompts.txt"
_EXAMPLES = ("a photograph of a cat", "a ship at sea", "a bowl of fruit", "a street in the rain")
_NETWORKS = ("UNet2DModel", "UNet2DConditionModel")
_AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
# Parts of pipelines that their networks cannot be called without.
_UNKNOWN_PARTS = ("transformer", "text_encoder_3", "prior", "movq", "vqvae", "image_encoder_2")


@dataclass(frozen=True, eq=False)
class Teacher:
    """An opened teacher.

    Fields:
        name: As it was asked for: ``"digits"``, or a path.
        network: float32, in evaluation mode, frozen; so are the other networks.
        scheduler: diffusers' scheduler configuration, plain JSON data.
        signature: What the network takes and gives.
        classes: Number of classes that may be asked for, the null class not counted; None: no classes.
        null: What stands for "no condition" by the network's input, such as ``{"class_labels": 10}`` or
            ``{"encoder_hidden_states": ""}``; empty where the network was not trained with one.
        fingerprint: SHA-256 over configurations and weights.
        text_encoder, tokenizer: What turns prompts into the network's input, or None.
        examples: Prompts that stand in where none are given; empty where the network reads no text.
        vae: The autoencoder whose latents the network works on, or None: it works on pixels.
    """

    name: str
    network: "nn.Module"
    scheduler: Mapping[str, Any]
    signature: Signature
    classes: int | None
    null: Mapping[str, Any]
    fingerprint: str
    text_encoder: "TextEncoder | TextEncoderPair | None" = None
    tokenizer: text.Tokenizer | None = None
    examples: tuple[str, ...] = ()
    vae: "Autoencoder | None" = None

    @property
    def prediction_type(self) -> str:
        """What the network predicts, a `PredictionType`."""
        return prediction_of(self.scheduler)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a state."""
        _, channels, height, width = self.signature.inputs[0].shape
        return int(channels), int(height), int(width)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        if self.vae is None:
            return self.shape
        from edgedistill.models.vae import reduction

        config = dict(self.vae.config)
        height, width = (size * reduction(config) for size in self.shape[1:])
        return int(config["in_channels"]), height, width

    @property
    def space(self) -> Mapping[str, Any]:
        """What a state means: ``kind`` pixel or latent; then ``scale`` and ``shift`` of the latents."""
        if self.vae is None:
            return {"kind": "pixel", "value_range": [-1.0, 1.0]}
        from edgedistill.models.vae import scale_and_shift

        scale, shift = scale_and_shift(dict(self.vae.config))
        return {"kind": "latent", "value_range": [-1.0, 1.0], "scale": scale, "shift": shift}

    @property
    def clamp(self) -> tuple[float, float] | None:
        """Range of finished samples, or None where they are latents."""
        return (-1.0, 1.0) if self.vae is None else None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What may be asked of the network, as tables say it."""
        made = []
        if (labels := self.signature.input("class")) is not None:
            made.append(Condition(labels.name, "class", self.classes))
        words = self.signature.input("text")
        if words is not None and self.text_encoder is not None:
            made.append(
                Condition(
                    words.name,
                    "text",
                    encoder="text_encoder",
                    tokenizer=text.FILE,
                    length=self.text_encoder.length,
                    examples=self.examples,
                )
            )
        if (size := self.signature.input("size")) is not None:
            made.append(Condition(size.name, "size", shape=self.image_shape))
        return tuple(made)

    @property
    def modules(self) -> "dict[str, nn.Module]":
        """The networks that a table calls, by name."""
        encoder = {} if self.text_encoder is None else {"text_encoder": self.text_encoder}
        return {"unet": self.network, **encoder}

    def table(
        self, num_steps: int, guidance_scale: float = 1.0, spacing: str | None = None
    ) -> SamplerTable:
        """Return the table that samples this teacher as its own scheduler would.

        A scheduler whose steps cannot be compiled gives its noise schedule to DDIM.

        Args:
            num_steps: Rows; each calls the network twice where there is guidance.
            guidance_scale: g, where 1 is no guidance.
            spacing: ``trailing``, ``leading`` or ``linspace``; None: as the scheduler's configuration says.

        Raises:
            ConfigError: If the scheduler cannot be compiled, or guidance is asked of a network without a
                null condition.
        """
        if guidance_scale != 1 and not self.null:
            msg = f"{self.name}: guidance needs a null class, and this teacher has none; use guidance_scale=1."
            raise ConfigError(msg)
        limits = (guidance_scale, guidance_scale)
        cfg = Guidance(mode="cfg", default=guidance_scale, range=limits, null=self.null)
        scheduler = {**self.scheduler, **({"timestep_spacing": spacing} if spacing else {})}
        if scheduler["_class_name"] not in FAMILIES:
            scheduler = {"clip_sample": False, **scheduler, "_class_name": "DDIMScheduler"}
        return compile_scheduler(
            scheduler,
            num_steps,
            shape=self.shape,
            guidance=Guidance() if guidance_scale == 1 else cfg,
            conditions=self.conditions,
            clamp=self.clamp,
            space=self.space,
        )

    def sample(self, table: SamplerTable, count: int, **options: Any) -> np.ndarray:
        """Sample and, where the state is a latent, decode.

        Args:
            table: One of this teacher's.
            count: Number of samples.
            **options: As `edgedistill.models.run.sample_torch`, which see for errors too; prompts as
                ``encoder_hidden_states``.

        Returns:
            Images float32 (count, channels, height, width) in [-1, 1].
        """
        from edgedistill.models.run import sample_torch

        tokenize = None if self.tokenizer is None else self.tokenizer.encode
        modules = {**dict.fromkeys(table.networks, self.network), **self.modules}
        made = sample_torch(modules, table, count, tokenize=tokenize, **options)
        return made if self.vae is None else self.decode(made).clip(-1, 1)

    def embed(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encode prompts.

        Returns:
            float32 ``encoder_hidden_states`` (count, length, dim), and the embedding of the whole prompt
            (count, dim): ``pooled``, or ``text_embeds`` where the network takes it.

        Raises:
            ConfigError: If the network reads no text.
        """
        if self.text_encoder is None or self.tokenizer is None:
            msg = f"{self.name}: this teacher reads no prompts."
            raise ConfigError(msg)
        from edgedistill.models.run import run_batches

        tokens = self.tokenizer.encode(prompts, self.text_encoder.length)
        return run_batches(self.text_encoder, tokens)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Turn images, float32 in [-1, 1], into states of the network; of a distribution, its mean."""
        if self.vae is None:
            return images
        from edgedistill.models.run import run_batches
        from edgedistill.models.vae import VaeEncoder

        half = VaeEncoder(self.vae, self.shape[1:])
        latents = run_batches(half, images)["latent_sample"]
        return (latents - self.space["shift"]) * self.space["scale"]

    def decode(self, states: np.ndarray) -> np.ndarray:
        """Turn states of the network into images, float32 in about [-1, 1]."""
        if self.vae is None:
            return states
        from edgedistill.models.run import run_batches
        from edgedistill.models.vae import VaeDecoder

        half = VaeDecoder(self.vae, self.shape[1:])
        return run_batches(half, states / self.space["scale"] + self.space["shift"])["sample"]

    def save_text_parts(self, folder: Path) -> dict[str, Signature]:
        """Write what a student needs to read prompts as this teacher does: text encoder and tokenizer.

        Returns:
            The signatures of the networks written, by name; empty where the teacher reads no text.
        """
        if self.text_encoder is None or self.tokenizer is None:
            return {}
        from edgedistill.models import store

        store.save(self.text_encoder, folder / "text_encoder")
        self.tokenizer.save(folder / text.FILE)
        return {"text_encoder": store.signature(self.text_encoder)}

    @classmethod
    def open(cls, name: str | Path, *, null_class: bool = True) -> "Teacher":
        """Open a packaged teacher, or a folder that diffusers wrote.

        Args:
            name: ``"digits"`` or ``"captioned_digits"``; or a folder with ``unet/`` and ``scheduler/``, and
                for a network that reads text ``text_encoder/`` and ``tokenizer/`` (Stable Diffusion XL's:
                also ``text_encoder_2/`` and ``tokenizer_2/``), for one of latents ``vae/``; or the folder of a `UNet2DModel` with ``scheduler_config.json`` in it or in its
                parent. ``prompts.txt`` in it, one per line, are its examples.
            null_class: Whether the network's last class embedding stands for "no class". The null text is
                always the empty one.

        Raises:
            BundleError: If a file is missing, damaged, a pickle, or of a class that is not known, or the
                parts belong to different pipelines.
            ConfigError: If the scheduler's noise schedule is not known.
        """
        return _open(str(name), PACKAGED.get(str(name), Path(name)), null_class=null_class)

    @classmethod
    def sketch(cls, name: str | Path, *, null_class: bool = True) -> "Teacher":
        """Read the configurations of a teacher alone: its networks have no weights (device ``meta``).

        Args:
            name: As for `open`; where there is no such folder, the known architecture of its last part:
                ``models/stable-diffusion-v1-5`` is that of ``stable-diffusion-v1-5``.
            null_class: As for `open`.

        Raises:
            BundleError, ConfigError: As `open`.
        """
        import torch

        root = PACKAGED.get(str(name), Path(name))
        if not root.exists() and (ARCHITECTURES / root.name).is_dir():
            root = ARCHITECTURES / root.name
        with torch.device("meta"):
            return _open(str(name), root, null_class=null_class, bare=True)


def _open(name: str, root: Path, *, null_class: bool, bare: bool = False) -> Teacher:
    """Open a teacher, or its configurations alone where it is `bare`."""
    from edgedistill.models import store
    from edgedistill.models.prompts import open_reader

    folder = root / "unet" if (root / "unet").is_dir() else root
    if not folder.is_dir():
        msg = f"{name}: no such teacher; give {', '.join(map(repr, PACKAGED))} or a diffusers folder with unet/ and scheduler/."
        raise BundleError(msg)
    _refuse_unknown_parts(root)
    scheduler = _scheduler_file(root)
    Schedule.from_config(read_json(scheduler))
    networks = {folder: store.open_one_of(folder, _NETWORKS, bare=bare)}
    files: tuple[Path, ...] = ()
    signature = store.signature(networks[folder])
    embeddings = store.config_of(networks[folder]).get("num_class_embeds")
    labels, words = signature.input("class"), signature.input("text")
    null: dict[str, Any] = {}
    if labels and embeddings and null_class:
        null[labels.name] = embeddings - 1
    parts: dict[str, Any] = {}
    if words is not None:
        null[words.name] = ""
        reader = open_reader(root, bare=bare)
        networks, files = {**networks, **reader.parts}, (*files, *reader.files)
        parts = {"text_encoder": reader.encoder, "tokenizer": reader.tokenizer}
        parts["examples"] = _examples(root)
    if (root / "vae").is_dir():
        vae = store.open_one_of(root / "vae", _AUTOENCODERS, bare=bare)
        parts["vae"] = networks[root / "vae"] = vae
    made = Teacher(
        name=name,
        network=networks[folder],
        scheduler=read_json(scheduler),
        signature=signature,
        classes=embeddings - (labels.name in null) if labels and embeddings else None,
        null=null,
        fingerprint="" if bare else _fingerprint(scheduler, networks, files),
        **parts,
    )
    _refuse_strangers(made)
    return made


def _refuse_unknown_parts(root: Path) -> None:
    for name in _UNKNOWN_PARTS:
        if (root / name).is_dir():
            msg = f"{root / name}: pipelines with this part are not known; a teacher has unet/, scheduler/, and perhaps text_encoder/, tokenizer/ and vae/."
            raise BundleError(msg)


def _refuse_strangers(teacher: Teacher) -> None:
    """Refuse parts that cannot belong together.

    Raises:
        BundleError: Saying which.
    """
    problems = []
    encoder = teacher.text_encoder
    if encoder is not None:
        made = {spec.name: spec.shape[-1] for spec in encoder.signature.outputs}
        for spec in (teacher.signature.input(kind) for kind in ("text", "pooled")):
            if spec is not None and made.get(spec.name) != spec.shape[-1]:
                found = made.get(spec.name, "no")
                problems.append(
                    f"text_encoder/ makes {found} numbers of `{spec.name}`, unet/ takes {spec.shape[-1]}"
                )
        words = teacher.tokenizer.vocabulary_size if teacher.tokenizer is not None else 0
        if words > encoder.vocabulary_size:
            problems.append(
                f"tokenizer/ knows more words than text_encoder/, {encoder.vocabulary_size}"
            )
    if teacher.vae is not None:
        made, taken = dict(teacher.vae.config)["latent_channels"], teacher.shape[0]
        if made != taken:
            problems.append(f"vae/ makes latents of {made} channels, unet/ takes {taken}")
    if problems:
        msg = f"{teacher.name}: parts of different pipelines: {'; '.join(problems)}."
        raise BundleError(msg)


def _examples(root: Path) -> tuple[str, ...]:
    if not (root / PROMPTS).is_file():
        return _EXAMPLES
    lines = (root / PROMPTS).read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip()) or _EXAMPLES


def _fingerprint(
    scheduler: Path, networks: "Mapping[Path, nn.Module]", further: Sequence[Path]
) -> str:
    from edgedistill.models import store

    files = [scheduler]
    for folder, network in networks.items():
        files += [folder / "config.json", folder / store.weights_file(network)]
    return hashlib.sha256("\n".join(map(sha256, [*files, *further])).encode()).hexdigest()


def _scheduler_file(root: Path) -> Path:
    places = [root / "scheduler" / SCHEDULER, root / SCHEDULER, root.parent / SCHEDULER]
    places.append(root.parent / "scheduler" / SCHEDULER)
    for path in places:
        if path.is_file():
            return path
    msg = f"{root}: has no {SCHEDULER} in scheduler/ or beside the network; without it the schedule and the prediction type are unknown."
    raise BundleError(msg)
