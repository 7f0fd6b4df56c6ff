"""The teacher: a frozen network with the scheduler, text encoder and autoencoder it was trained with."""

import dataclasses
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
_TOKENIZERS = {"text_encoder": text.FILE, "text_encoder_2": "tokenizer_2.json"}
_DECODER, _ENCODER = "vae_decoder", "vae_encoder"
ARCHITECTURES = _ASSETS / "architectures"


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
        from edgedistill.models.parts import space_of

        return space_of(None if self.vae is None else dict(self.vae.config))

    @property
    def clamp(self) -> tuple[float, float] | None:
        """Range of finished samples, or None where they are latents."""
        return (-1.0, 1.0) if self.vae is None else None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What may be asked of the network, as tables say it."""
        from edgedistill.models.parts import conditions_of

        reads = None
        if self.text_encoder is not None:
            reads = {
                "encoder": "text_encoder",
                "tokenizer": text.FILE,
                "length": self.text_encoder.length,
                "examples": self.examples,
            }
        return conditions_of(
            self.signature, classes=self.classes, image_shape=self.image_shape, text=reads
        )

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

    def save_parts(self, folder: Path) -> tuple[dict[str, Signature], dict[str, str]]:
        """Write what a student needs beside its network: text encoders, their tokenizers, the autoencoder.

        Returns:
            The signatures of the networks written, by name, and the subfolders of those that do not lie in
            one of their own name.
        """
        from edgedistill.models import store

        signatures, folders = {}, {}
        if self.text_encoder is not None and self.tokenizer is not None:
            for name, (encoder, tokenizer) in self.text_encoder.readers(self.tokenizer).items():
                store.save(encoder, folder / name)
                tokenizer.save(folder / _TOKENIZERS[name])
                signatures[name] = encoder.signature
        if self.vae is not None:
            from edgedistill.models.vae import VaeDecoder, VaeEncoder

            store.save(self.vae, folder / "vae")
            for name, half in ((_DECODER, VaeDecoder), (_ENCODER, VaeEncoder)):
                signatures[name] = half(self.vae, self.shape[1:]).signature
                folders[name] = "vae"
        return signatures, folders

    def complete(self, table: SamplerTable) -> SamplerTable:
        """Return a table over this teacher's states as that of a student with what `save_parts` writes.

        Its latents are decoded, and prompts are read by every text encoder for itself.
        """
        if self.vae is not None:
            table = dataclasses.replace(
                table, decoder=_DECODER, encoder=_ENCODER, clamp=(-1.0, 1.0)
            )
        if self.text_encoder is None or not (further := self.text_encoder.further):
            return table
        conditions = tuple(
            dataclasses.replace(item, further={name: _TOKENIZERS[name] for name in further})
            if item.kind == "text"
            else item
            for item in table.conditions
        )
        nothing = self.text_encoder.nothing
        null = {
            name: nothing if value == "" else value for name, value in table.guidance.null.items()
        }
        guidance = dataclasses.replace(table.guidance, null=null)
        return dataclasses.replace(table, conditions=conditions, guidance=guidance)

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
    from edgedistill.models import parts, store
    from edgedistill.models.prompts import open_reader

    if not root.is_dir():
        msg = f"{name}: no such teacher; give {', '.join(map(repr, PACKAGED))} or a diffusers folder with unet/ and scheduler/."
        raise BundleError(msg)
    found = parts.find_parts(root)
    scheduler = read_json(found.scheduler)
    Schedule.from_config(scheduler)
    network = store.open_one_of(found.folder, parts.DENOISERS["unet"], bare=bare)
    networks = {found.folder: network}
    files: tuple[Path, ...] = ()
    signature = store.signature(network)
    if signature.input("w") is not None:
        msg = f"{found.folder}: takes guidance as an input, so it is a distilled student; a teacher is what such are made of."
        raise BundleError(msg)
    embeddings = store.config_of(network).get("num_class_embeds")
    labels, words = signature.input("class"), signature.input("text")
    null: dict[str, Any] = {}
    if labels and embeddings and null_class:
        null[labels.name] = embeddings - 1
    held: dict[str, Any] = {}
    if words is not None:
        null[words.name] = ""
        reader = open_reader(root, bare=bare)
        networks, files = {**networks, **reader.parts}, (*files, *reader.files)
        held = {"text_encoder": reader.encoder, "tokenizer": reader.tokenizer}
        held["examples"] = found.examples
    if found.vae is not None:
        vae = store.open_one_of(found.vae, parts.AUTOENCODERS, bare=bare)
        held["vae"] = networks[found.vae] = vae
    made = Teacher(
        name=name,
        network=network,
        scheduler=scheduler,
        signature=signature,
        classes=embeddings - (labels.name in null) if labels and embeddings else None,
        null=null,
        fingerprint="" if bare else _fingerprint(found.scheduler, networks, files),
        **held,
    )
    _refuse_strangers(made)
    return made


def _refuse_strangers(teacher: Teacher) -> None:
    from edgedistill.models.parts import refuse_strangers

    refuse_strangers(
        teacher.name,
        "unet",
        teacher.signature,
        [] if teacher.text_encoder is None else [teacher.text_encoder],
        teacher.tokenizer,
        None if teacher.vae is None else dict(teacher.vae.config),
    )


def _fingerprint(
    scheduler: Path, networks: "Mapping[Path, nn.Module]", further: Sequence[Path]
) -> str:
    from edgedistill.models import store

    files = [scheduler]
    for folder, network in networks.items():
        files += [folder / "config.json", *store.weights_of(network, folder).all]
    return hashlib.sha256("\n".join(map(sha256, [*files, *further])).encode()).hexdigest()
