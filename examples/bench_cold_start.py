"""Cold start: from process start to image written, `edgedistill sample` beside a bare script.

python examples/bench_cold_start.py [BUNDLE] [--runs 9] [--runtime R ...] [--json]

The bare script is `bare_sampler.py`: numpy, Pillow and the runtime. Both are run in turn, in fresh
processes; the first run of each, which fills the disk cache, does not count. Exit status 1 if
edgedistill takes more than twice as long.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

LIMIT = 2.0
BARE = Path(__file__).with_name("bare_sampler.py")


def seconds(words: Sequence[str]) -> float:
    """Return the wall time of one process."""
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(bundle: str, runtime: str, runs: int) -> dict[str, float]:
    """Return the medians of both, in seconds, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "grid.png")
        ours = [sys.executable, "-m", "edgedistill", "sample", bundle, "--runtime", runtime]
        commands = {
            "bare_s": [sys.executable, str(BARE), bundle, runtime, target],
            "edgedistill_s": [*ours, "-o", target],
        }
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs + 1):
            for name, words in commands.items():
                taken[name].append(seconds(words))
    medians = {name: statistics.median(values[1:]) for name, values in taken.items()}
    return {**medians, "ratio": medians["edgedistill_s"] / medians["bare_s"]}


def main() -> int:
    """Measure every runtime and say whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", nargs="?", default="demo/bundle", help="default: demo/bundle")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--runtime", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not Path(options.bundle).is_dir():
        parser.error(f"{options.bundle}: no such bundle; make one with `edgedistill demo`")
    found = {name: measure(options.bundle, name, options.runs) for name in options.runtime}
    if options.json:
        print(json.dumps({"runs": options.runs, "limit": LIMIT, "runtimes": found}, indent=1))
    else:
        for name, item in found.items():
            print(
                f"{name}: bare {item['bare_s']:.3f} s, edgedistill {item['edgedistill_s']:.3f} s, "
                f"ratio {item['ratio']:.2f} (at most {LIMIT:g}; medians of {options.runs})"
            )
    return int(any(item["ratio"] > LIMIT for item in found.values()))


if __name__ == "__main__":
    sys.exit(main())
