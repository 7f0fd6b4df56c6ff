"""What an export tells when it is done: a table for people, JSON for machines."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedistill.bundle import Artifact, Bundle
    from edgedistill.table import SamplerTable

_HEADERS = ("artifact", "runtime", "MB", "SNR dB")
_LEGEND = "SNR: one call of the written file against PyTorch, from noise."


def as_json(bundle: "Bundle") -> str:
    """Return what a bundle holds as JSON."""
    told = {
        "bundle": str(bundle.root),
        "name": bundle.name,
        "fingerprint": bundle.fingerprint,
        "samplers": {name: _sampler(table) for name, table in bundle.samplers.items()},
        "artifacts": [_describe(bundle, item) for item in bundle.artifacts.values()],
    }
    return json.dumps(told, indent=1)


def as_text(bundle: "Bundle", *, changed: bool) -> str:
    """Return a line for each artifact and what is to be known of samplers and of networks that lack.

    Args:
        bundle: What was exported to.
        changed: Whether anything was written; else all of it was there.
    """
    from edgedistill.terminal import aligned

    artifacts = [_describe(bundle, item) for item in bundle.artifacts.values()]
    rows = [
        (
            item["name"],
            item["runtime"],
            f"{item['bytes'] / 1e6:.2f}",
            "-" if item["snr_db"] is None else f"{item['snr_db']:.1f}",
        )
        for item in artifacts
    ]
    told = [
        f"Sampler {name}: {item['steps']} step{'s' * (item['steps'] != 1)} of {item['scheduler']}: {item['why']}."
        for name, item in ((k, _sampler(v)) for k, v in bundle.samplers.items())
        if item["why"]
    ]
    told += [
        f"{item['name']} has no graph of {', '.join(item['lacking'])}; --networks adds them."
        for item in artifacts
        if item["lacking"]
    ]
    done = "Written" if changed else "Nothing to write, every file is there and fits its hash"
    return "\n".join([aligned(_HEADERS, rows), _LEGEND, *told, f"{done}: {bundle.root}"])


def _sampler(table: "SamplerTable") -> dict[str, Any]:
    from .samplers import CHOICE

    notes = table.annotations
    return {
        "steps": sum(1 for row in table.rows if row.call),
        "scheduler": (notes.get("scheduler") or {}).get("_class_name"),
        "why": notes.get(CHOICE),
    }


def _describe(bundle: "Bundle", artifact: "Artifact") -> dict[str, Any]:
    return {
        "name": artifact.name,
        "runtime": artifact.runtime,
        "format": artifact.format,
        "precision": artifact.precision,
        "paths": [network.path for network in artifact.networks.values()],
        "lacking": bundle.lacking(artifact),
        "bytes": bundle.size(artifact),
        "snr_db": artifact.made_with.get("snr_db"),
    }
