"""The public face of a bundle: `load` it on a runtime, call it, get samples."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgedistill import plugins
from edgedistill.bundle import Artifact, Bundle, NetworkFile
from edgedistill.conditions import Tokenize, entries, network_conditions
from edgedistill.contract import Feeds, Signature
from edgedistill.edits import baked, edited, guided
from edgedistill.errors import BundleError, ContractError, MissingDependencyError
from edgedistill.generator import run_generator
from edgedistill.network import Session
from edgedistill.noise import Bank, bank_shapes, noise_bank
from edgedistill.opened import Networks
from edgedistill.sampler import Observer, RowTrace, run_table
from edgedistill.table import SamplerTable
from edgedistill.tables import DEFAULT, Tables, choose, encoders_of, tokenizers_of
from edgedistill.tiling import Tiling, in_tiles

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "prompt"
_PATIENCE = 1.0  # seconds before a bar is shown


class Runtime(Protocol):
    """What an entry point of the group ``edgedistill.runtimes`` must be (a module will do)."""

    def open(self, path: Path, signature: Signature, options: Mapping[str, Any]) -> Session:
        """Open one network file and return a callable over arrays by name."""

    def describe(self, options: Mapping[str, Any]) -> str:
        """Say in a few words what runs a network under these options, such as ``"ONNX Runtime 1.31 (CPU)"``."""


@dataclass(frozen=True)
class Samples:
    """What a pipeline returns.

    Fields:
        array: float32 (batch, channels, height, width) in the table's value range.
        value_range: Values of black and white.
    """

    array: np.ndarray
    value_range: tuple[float, float] = (-1.0, 1.0)

    @property
    def images(self) -> "list[Image]":
        """One PIL image per sample."""
        from edgedistill.images import to_pil

        return to_pil(self.array, self.value_range)

    def grid(self, columns: int | None = None, scale: int = 1) -> "Image":
        """All samples on one sheet."""
        from edgedistill.images import grid

        return grid(self.array, columns, self.value_range, scale)


class Pipeline:
    """An artifact of a bundle, opened on a runtime, with the bundle's sampler tables.

    Of several students, those are open that the last request needed, and no others; what makes latents of
    images is opened when there is one.

    Args:
        bundle: An opened bundle.
        artifact: Which artifact to run.
        options: Handed to the runtime, such as ``{"device": "GPU"}``.
        progress: A bar over the rows on stderr; None: where stderr is a terminal and it takes over a second.
        low_memory: Keep nothing open between requests, and text encoder, sampler's networks and decoder
            one after another: each request opens them anew.
        vae_tiling: How to cut the latents that the decoder is given, for less memory; None: not at all.

    Raises:
        ConfigError: If they are to be cut, and the artifact has no decoder that takes parts of them.
    """

    def __init__(
        self,
        bundle: Bundle,
        artifact: Artifact,
        options: Mapping[str, Any] | None = None,
        *,
        progress: bool | None = None,
        low_memory: bool = False,
        vae_tiling: Tiling | None = None,
    ) -> None:
        if reason := why_not(bundle, artifact):
            raise BundleError(reason)
        self.bundle = bundle
        self.progress = progress
        self.artifact = artifact
        self.samplers = _samplers(bundle, artifact)
        self.table = self.samplers[DEFAULT]
        self._tokenize: Tokenize | None = None
        self.runtime: Runtime = plugins.find(plugins.RUNTIMES, artifact.runtime)
        brief, around = self._brief(), self._around()
        lasting = [] if low_memory else [name for name in artifact.networks if name not in brief]

        def opener(file: NetworkFile) -> Session:
            return self.runtime.open(bundle.path(file.path), file.signature, options or {})

        cut = vae_tiling and in_tiles(opener, artifact, bundle.samplers, vae_tiling)
        self.networks = Networks(
            artifact.networks,
            cut or opener,
            lasting,
            around if low_memory else (),
        )
        for name in lasting:
            self.networks[name]

    def _brief(self) -> set[str]:
        """Return the networks that a request may do without: students, and what makes latents of images."""
        tables = self.bundle.samplers
        routers = [table.router for table in tables.values() if table.router]
        return {name for router in routers for name in router.networks} | {*encoders_of(tables)}

    def _around(self) -> set[str]:
        """Return the networks that no row calls: encoders and decoders."""
        rows = [row for table in self.bundle.samplers.values() for row in table.rows]
        routers = [table.router for table in self.bundle.samplers.values() if table.router]
        called = {name for row in rows for name in row.call}
        called |= {name for router in routers for name in router.networks}
        return set(self.artifact.networks) - called

    def __call__(
        self,
        n: int | None = None,
        *,
        seed: int | Sequence[int] = 0,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        noise: Bank | None = None,
        observe: Observer | None = None,
        strength: float | None = None,
        negative_prompt: str | None = None,
        **conditions: Any,
    ) -> Samples:
        """Sample.

        Args:
            n: Number of samples; None: as many as the seeds, the noise or the conditions say, else 1.
            seed: Of the first sample; sample i uses ``seed + i``, whatever the batch. Or one per sample.
            guidance_scale: g, where 1 is no guidance; None: the table's default.
            sampler: Name of one of `bundle.samplers`; None: the artifact's own, else the default.
            noise: A noise bank to use instead of the seeds.
            observe: Called after every row with its `RowTrace`.
            strength: How far to go from ``image=...``: above 0 and up to 1, which is all the way.
            negative_prompt: What guidance leads away from; for models whose guidance is a second call.
            **conditions: One entry per sample, or one for all, by name: ``class_labels=[3, 1, 4]``. A class
                that is left out runs through all classes in turn, a text through its examples; ``prompt``
                stands for the text's own name. ``image`` and ``mask`` (1: draw anew, 0: keep) are arrays
                in the value range or PIL images, of the model's size.

        Raises:
            ConfigError: If there is no such sampler, or it cannot make such an edit.
            ContractError: If a condition is unknown or out of range, guidance is not this model's to
                choose, or the noise does not fit.
        """
        table = choose(self.samplers, sampler or self.artifact.sampler)
        given = _by_name(table, conditions)
        table = edited(table, given, strength, self._image_shape(table))
        if negative_prompt is not None or (
            table.guidance.mode == "cfg" and guidance_scale is not None
        ):
            scale = table.guidance.default if guidance_scale is None else guidance_scale
            table = guided(table, scale, negative_prompt)
        count = _count(table, n, seed, noise, given)
        bank = noise if noise is not None else noise_bank(table, _seeds(seed, count))
        _check_noise(table, bank, count)
        inputs = network_conditions(table, count, guidance_scale, given, self.tokenize)
        self.networks.begin()
        array = self._run(table, bank, inputs, observe)
        self.networks.close_unused()
        low, high = table.space["value_range"]
        return Samples(np.asarray(array), (low, high))

    def _run(
        self, table: SamplerTable, bank: Bank, inputs: Feeds, observe: Observer | None
    ) -> np.ndarray:
        artifact = self.artifact
        if artifact.sampler is None:
            with _bar(table, observe, shown=self.progress) as observer:
                return run_table(table, self.networks, bank, inputs, observer)
        if table != self.samplers[artifact.sampler] or observe is not None:
            msg = f"Artifact {artifact.name!r} is the sampler {artifact.sampler!r} as one graph: it runs no other, edits no image, holds its CFG scale and null text, and shows no steps; choose another artifact."
            raise ContractError(msg)
        return run_generator(table, self.networks, bank, inputs)

    def _image_shape(self, table: SamplerTable) -> tuple[int, int, int] | None:
        """Return the (channels, height, width) of what the decoder makes; None where there is none."""
        for item in (self.artifact, *self.bundle.artifacts.values()):
            if table.decoder is not None and table.decoder in item.networks:
                file = item.networks[table.decoder]
                _, channels, height, width = file.signature.outputs[0].shape
                if isinstance(height, int) and isinstance(width, int):  # else they are free
                    return int(channels), height, width
        return None

    @property
    def tokenize(self) -> Tokenize | None:
        """What turns prompts into tokens; None where the bundle holds no tokenizer."""
        names = tokenizers_of(self.bundle.samplers)
        if not names:
            return None
        from edgedistill.text import open_readers

        if self._tokenize is None:
            self._tokenize = open_readers([self.bundle.path(name) for name in names])
        return self._tokenize


def load(
    bundle: Bundle | Path | str,
    runtime: str | None = None,
    artifact: str | None = None,
    *,
    progress: bool | None = None,
    low_memory: bool = False,
    vae_tiling: Tiling | None = None,
    **options: Any,
) -> Pipeline:
    """Open a bundle on a runtime.

    Args:
        bundle: A bundle or its folder.
        runtime: ``torch``, ``onnxruntime``, ``openvino``, ``coreml``, or one that another distribution
            registers; None: the runtime of the artifact.
        artifact: Name of an artifact; None: the first of the runtime. Where both are None: the first
            artifact whose runtime is installed, PyTorch last.
        progress, low_memory, vae_tiling: See `Pipeline`.
        **options: Handed to the runtime.

    Raises:
        ConfigError: If the runtime is unknown, or its decoder takes no tiles.
        BundleError: If the bundle does not hold, or has no such artifact, or one that lacks networks.
        MissingDependencyError: If the runtime's package is not installed.
    """
    if runtime is not None:
        runtime = plugins.ALIASES.get(runtime, runtime)
        plugins.find(plugins.RUNTIMES, runtime)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, whole=False)
    ways: dict[str, Any] = {
        "progress": progress,
        "low_memory": low_memory,
        "vae_tiling": vae_tiling,
    }
    if runtime is None and artifact is None:
        return _load_first(opened, options, **ways)
    return Pipeline(opened, opened.artifact(artifact, runtime), options, **ways)


def preferred(bundle: Bundle) -> list[Artifact]:
    """Return the artifacts that run whole, in the order in which they are tried where none is named."""
    whole = [item for item in bundle.artifacts.values() if why_not(bundle, item) is None]
    return sorted(whole, key=lambda item: item.runtime == "torch")


def _load_first(bundle: Bundle, options: Mapping[str, Any], **ways: Any) -> Pipeline:
    """Open the first artifact whose runtime is installed; where none is, say what the first one lacks."""
    ordered = preferred(bundle)
    missing: list[MissingDependencyError] = []
    for item in ordered:
        try:
            return Pipeline(bundle, item, options, **ways)
        except MissingDependencyError as error:
            missing.append(error)
    if missing:
        raise missing[0]
    return Pipeline(bundle, bundle.artifact(), options, **ways)


def why_not(bundle: Bundle, artifact: Artifact) -> str | None:
    """Say what an artifact lacks to make samples, and how it is added; None: nothing."""
    optional = encoders_of(bundle.samplers)
    lacking = [name for name in bundle.lacking(artifact) if name not in optional]
    if not lacking:
        return None
    export = (
        f"edgedistill export {artifact.format} -m MODEL {bundle.root} --dtype {artifact.precision}"
    )
    return f"{bundle.root}: {artifact.name} has no graph of {', '.join(lacking)}; add what lacks with `{export} --networks {' '.join(lacking)}`, or run another artifact."


@contextlib.contextmanager
def _bar(
    table: SamplerTable, observe: Observer | None, *, shown: bool | None
) -> Iterator[Observer | None]:
    """Give an observer that also moves a bar, where one is to be shown."""
    if shown is False or not (shown or sys.stderr.isatty()):
        yield observe
        return
    from tqdm import tqdm

    delay = 0.0 if shown else _PATIENCE
    with tqdm(total=len(table.rows), unit="row", delay=delay, leave=False) as bar:

        def move(trace: RowTrace) -> None:
            bar.update()
            if observe is not None:
                observe(trace)

        yield move


def _samplers(bundle: Bundle, artifact: Artifact) -> Tables:
    """Return a bundle's tables as an artifact runs them: a guidance scale may lie in its graphs, and the encoder of images lack."""
    made = dict(bundle.samplers)
    for name, table in made.items():
        if artifact.guidance_scale is not None:
            made[name] = baked(table, artifact.guidance_scale)
        if table.encoder in bundle.lacking(artifact):
            made[name] = replace(made[name], encoder=None)
    return made


def _by_name(table: SamplerTable, given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is None, and call the prompt by the text condition's name."""
    text = table.condition("text")
    names = {PROMPT: text.name} if text else {}
    return {names.get(name, name): value for name, value in given.items() if value is not None}


def _count(
    table: SamplerTable, n: int | None, seed: Any, noise: Bank | None, given: Mapping[str, Any]
) -> int:
    known = {item.name: item for item in table.conditions}
    found = [entries(known[name], value) for name, value in given.items() if name in known]
    sizes = [size for size in found if size is not None]
    sizes += [] if np.ndim(seed) == 0 else [len(seed)]
    sizes += [] if not noise else [len(noise[0])]
    count = n if n is not None else (sizes[0] if sizes else 1)
    if count < 1 or any(size != count for size in sizes):
        msg = f"Number of samples, seeds, noise and conditions must agree, got n={n} and {sizes}."
        raise ContractError(msg)
    return count


def _check_noise(table: SamplerTable, bank: Bank, count: int) -> None:
    shapes = bank_shapes(table)
    if len(bank) != len(shapes):
        msg = f"The noise bank must hold {len(shapes)} arrays, got {len(bank)}."
        raise ContractError(msg)
    for index, (array, shape) in enumerate(zip(bank, shapes, strict=True)):
        if array.shape != (count, *shape) or array.dtype != np.float32:
            wanted = "x".join(map(str, (count, *shape)))
            msg = f"Noise {index} must be float32 {wanted}, got {array.dtype} {'x'.join(map(str, array.shape))}."
            raise ContractError(msg)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    first = [int(item) for item in np.atleast_1d(np.asarray(seed, dtype=object))]
    return [first[0] + i for i in range(count)] if np.ndim(seed) == 0 else first
