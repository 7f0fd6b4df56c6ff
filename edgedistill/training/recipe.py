"""The recipe: one YAML file that says teacher, data, student, method and loop; refused before any work."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgedistill.config import build, override, read_yaml
from edgedistill.errors import ConfigError
from edgedistill.methods.guided import GuidedSettings
from edgedistill.models.slim import CutSettings
from edgedistill.training.settings import TrainingSettings

SETTINGS: Mapping[str, type] = {"guided": GuidedSettings}


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on.

    Fields:
        name: Of the student.
        teacher: A packaged one (``digits``), or a diffusers folder with unet/ and scheduler/.
        data: ``digits``, an .npz file, or a folder of images.
        method: Which method; the settings group of the same name belongs to it, and no other may be there.
        seed: Key of all randomness.
        prediction_type: What the student predicts; None: what the teacher does. Another kind needs a longer
            first phase, since the teacher's weights start it off with the wrong one.
        student: How the student is cut from the teacher; None: the teacher's own architecture.
        guided: Settings of guided distillation.
        training: Settings of the loop.
    """

    name: str
    teacher: str
    data: str
    method: Literal["guided"] = "guided"
    seed: int = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    student: CutSettings | None = None
    guided: GuidedSettings | None = None
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        if self.seed < 0:
            msg = f"`seed` must not be negative, got {self.seed}."
            raise ConfigError(msg)
        others = [name for name in SETTINGS if name != self.method and getattr(self, name)]
        if others:
            msg = f"The method is {self.method!r}; the settings of {', '.join(others)} do not belong to it, take them out."
            raise ConfigError(msg)

    @property
    def settings(self) -> Any:
        """The method's settings; its defaults where the recipe has none."""
        return getattr(self, self.method) or SETTINGS[self.method]()

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file and apply ``key=value`` overrides.

        Raises:
            ConfigError: Naming every unknown, missing or impossible setting.
        """
        return build(cls, override(read_yaml(path), overrides), str(path))

    def to_json(self) -> dict[str, Any]:
        """Return the resolved settings as plain JSON data."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for name in SETTINGS:
            del data[name]
        return {**data, self.method: json.loads(json.dumps(dataclasses.asdict(self.settings)))}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all settings that change the weights; how often to log or save is left out."""
        data = self.to_json()
        for name in ("checkpoint_every", "preview_every", "log_every", "tensorboard"):
            del data["training"][name]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
