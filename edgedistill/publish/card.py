"""The model card: Markdown with the hub's metadata, rendered from a bundle's manifest and a parity report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgedistill.bundle import Artifact, Bundle
from edgedistill.errors import ConfigError
from edgedistill.table import Guidance, SamplerTable
from edgedistill.tables import DEFAULT

FILE = "README.md"
_TAGS = ("diffusion", "few-step", "edgedistill")
_TASKS = {"text": "text-to-image", "image": "image-to-image"}
_RECIPE_FIELDS = ("teacher", "data", "seed")
_REFERENCE_NOTE = """\
Core ML packages that were checked outside of macOS ran in the reference evaluator of the saved ML Program, which is
not the Neural Engine."""


def render(bundle: Bundle, parity: Mapping[str, Any] | None = None) -> str:
    """Return the card.

    Args:
        bundle: What it is about.
        parity: What ``edgedistill parity --json`` printed of this bundle, and maybe of others of this student,
            which are left out; None: the dB of one call, which were taken when each artifact was written.

    Raises:
        ConfigError: If the report is of another student or of none of the bundle's artifacts, or is no parity
            report.
    """
    if parity is not None:
        _check(bundle, parity)
    parts = [
        f"---\n{_metadata(bundle)}\n---\n\n# {bundle.name}\n\n{_summary(bundle)}",
        _section("Samplers", _table(*_samplers(bundle))),
        _section("Networks", _table(*_networks(bundle))),
        _section("Artifacts", _artifacts(bundle, parity)),
        _section("Use", _use(bundle)),
        _section("Where it comes from", _provenance(bundle)),
    ]
    return "\n\n".join(parts) + "\n"


def _check(bundle: Bundle, parity: Mapping[str, Any]) -> None:
    if "fingerprint" not in parity or "artifacts" not in parity:
        msg = "The parity report holds no `fingerprint` and `artifacts`; make it with `edgedistill parity BUNDLE --json`."
        raise ConfigError(msg)
    if parity["fingerprint"] != bundle.fingerprint:
        msg = f"The parity report is of another student ({parity.get('name')!r}), not of {bundle.name!r}; run `edgedistill parity` on {bundle.root}."
        raise ConfigError(msg)
    if not _measured_here(bundle, parity):
        msg = f"The parity report names none of the artifacts of {bundle.root}; run `edgedistill parity` on it."
        raise ConfigError(msg)


def _measured_here(bundle: Bundle, parity: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what a report says of a bundle's artifacts; those of other bundles may be in it too."""
    return [item for item in parity["artifacts"] if item["name"] in bundle.artifacts]


def _metadata(bundle: Bundle) -> str:
    """Return the hub's front matter; JSON strings are YAML."""
    formats = sorted({item.format for item in bundle.artifacts.values()})
    kinds = [item.kind for item in bundle.table.conditions]
    task = next(
        (_TASKS[kind] for kind in kinds if kind in _TASKS), "unconditional-image-generation"
    )
    tags = json.dumps([*_TAGS, *formats])
    return f"library_name: edgedistill\npipeline_tag: {task}\ntags: {tags}"


def _summary(bundle: Bundle) -> str:
    table = bundle.table
    plural = "s" * (table.nfe != 1)
    return (
        f"A diffusion model that makes a sample in {table.nfe:g} evaluation{plural} of its network, as files for "
        f"{_listed(sorted({item.format for item in bundle.artifacts.values()}))}. {_guided(table.guidance)}"
    )


def _guided(guidance: Guidance) -> str:
    low, high = guidance.range
    match guidance.mode:
        case "embedded":
            return f"Guidance is an input: scales from {low:g} to {high:g}, {guidance.default:g} by default."
        case "baked":
            return f"Guidance is baked in at scale {guidance.default:g}; no other can be asked for."
        case "cfg":
            return f"Guidance takes a second call per step, at scale {guidance.default:g}."
    return "It is not guided."


def _samplers(bundle: Bundle) -> tuple[Sequence[str], list[list[str]]]:
    headers = ("sampler", "rows", "evaluations", "noise arrays", "makes", "takes")
    return headers, [
        [
            "(default)" if name == DEFAULT else name,
            str(len(table.rows)),
            f"{table.nfe:g}",
            str(table.noise_count),
            " x ".join(map(str, table.stages[-1].shape)) + (" latents" if _latent(table) else ""),
            ", ".join(f"{item.name} ({item.kind})" for item in table.conditions) or "nothing",
        ]
        for name, table in bundle.samplers.items()
    ]


def _latent(table: SamplerTable) -> bool:
    return table.space.get("kind") == "latent"


def _networks(bundle: Bundle) -> tuple[Sequence[str], list[list[str]]]:
    parameters = bundle.provenance.get("parameters", {})
    reference = next(iter(bundle.artifacts.values()))
    return ("network", "parameters", "inputs", "outputs"), [
        [
            name,
            f"{parameters[name]:,}" if name in parameters else "",
            *(
                ", ".join(f"{spec.name} {_shape(spec.shape)}" for spec in side)
                for side in (file.signature.inputs, file.signature.outputs)
            ),
        ]
        for name, file in reference.networks.items()
    ]


def _shape(sizes: Sequence[int | str]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"


def _artifacts(bundle: Bundle, parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        named = ("artifact", "runtime", "precision", "MB", "dB SNR of one call")
        rows = [
            [*_named(item), f"{bundle.size(item) / 1e6:.2f}", _number(item.made_with.get("snr_db"))]
            for item in bundle.artifacts.values()
        ]
        note = "One call of each network against PyTorch, when it was written; 999 is equal bits. Run `edgedistill parity` for every row."
        return f"{_table(named, rows)}\n\n{note}"
    headers = (
        "artifact",
        "runtime",
        "precision",
        "MB",
        "verdict",
        "worst row, dB",
        "samples, dB",
        "PSNR, dB",
    )
    rows = [list(_measured(item)) for item in _measured_here(bundle, parity)]
    versions = ", ".join(f"{k} {v}" for k, v in parity.get("environment", {}).items())
    note = (
        f"dB of signal to noise against PyTorch from the same noise, {parity['batch']} samples: the worst row's prediction, "
        f"each row fed the reference's state; and the finished samples. Measured with {versions}."
    )
    return f"{_table(headers, rows)}\n\n{note}"


def _named(artifact: Artifact) -> tuple[str, str, str]:
    return artifact.name, artifact.runtime, artifact.precision


def _measured(item: Mapping[str, Any]) -> Iterator[str]:
    own = item.get("sampler", DEFAULT)
    yield item["name"] if own == DEFAULT else f"{item['name']}, {own}"
    yield from (item["runtime"], item["precision"], f"{item['size'] / 1e6:.2f}", item["verdict"])
    forced = [row["teacher_forced"] for row in item["rows"]]
    yield _number(min((row["raw"]["snr_db"] for row in forced if "raw" in row), default=None))
    image = item.get("image") or {}
    yield from (_number(image.get("snr_db")), _number(image.get("psnr_db")))


def _use(bundle: Bundle) -> str:
    artifacts = bundle.artifacts.values()
    runtime = next((item.runtime for item in artifacts if item.runtime != "torch"), "torch")
    given = 'prompt="...", ' if bundle.table.condition("text") else ""
    return f"""```python
import edgedistill

pipeline = edgedistill.load("FOLDER", runtime="{runtime}")
pipeline({given}n=4, seed=0).grid().save("grid.png")
```

`edgedistill parity FOLDER` compares every artifact with PyTorch on the golden tensors that lie in the folder.
{_REFERENCE_NOTE}"""


def _provenance(bundle: Bundle) -> str:
    held = bundle.provenance
    recipe = held.get("recipe") or {}
    lines = [f"- method: {held['method']}"] if "method" in held else []
    lines += [f"- {name}: {recipe[name]}" for name in _RECIPE_FIELDS if name in recipe]
    lines += [
        f"- {name.replace('_', ' ')}: {held[name]}"
        for name in ("made_by", "exported_by")
        if name in held
    ]
    lines += [f"- {name}: {version}" for name, version in held.get("versions", {}).items()]
    return "\n".join([*lines, f"- fingerprint: `{bundle.fingerprint}`"])


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
