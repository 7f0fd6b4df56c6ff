"""The bundle: one folder with artifacts, sampler table, probes, golden tensors and their hashes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill import carried
from edgedistill.carried import holds, members
from edgedistill.contract import Signature
from edgedistill.errors import BundleError
from edgedistill.files import inside, read_json
from edgedistill.manifest import (
    MANIFEST,
    check_hash,
    check_seal,
    check_size,
    read_manifest,
)
from edgedistill.table import SPEC_VERSION, SamplerTable, check_version
from edgedistill.tables import (
    DEFAULT,
    TABLE,
    Tables,
    further_names,
    golden_file,
    load_further,
    networks_of,
    table_file,
    tokenizers_of,
)

GOLDEN = golden_file(DEFAULT)
CALIBRATION = "probes/calibration.safetensors"
REFERENCE = "torch-float32"


@dataclass(frozen=True)
class NetworkFile:
    """One network of an artifact: its path in the bundle (a file or a folder) and its signature."""

    path: str
    signature: Signature


@dataclass(frozen=True)
class Artifact:
    """One way to run the model: every network in one format and precision.

    Fields:
        name: Unique in the bundle, such as ``"onnx-float32"``.
        runtime: Entry-point name of the runtime that opens it.
        format: ``torch``, ``onnx``, ``openvino`` or ``coreml``.
        precision: ``float32``, ``float16``, ``int8``, ``int8-weights``, ``palette6``; keys the thresholds.
        networks: One file per network that a table calls; what is the same is one file.
        made_with: Options and versions of the tools that wrote it.
        sampler: Name of the table that it is as one graph, see `edgedistill.generator`; None: it runs any.
        guidance_scale: The one that lies in its graphs, where the student's networks take any; None: as they do.
    """

    name: str
    runtime: str
    format: str
    precision: str
    networks: Mapping[str, NetworkFile]
    made_with: Mapping[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    guidance_scale: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, without the name."""
        scale = self.guidance_scale
        return {
            "runtime": self.runtime,
            "format": self.format,
            "precision": self.precision,
            "networks": {
                name: {"path": net.path, "signature": net.signature.to_json()}
                for name, net in self.networks.items()
            },
            "made_with": dict(self.made_with),
            **({"sampler": self.sampler} if self.sampler else {}),
            **({} if scale is None else {"guidance_scale": scale}),
        }

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> "Artifact":
        """Read what `to_json` wrote."""
        networks = {
            key: NetworkFile(item["path"], Signature.from_json(item["signature"]))
            for key, item in data["networks"].items()
        }
        plain = {key: data[key] for key in ("runtime", "format", "precision", "made_with")}
        further: dict[str, Any] = {key: data.get(key) for key in ("sampler", "guidance_scale")}
        return cls(name, networks=networks, **plain, **further)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Fields:
        root: The folder.
        name: The model's name, for people.
        fingerprint: SHA-256 over the student's weights and table; equal for all artifacts of one student.
        table: The sampler.
        artifacts: By name.
        provenance: Where the student came from, what made it, versions.
        further: Other samplers over the same networks (``samplers/NAME.json``), by name.
        unverified: What the manifest says of the files whose hashes have not been taken yet, by path.
    """

    root: Path
    name: str
    fingerprint: str
    table: SamplerTable
    artifacts: Mapping[str, Artifact]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    further: Tables = field(default_factory=dict)
    unverified: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def samplers(self) -> Tables:
        """All tables by name, the default first."""
        return {DEFAULT: self.table, **dict(sorted(self.further.items()))}

    @classmethod
    def open(cls, root: Path | str, *, whole: bool = True) -> "Bundle":
        """Open a bundle whose schema and every hash hold.

        Args:
            root: Its folder.
            whole: Take the hash of every file now. Else of manifest and tables, and of any other file when
                `path` first gives it out; that all are there in their sizes is checked in either case.

        Raises:
            BundleError: If the manifest is missing, malformed or newer than this release, names a
                file outside of the folder, or a file is missing or differs from its hash.
        """
        root = Path(root)
        data = read_manifest(root)
        try:
            bundle = _checked(root, data)
            if whole:
                bundle._verify(list(bundle.unverified))
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"{root / MANIFEST}: malformed ({type(error).__name__}: {error}); make the bundle anew."
            raise BundleError(msg) from error
        return bundle

    def path(self, relative: str) -> Path:
        """Return the path of a file in the bundle, or of a folder; what is read of it fits its hash.

        Raises:
            BundleError: If it lies outside of the bundle, is missing, or differs from its hash.
        """
        path = inside(self.root, relative)
        if not path.exists():
            msg = f"{path}: no such file in the bundle."
            raise BundleError(msg)
        for part in members(path):
            name = part.relative_to(self.root).as_posix()
            self._verify([held for held in self.unverified if holds(name, held)])
        return path

    def _verify(self, names: Iterable[str]) -> None:
        for name in names:
            check_hash(self.root / name, self.unverified[name])
            del self.unverified[name]

    def artifact(self, name: str | None = None, runtime: str | None = None) -> Artifact:
        """Return an artifact by name, or the first one of a runtime.

        Raises:
            BundleError: If there is none, or the named one belongs to another runtime.
        """
        fitting = [
            item
            for item in self.artifacts.values()
            if name in (None, item.name) and runtime in (None, item.runtime)
        ]
        if not fitting:
            held = ", ".join(f"{a.name} ({a.runtime})" for a in self.artifacts.values())
            wanted = f"artifact {name!r}" if name else "artifact"
            wanted += f" for runtime {runtime!r}" if runtime else ""
            msg = f"{self.root}: no {wanted}; the bundle holds: {held or 'nothing'}."
            raise BundleError(msg)
        return fitting[0]

    def lacking(self, artifact: Artifact) -> tuple[str, ...]:
        """Return the networks of the samplers that an artifact has no graph of."""
        needed = networks_of(self.samplers) if artifact.sampler is None else ()
        return tuple(name for name in needed if name not in artifact.networks)

    @property
    def single_root(self) -> bool:
        """Whether the loaders of pipelines open it, as ``edgedistill export --layout single-root`` lays it out."""
        return (self.root / "model_index.json").is_file()

    def copy(self, relative: str, folder: Path) -> None:
        """Copy a network into a folder, with the weights that lie beside it; names stay as they are."""
        for part in members(self.path(relative)):
            carried.copy(part, folder / part.name)

    def size(self, artifact: Artifact) -> int:
        """Return the bytes of an artifact's files."""
        paths = {self.root / net.path for net in artifact.networks.values()}
        return sum(carried.size(item) for path in paths for item in members(path))


def _checked(root: Path, data: Mapping[str, Any]) -> Bundle:
    """Return the bundle of a manifest that holds, with every file in its size and the tables unchanged."""
    held, files = data["artifacts"], data["files"]
    paths = [net["path"] for item in held.values() for net in item["networks"].values()]
    further = further_names(files)
    # What is unsafe or too new is called that, before any hash says that it was changed.
    for path in (*files, *paths):
        inside(root, path)
    for name in (DEFAULT, *further):
        _refuse_newer_table(root / table_file(name))
    check_seal(root, data)
    for name, expected in files.items():
        check_size(inside(root, name), expected)
    tables = [name for name in map(table_file, (DEFAULT, *further)) if name in files]
    for name in tables:
        check_hash(root / name, files[name])
    bundle = Bundle(
        root,
        data["name"],
        data["fingerprint"],
        SamplerTable.load(root / TABLE),
        {name: Artifact.from_json(name, item) for name, item in held.items()},
        data["provenance"],
        load_further(root, further),
        {name: expected for name, expected in files.items() if name not in tables},
    )
    for path in (TABLE, *tokenizers_of(bundle.samplers), *paths):
        _refuse_unlisted(root, path, files)
    return bundle


def _refuse_newer_table(path: Path) -> None:
    try:
        table = read_json(path)
    except BundleError:
        return  # missing or damaged: its hash will tell
    if isinstance(table, dict) and "spec_version" in table:
        check_version(table["spec_version"], SPEC_VERSION, str(path))


def _refuse_unlisted(root: Path, path: str, files: Mapping[str, Any]) -> None:
    if not any(holds(path, name) for name in files):
        msg = f"{root / path}: used by the bundle, but its manifest holds no hash of it; get the bundle anew."
        raise BundleError(msg)
