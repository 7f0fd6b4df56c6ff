"""A sampler as one graph beside the same sampler as a loop over its network.

python examples/bench_single_graph.py BUNDLE [--runtime R ...] [--sampler NAME] [--runs 15] [--warm-up 2] [--batch 1]
    [--threads 1] [--prompt TEXT] [--json]

BUNDLE holds both: `edgedistill export onnx -m STUDENT BUNDLE`, and the same with `--single-graph`;
`make bench-single-graph` makes one of the digits student. Both are fed the same noise and run in turn in one
process, with one thread (0: all); medians of `--runs`, after those that do not count. Exit status 1 if the graph takes longer than the loop, beyond the noise of the medians.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import edgedistill
from edgedistill.bundle import Artifact, Bundle
from edgedistill.noise import noise_bank
from edgedistill.tables import DEFAULT


def seconds(call: Callable[..., object], **given: Any) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    call(**given)
    return time.perf_counter() - start


def pair(bundle: Bundle, runtime: str, sampler: str) -> tuple[Artifact, Artifact]:
    """Return the float32 loop and the float32 graph of a sampler on a runtime."""
    held = [
        item
        for item in bundle.artifacts.values()
        if item.runtime == runtime and item.precision == "float32"
    ]
    loop = next((item for item in held if item.sampler is None), None)
    graph = next((item for item in held if item.sampler == sampler), None)
    if loop is None or graph is None:
        sys.exit(f"{bundle.root}: no float32 loop and graph of {sampler!r} for {runtime}")
    return loop, graph


def measure(bundle: Bundle, runtime: str, options: argparse.Namespace) -> dict[str, float | bool]:
    """Return medians and quartile widths in milliseconds, and the ratio of graph to loop."""
    sampler = options.sampler
    given = {
        "sampler": sampler,
        "noise": noise_bank(bundle.samplers[sampler], range(options.batch)),
    }
    given |= {"prompt": options.prompt} if options.prompt else {}
    taken: dict[str, list[float]] = {"loop": [], "graph": []}
    opened, load = {}, {}
    for what, item in zip(taken, pair(bundle, runtime, sampler), strict=True):
        start = time.perf_counter()
        opened[what] = edgedistill.load(bundle, artifact=item.name, threads=options.threads)
        load[what] = time.perf_counter() - start
    for _ in range(options.runs + options.warm_up):
        for what, pipeline in opened.items():
            taken[what].append(seconds(pipeline, **given))
    ms = {
        what: [1000 * value for value in values[options.warm_up :]]
        for what, values in taken.items()
    }
    medians = {what: statistics.median(values) for what, values in ms.items()}
    # The error of a median, from the middle half of the values.
    spread = {
        what: (statistics.quantiles(values)[2] - statistics.quantiles(values)[0])
        / len(values) ** 0.5
        for what, values in ms.items()
    }
    return {
        **{f"{what}_ms": value for what, value in medians.items()},
        **{f"{what}_least_ms": min(values) for what, values in ms.items()},
        **{f"{what}_load_s": value for what, value in load.items()},
        "ratio": medians["graph"] / medians["loop"],
        "noise": sum(spread.values()) / medians["loop"],
    }


def main() -> int:
    """Measure every runtime and say whether the graph keeps up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("bundle")
    parser.add_argument("--runtime", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--sampler", default=DEFAULT)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=2, help="runs that do not count")
    parser.add_argument("--threads", type=int, default=1, help="of a network; 0: all")
    parser.add_argument("--prompt", help="where the student takes one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    found = {name: measure(bundle, name, options) for name in options.runtime}
    if options.json:
        print(json.dumps({"runs": options.runs, "runtimes": found}, indent=1))
    else:
        for name, item in found.items():
            print(
                f"{name}: loop {item['loop_ms']:.1f} ms, graph {item['graph_ms']:.1f} ms, ratio "
                f"{item['ratio']:.2f} +- {item['noise']:.2f} (least {item['loop_least_ms']:.1f} and "
                f"{item['graph_least_ms']:.1f} ms; loaded in {item['loop_load_s']:.1f} and {item['graph_load_s']:.1f} s)"
            )
    return int(any(item["ratio"] > 1 + item["noise"] for item in found.values()))


if __name__ == "__main__":
    sys.exit(main())
