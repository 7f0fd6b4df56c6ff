"""One decoder in this process: what `bench_decoder.py` starts, with nothing imported that it does not need.

python examples/bench_decoder_run.py FORMAT GRAPH LATENT PICTURE [--runs 3] [--precision f32] [--tile N]

Writes the picture as an array and prints one line of JSON: seconds to load, to the first picture and to each further
one, also of processors, and the peak of resident memory.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import numpy as np

from bench_pipelines_run import peak_mb
from edgedistill.contract import Signature, TensorSpec
from edgedistill.network import CheckedNetwork, Session
from edgedistill.tiling import Tiling, tiled

RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
MODULES = {"onnx": "runtimes.ort", "openvino": "runtimes.ov"}
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
FREE = Signature(
    (TensorSpec("latent_sample", ("batch", 4, "height", "width"), "float32", "latent"),),
    (TensorSpec("sample", ("batch", 3, "image_height", "image_width"), "float32", "image"),),
)


def opened(options: argparse.Namespace) -> CheckedNetwork:
    """Open a decoder as a pipeline does."""
    settings = {} if options.form == "onnx" else {"precision": options.precision}
    runtime = importlib.import_module(MODULES[options.form])
    session: Session = runtime.open(options.graph, FREE, settings)
    if options.tile:
        session = tiled(session, FREE, Tiling(options.tile))
    return CheckedNetwork("vae_decoder", FREE, session)


def main() -> None:
    """Load, decode, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=MODULES)
    parser.add_argument("graph", type=Path)
    parser.add_argument("latent", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="pictures behind the first")
    parser.add_argument("--precision", default="f32", help="of OpenVINO's arithmetic")
    parser.add_argument("--tile", type=int, help="sides of a tile, in pixels of the latent")
    options = parser.parse_args()
    given = {"latent_sample": np.load(options.latent)}
    taken = []
    start = time.monotonic()
    decoder = opened(options)
    loaded = time.monotonic()
    for _ in range(1 + options.runs):
        begun, worked = time.monotonic(), time.process_time()
        picture = decoder(given)["sample"]
        taken.append((time.monotonic() - begun, time.process_time() - worked))
    np.save(options.picture, picture)
    first, warm = taken[0][0], taken[1:] or taken
    found = {
        "load_s": loaded - start,
        "first_s": first,
        "warm_s": [seconds for seconds, _ in warm],
        "warm_cpu_s": [seconds for _, seconds in warm],
        "peak_mb": peak_mb(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
