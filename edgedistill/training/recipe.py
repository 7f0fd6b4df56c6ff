"""The recipe: one YAML file that says teacher, data, student, method and loop; refused before any work."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgedistill.config import build, override, read_yaml
from edgedistill.errors import ConfigError
from edgedistill.methods.registry import METHODS
from edgedistill.models.lora import LoraSettings
from edgedistill.models.slim import CutSettings
from edgedistill.training.settings import TrainingSettings

# Settings of the loop that leave the weights as they are.
_OF_NO_WEIGHT = (
    "checkpoint_every",
    "preview_every",
    "log_every",
    "tensorboard",
    "gradient_checkpointing",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on; `recipe_class` adds the settings group that is named like the method.

    Fields:
        name: Of the student.
        teacher: A packaged one (``digits``), or a diffusers folder with unet/ and scheduler/.
        null_class: Whether the teacher's last class embedding stands for "no class".
        data: What `edgedistill.data.open_dataset` opens.
        cache: Folder to keep latents and embedded captions in; None: they are made anew, in memory.
        method: Which method, by its name in `edgedistill.methods.registry`.
        seed: Key of all randomness.
        prediction_type: What the student predicts; None: what the teacher does. Another kind needs a longer
            first phase, since the teacher's weights start it off with the wrong one.
        student: How the student is cut from the teacher; None: the teacher's own architecture.
        lora: Train low-rank updates of the students alone; None: whole weights.
        training: Settings of the loop.
    """

    name: str
    teacher: str
    null_class: bool = True
    data: str
    cache: str | None = None
    method: str = "guided"
    seed: int = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    student: CutSettings | None = None
    lora: LoraSettings | None = None
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        if self.seed < 0:
            msg = f"`seed` must not be negative, got {self.seed}."
            raise ConfigError(msg)

    @property
    def settings(self) -> Any:
        """The method's settings."""
        return getattr(self, self.method)

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file and apply ``key=value`` overrides.

        Raises:
            ConfigError: Naming every unknown, missing or impossible setting; the settings of another
                method are unknown.
        """
        data = override(read_yaml(path), overrides)
        method = data.get("method", cls.method)
        if method not in METHODS:
            msg = f"{path}: `method` must be one of {', '.join(METHODS)}, got {method!r}."
            raise ConfigError(msg)
        return build(recipe_class(method), data, str(path))

    def to_json(self) -> dict[str, Any]:
        """Return the resolved settings as plain JSON data."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all settings that change the weights; what leaves them as they are is left out."""
        data = self.to_json()
        del data["cache"]
        for name in _OF_NO_WEIGHT:
            del data["training"][name]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@functools.cache
def recipe_class(method: str) -> type[Recipe]:
    """Return the class of the recipes of a method, by name."""
    settings = METHODS[method].settings
    added = (method, settings, field(default_factory=settings))
    return dataclasses.make_dataclass("Recipe", [added], bases=(Recipe,), frozen=True, kw_only=True)
