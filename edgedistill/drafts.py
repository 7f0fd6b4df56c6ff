"""A bundle being written: aside, from what is there, and renamed into place as a whole."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill import carried
from edgedistill.bundle import CALIBRATION, Artifact, Bundle
from edgedistill.carried import members
from edgedistill.errors import BundleError
from edgedistill.files import sha256, written_aside
from edgedistill.manifest import MANIFEST, read_manifest, seal_manifest
from edgedistill.table import SamplerTable
from edgedistill.tables import DEFAULT, Tables, golden_file, save_tables, tokenizers_of


@dataclass(frozen=True)
class Draft:
    """A bundle being written: a folder aside, filled by a writer and then renamed into place."""

    root: Path
    artifacts: dict[str, Artifact]

    def add(self, artifact: Artifact) -> None:
        """Record an artifact whose files the writer has put under `root`."""
        self.artifacts[artifact.name] = artifact


def start_from(target: Path, fresh: Bundle, *, overwrite: bool) -> Bundle:
    """Return what a writer at `target` starts from: the bundle of the same student there, or else `fresh`.

    Args:
        target: The folder that will be written.
        fresh: What to start from where there is no bundle yet.
        overwrite: Start from `fresh` whatever `target` holds.

    Raises:
        BundleError: If `target` holds a bundle of another student, or a damaged one.
    """
    if overwrite or not (target / MANIFEST).is_file():
        return fresh
    held = Bundle.open(target)
    if held.fingerprint != fresh.fingerprint:
        raise another_student(target, held, fresh.name, fresh.samplers)
    return held


def another_student(target: Path, held: Bundle, name: str, samplers: Tables) -> BundleError:
    """Return what refuses to write a student to a folder that holds the bundle of another one.

    Args:
        target: The folder.
        held: What is there.
        name, samplers: Of the student that would be written.
    """
    way_out = "choose another folder, or give --overwrite to replace it."
    msg = f"{target}: holds a bundle of another student ({held.name!r}); {way_out}"
    if held.name == name and held.samplers != samplers:
        there, asked = _described(held.table), _described(samplers[DEFAULT])
        msg = f"{target}: holds {held.name!r} with other samplers (default there: {there}; asked for: {asked}); ask for the same steps, scheduler, guidance and size, {way_out}"
    return BundleError(msg)


def _described(table: SamplerTable) -> str:
    size = "x".join(map(str, table.stages[-1].shape))
    return f"{len(table.rows)} rows of {size}, guidance {table.guidance.mode} at {table.guidance.default:g}"


def refuse_taken(target: Path) -> None:
    """Refuse to write a bundle to a place that is taken by something else.

    Raises:
        BundleError: If it is.
    """
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken and not (target / MANIFEST).is_file():
        msg = f"{target}: exists and is not a bundle; choose another folder or remove it."
        raise BundleError(msg)


def write_bundle(
    target: Path,
    base: Bundle,
    fill: Callable[[Draft], None],
    keep: Iterable[str] = (),
) -> Bundle:
    """Write a bundle aside, let `fill` add artifacts, and rename it into place.

    Args:
        target: Folder to make or replace; an existing one must be empty or a bundle.
        base: What the new bundle starts from: its tables, tokenizers, probes, provenance; of a bundle also
            every file that belongs to no artifact, such as what the loaders of pipelines read. If it lies at
            `target`, files that its manifest does not list, such as a card, stay too and are not listed
            either, but for those beside what is replaced, such as models compiled of it.
        fill: Puts files under ``draft.root`` and records them with ``draft.add``. Files of artifacts that are
            kept may be those of the old bundle: it replaces them, if at all, and never writes into them.
        keep: Names of the artifacts of `base` that the new bundle keeps.

    Raises:
        BundleError: If `target` is something else than a bundle, or cannot be written.
    """
    refuse_taken(target)
    kept = {name: base.artifacts[name] for name in keep}
    is_added_to = (target / MANIFEST).is_file() and base.root.resolve() == target.resolve()
    listed = read_manifest(base.root)["files"] if is_added_to else {}
    with written_aside(target) as aside:
        for name in _loose(base):
            carried.copy(base.path(name), aside / name)
        take = carried.link if is_added_to else carried.copy
        paths = {net.path for artifact in kept.values() for net in artifact.networks.values()}
        for path in {part for name in paths for part in members(base.path(name))}:
            take(path, aside / path.relative_to(base.root))
        draft = Draft(aside, dict(kept))
        fill(draft)
        made = dataclasses.replace(base, root=aside, artifacts=draft.artifacts)
        same = (k for k in listed if carried.is_one_file(base.root / k, aside / k))
        write_manifest(made, {name: listed[name] for name in same})
        if is_added_to:
            _carry_unlisted(base, listed, kept, aside)
    written = Bundle.open(target, whole=False)
    written.unverified.clear()  # the hashes of all were taken just now
    return written


def _carry_unlisted(
    base: Bundle, listed: Collection[str], kept: Collection[str], aside: Path
) -> None:
    """Take over what others put into a bundle, but for what may be made of artifacts that are not kept."""
    gone = [item for name, item in base.artifacts.items() if name not in kept]
    replaced = [net.path for artifact in gone for net in artifact.networks.values()]
    for name in carried.unlisted(base.root, {MANIFEST, *listed}, replaced):
        if not (aside / name).exists():
            carried.link(base.root / name, aside / name)


def write_manifest(bundle: Bundle, known: Mapping[str, Any] | None = None) -> None:
    """Hash every file under the bundle's folder and write its tables and manifest.

    Args:
        bundle: Its files are there.
        known: Entries of files, by name, whose hashes are known to hold.
    """
    save_tables(bundle.root, bundle.samplers)
    paths = [path for path in sorted(bundle.root.rglob("*")) if path.is_file()]
    names = {path.relative_to(bundle.root).as_posix(): path for path in paths}
    files = {
        name: (known or {}).get(name) or {"sha256": sha256(path), "bytes": path.stat().st_size}
        for name, path in names.items()
        if name != MANIFEST
    }
    data = {
        "name": bundle.name,
        "fingerprint": bundle.fingerprint,
        "provenance": dict(bundle.provenance),
        "artifacts": {name: item.to_json() for name, item in bundle.artifacts.items()},
        "files": files,
    }
    seal_manifest(bundle.root, data)


def _loose(base: Bundle) -> Iterable[str]:
    """Return what belongs to no artifact: of a bundle all of it, of something else what a bundle needs of it."""
    root = base.root
    if not (root / MANIFEST).is_file():
        probes = [CALIBRATION, *map(golden_file, base.samplers)]
        return [*(name for name in probes if (root / name).exists()), *tokenizers_of(base.samplers)]
    data = read_manifest(root)
    held = [net["path"] for item in data["artifacts"].values() for net in item["networks"].values()]
    owned = {part for path in held for part in members(root / path)}
    return [
        name for name in data["files"] if owned.isdisjoint([root / name, *(root / name).parents])
    ]
