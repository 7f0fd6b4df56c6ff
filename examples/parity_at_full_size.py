"""Every artifact of a bundle against PyTorch in one sample: one call of its network, and all rows with the decoder.

python examples/parity_at_full_size.py BUNDLE [--only ARTIFACT ...] [--docs FILE] [--json]

`edgedistill parity` compares every golden sample twice, which takes hours where a network has 860 million parameters
and the evaluator of Core ML packages runs it. This takes the first sample once: the first row starts from the noise,
so its prediction is one call of the network beside PyTorch's; the others go on from where the artifact got itself.
Each artifact is run in a fresh process. Exit status 1 if a floor of `edgedistill parity` is missed.
"""

import argparse
import datetime as dt
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from documents import listed, machine, paragraphs, put, table
from edgedistill.agreement import compare
from edgedistill.bundle import Bundle
from edgedistill.environment import versions
from edgedistill.parity import floor_of
from edgedistill.pipeline import Pipeline
from edgedistill.probes import Golden
from edgedistill.sampler import RowTrace, run_table
from edgedistill.tables import DEFAULT, golden_file
from edgedistill.terminal import aligned
from export.worker import in_child

HEADERS = ["artifact", "one call, dB", "latents, dB", "image, dB", "at least", "peak GB", "wall s"]
PACKAGES = ("torch", "onnxruntime", "openvino", "coremltools")


def run_once(root: Path, name: str) -> dict[str, float]:
    """Return dB SNR of an artifact: of its first prediction, its last latents and its image."""
    bundle = Bundle.open(root, whole=False)
    pipeline = Pipeline(bundle, bundle.artifacts[name], {})
    table = pipeline.samplers[DEFAULT]
    golden = Golden.load(bundle.path(golden_file(DEFAULT)), table)
    conditions = {key: value[:1] for key, value in golden.conditions.items()}
    noise = [value[:1] for value in golden.noise]
    traces: list[RowTrace] = []
    image = run_table(table, pipeline.networks, noise, conditions, traces.append)
    pairs = {
        "call": (golden.rows[0]["raw"], traces[0].raw),
        "latents": (golden.rows[-1]["next"], traces[-1].next),
        "image": (golden.output, image),
    }
    return {key: compare(theirs[:1], ours).snr_db for key, (theirs, ours) in pairs.items()}


def measure(root: Path, only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what each artifact reaches, must reach and takes."""
    bundle = Bundle.open(root, whole=False)
    for name in only or bundle.artifacts:
        floor = floor_of(bundle.artifacts[name].precision)
        found, used = in_child(run_once, root, name)
        least = {"call": floor.raw, "latents": floor.free, "image": floor.image}
        yield {
            "artifact": name,
            **found,
            "least": least,
            "ok": all(found[key] >= least[key] for key in least),
            "peak_gb": used.peak_gb,
            "wall_s": used.seconds,
        }


def rows_of(record: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of cells per artifact."""
    return [
        [
            item["artifact"],
            *(f"{item[key]:.1f}" for key in ("call", "latents", "image")),
            ", ".join(f"{value:.0f}" for value in item["least"].values()),
            f"{item['peak_gb']:.2f}",
            f"{item['wall_s']:.0f}",
        ]
        for item in record["artifacts"]
    ]


def markdown(record: Mapping[str, Any]) -> str:
    """Return the figures for a document."""
    named = listed(PACKAGES, record["versions"])
    head = (
        f"{record['name']}, {record['rows']} rows; {record['date']}, {record['machine']}; {named}."
    )
    return f"{paragraphs(head)}\n\n{table(HEADERS, rows_of(record))}\n"


def main() -> int:
    """Compare, tell; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="ARTIFACT")
    parser.add_argument("--docs", type=Path, help="put the table between this file's markers too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle, whole=False)
    record: dict[str, Any] = {
        "name": bundle.name,
        "rows": len(bundle.table.rows),
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "artifacts": list(measure(options.bundle, options.only)),
    }
    if options.docs:
        put(markdown(record), options.docs, "parity_at_full_size.py")
    print(json.dumps(record, indent=1) if options.json else aligned(HEADERS, rows_of(record)))
    return int(not all(item["ok"] for item in record["artifacts"]))


if __name__ == "__main__":
    sys.exit(main())
