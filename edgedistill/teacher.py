"""The teacher: a frozen network with the scheduler it was trained on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.compiler import compile_scheduler
from edgedistill.contract import Signature
from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import read_json, sha256
from edgedistill.table import Condition, Guidance, SamplerTable

if TYPE_CHECKING:
    from torch import nn

PACKAGED = {"digits": Path(str(resources.files("edgedistill"))) / "assets" / "digits_teacher"}
SCHEDULER = "scheduler_config.json"


@dataclass(frozen=True, eq=False)
class Teacher:
    """An opened teacher.

    Fields:
        name: As it was asked for: ``"digits"``, or a path.
        network: float32, in evaluation mode, frozen.
        scheduler: diffusers' scheduler configuration, plain JSON data.
        signature: What the network takes and gives.
        classes: Number of classes that may be asked for, the null class not counted; None: unconditional.
        null: Values of the conditions that stand for "no condition", such as ``{"class_labels": 10}``;
            empty where the network was not trained with one.
        fingerprint: SHA-256 over configurations and weights.
    """

    name: str
    network: "nn.Module"
    scheduler: Mapping[str, Any]
    signature: Signature
    classes: int | None
    null: Mapping[str, float]
    fingerprint: str

    @property
    def prediction_type(self) -> str:
        """What the network predicts: ``epsilon``, ``sample`` or ``v_prediction``."""
        return self.scheduler.get("prediction_type", "epsilon")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a sample."""
        _, channels, height, width = self.signature.inputs[0].shape
        return int(channels), int(height), int(width)

    def table(
        self, num_steps: int, guidance_scale: float = 1.0, spacing: str | None = None
    ) -> SamplerTable:
        """Return the table that samples this teacher as its own scheduler would.

        Args:
            num_steps: Rows; each calls the network twice where there is guidance.
            guidance_scale: g, where 1 is no guidance.
            spacing: ``trailing``, ``leading`` or ``linspace``; None: as the scheduler's configuration says.

        Raises:
            ConfigError: If the scheduler cannot be compiled, or guidance is asked of a network without a
                null class.
        """
        if guidance_scale != 1 and not self.null:
            msg = f"{self.name}: guidance needs a null class, and this teacher has none; use guidance_scale=1."
            raise ConfigError(msg)
        limits = (guidance_scale, guidance_scale)
        cfg = Guidance(mode="cfg", default=guidance_scale, range=limits, null=self.null)
        labels = self.signature.input("class")
        return compile_scheduler(
            {**self.scheduler, **({"timestep_spacing": spacing} if spacing else {})},
            num_steps,
            shape=self.shape,
            guidance=Guidance() if guidance_scale == 1 else cfg,
            conditions=(Condition(labels.name, "class", self.classes),) if labels else (),
            clamp=(-1.0, 1.0),
        )

    @classmethod
    def open(cls, name: str | Path, *, null_class: bool = True) -> "Teacher":
        """Open the packaged teacher ``"digits"``, or a folder that diffusers wrote.

        Args:
            name: ``"digits"``; or a folder with ``unet/`` and ``scheduler/``; or the folder of one network
                with ``scheduler_config.json`` in it or in its parent.
            null_class: Whether the network's last class embedding stands for "no class".

        Raises:
            BundleError: If a file is missing, damaged, a pickle, or of a class that is not known.
        """
        from edgedistill.models import store

        root = PACKAGED.get(str(name), Path(name))
        folder = root / "unet" if (root / "unet").is_dir() else root
        if not folder.is_dir():
            msg = f"{name}: no such teacher; give {', '.join(map(repr, PACKAGED))} or a diffusers folder with unet/ and scheduler/."
            raise BundleError(msg)
        scheduler = _scheduler_file(root)
        network = store.load(folder)
        signature = store.signature(network)
        embeddings = store.config_of(network).get("num_class_embeds")
        labels = signature.input("class")
        null = {labels.name: embeddings - 1} if labels and embeddings and null_class else {}
        return cls(
            name=str(name),
            network=network,
            scheduler=read_json(scheduler),
            signature=signature,
            classes=embeddings - len(null) if embeddings else None,
            null=null,
            fingerprint=_fingerprint(scheduler, folder / "config.json", folder / store.WEIGHTS),
        )


def _fingerprint(*files: Path) -> str:
    return hashlib.sha256("\n".join(map(sha256, files)).encode()).hexdigest()


def _scheduler_file(root: Path) -> Path:
    places = [root / "scheduler" / SCHEDULER, root / SCHEDULER, root.parent / SCHEDULER]
    places.append(root.parent / "scheduler" / SCHEDULER)
    for path in places:
        if path.is_file():
            return path
    msg = f"{root}: has no {SCHEDULER} in scheduler/ or beside the network; without it the schedule and the prediction type are unknown."
    raise BundleError(msg)
