"""Sample from a bundle with numpy and one runtime, without edgedistill: what an app has to write.

python examples/bare_sampler.py BUNDLE onnxruntime|openvino grid.png [COUNT]

It knows tables of one network in one stage, whose guidance is embedded or baked and whose conditions are
classes; others are refused by name. COUNT is a multiple of the graph's batch. The samples are bit for bit
those of ``edgedistill sample BUNDLE --runtime R -n COUNT``.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Feeds = dict[str, np.ndarray]


def open_network(path: Path, runtime: str) -> Callable[[Feeds], np.ndarray]:
    """Return the network as a function from inputs by name to the raw prediction."""
    if runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda feeds: session.run(None, feeds)[0]
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda feeds: compiled(feeds)[0]


def beyond(table: dict[str, Any]) -> Iterator[str]:
    """Name what a table asks for and this file does not do; edgedistill/sampler.py does."""
    yield from (key for key in ("router", "decoder") if table[key])
    yield from (f"a {c['kind']} condition" for c in table["conditions"] if c["kind"] != "class")
    if len(table["stages"]) > 1 or table["stages"][0]["init_image"]:
        yield "several stages or a first image"
    rows = [row for stage in table["stages"] for row in stage["rows"]]
    if any(len(row["call"]) != 1 for row in rows):
        yield "rows that call no network, or two"
    yield from (key for key in ("guidance_scale", "blend") if any(row[key] for row in rows))


def sample(bundle: Path, runtime: str, count: int) -> np.ndarray:
    """Return float32 samples (count, channels, height, width) of seeds 0, 1, 2, ..."""
    table = json.loads((bundle / "sampler.json").read_text())
    if problems := ", ".join(beyond(table)):
        sys.exit(f"{bundle}: beyond this example: {problems}.")
    held = json.loads((bundle / "edgedistill.json").read_text())["artifacts"].values()
    (file,) = next(item for item in held if item["runtime"] == runtime)["networks"].values()
    network = open_network(bundle / file["path"], runtime)
    fixed = file["signature"]["inputs"][0]["shape"][0]
    size = fixed if isinstance(fixed, int) else count
    (stage,), guidance = table["stages"], table["guidance"]

    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in range(count)]
    noise = [
        np.stack([g.standard_normal(stage["shape"], dtype=np.float32) for g in generators])
        for _ in range(table["noise_count"])
    ]
    given = {c["name"]: np.arange(count, dtype=np.int32) % c["size"] for c in table["conditions"]}
    if guidance["input"]:
        given[guidance["input"]] = np.full(count, guidance["default"] - 1, np.float32)

    coefficient, index = stage["init_noise"]
    z, earlier = noise[index] * coefficient, []  # estimates of x, the newest first
    for row in stage["rows"]:
        feeds = {name: np.full(count, value, np.float32) for name, value in row["feeds"].items()}
        feeds = {**given, **feeds, table["state_input"]: z * row["in_scale"]}
        pieces = [
            {name: a[i : i + size] for name, a in feeds.items()} for i in range(0, count, size)
        ]
        raw = np.concatenate([network(piece) for piece in pieces])
        x0 = z * row["x0"][0] + raw * row["x0"][1]
        x0 = x0.clip(*row["clip"]) if row["clip"] else x0
        after = row["next"]
        z = z * after["z"] + x0 * after["x0"] + raw * after["raw"]
        for factor, estimate in zip(after["previous"], earlier, strict=False):
            z = z + estimate * factor
        if row["noise"] is not None:
            z = z + noise[row["noise"]] * after["noise"]
        earlier = [x0, *earlier]
    return z.clip(*table["clamp"]) if table["clamp"] else z


def sheet(samples: np.ndarray) -> np.ndarray:
    """Return one grey or colour picture of all samples, as square as it gets."""
    pixels = np.rint((samples + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    columns = int(np.ceil(np.sqrt(len(pixels))))
    blank = np.zeros((-len(pixels) % columns, *pixels.shape[1:]), np.uint8)
    tiles = np.concatenate([pixels, blank])
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows).squeeze()


if __name__ == "__main__":
    folder, chosen, target = sys.argv[1:4]
    made = sample(Path(folder), chosen, int(sys.argv[4]) if len(sys.argv) > 4 else 16)
    Image.fromarray(sheet(made)).resize((256, 256), Image.Resampling.NEAREST).save(target)
