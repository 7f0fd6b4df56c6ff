"""One pipeline in this process: what `bench_pipelines.py` starts, with nothing imported that it does not need.

python examples/bench_pipelines_run.py ENGINE ROOT NOISE IMAGE [--steps 4] [--runs 5] [--precision f32]

Writes the first image as an array and prints one line of JSON: seconds to load and per further image, also of
processors, when the first image was there, and the peak of resident memory then and in the end.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PROMPT = "a cat and a dog"
Draw = Callable[[np.ndarray, int], np.ndarray]  # noise and steps to an image: (height, width, 3)


def by_edgedistill_ov(root: Path, precision: str, size: int) -> Draw:  # noqa: ARG001
    """Open our pipeline on OpenVINO."""
    import edgedistill

    pipeline = edgedistill.load(root, "openvino", precision=precision, progress=False)
    return lambda noise, _: shown(pipeline(prompt=PROMPT, noise=[noise]))


def by_edgedistill_ort(root: Path, precision: str, size: int) -> Draw:  # noqa: ARG001
    """Open our pipeline on ONNX Runtime."""
    import edgedistill

    pipeline = edgedistill.load(root, "onnxruntime", progress=False)
    return lambda noise, _: shown(pipeline(prompt=PROMPT, noise=[noise]))


def shown(samples: object) -> np.ndarray:
    """Return our image before it is rounded, once the rounded one is made."""
    assert samples.images  # type: ignore[attr-defined]
    array: np.ndarray = samples.array  # type: ignore[attr-defined]
    return array[0].transpose(1, 2, 0) / 2 + 0.5


def by_optimum_intel(root: Path, precision: str, size: int) -> Draw:  # noqa: ARG001
    """Open optimum's pipeline on OpenVINO. Its `reshape` doubles the batch, so the batch stays free."""
    from optimum.intel import OVDiffusionPipeline

    hint = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    return of_diffusers(OVDiffusionPipeline.from_pretrained(root, ov_config=hint))


def by_optimum_onnx(root: Path, precision: str, size: int) -> Draw:  # noqa: ARG001
    """Open optimum's pipeline on ONNX Runtime."""
    from optimum.onnxruntime import ORTDiffusionPipeline

    return of_diffusers(ORTDiffusionPipeline.from_pretrained(root))


def of_diffusers(pipeline: object) -> Draw:
    """Return how a pipeline of diffusers' kind is called."""
    import torch

    pipeline.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]

    def draw(noise: np.ndarray, steps: int) -> np.ndarray:
        made: np.ndarray = pipeline(  # type: ignore[operator]
            PROMPT,
            latents=torch.from_numpy(noise),
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="np",
        ).images
        pipeline.numpy_to_pil(made)  # type: ignore[attr-defined]
        return made[0]

    return draw


def by_genai(root: Path, precision: str, size: int) -> Draw:
    """Open OpenVINO GenAI's pipeline, its shapes fixed."""
    import openvino as ov
    import openvino_genai as genai
    from PIL import Image

    class Given(genai.Generator):
        def __init__(self, noise: np.ndarray) -> None:
            super().__init__()
            self.noise = noise

        def randn_tensor(self, shape: object) -> object:  # noqa: ARG002
            return ov.Tensor(self.noise.copy())

    pipeline = genai.Text2ImagePipeline(root)
    pipeline.reshape(1, size, size, 1.0)
    hint = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    pipeline.compile("CPU", **hint)

    def draw(noise: np.ndarray, steps: int) -> np.ndarray:
        settings = {"guidance_scale": 1.0, "num_inference_steps": steps}
        sides = {"height": size, "width": size}
        made = pipeline.generate(PROMPT, generator=Given(noise), **settings, **sides)
        Image.fromarray(made.data[0])
        return np.array(made.data[0]) / np.float32(255)

    return draw


ENGINES: dict[str, Callable[[Path, str, int], Draw]] = {
    "edgedistill-ov": by_edgedistill_ov,
    "optimum-intel": by_optimum_intel,
    "openvino-genai": by_genai,
    "edgedistill-ort": by_edgedistill_ort,
    "optimum-onnx": by_optimum_onnx,
}


def peak_mb() -> float:
    """Return the largest resident memory that this process has had, in MB; `ru_maxrss` would be the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (held,) = (line for line in lines if line.startswith("VmHWM"))
    return int(held.split()[1]) * 1024 / 1e6


def main() -> None:
    """Load, draw, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("root", type=Path)
    parser.add_argument("noise", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5, help="images behind the first")
    parser.add_argument("--precision", default="f32", help="of OpenVINO's arithmetic")
    parser.add_argument("--size", type=int, required=True, help="of the image's sides")
    options = parser.parse_args()
    noise = np.load(options.noise)
    start = time.monotonic()
    draw = ENGINES[options.engine](options.root, options.precision, options.size)
    loaded = time.monotonic()
    image = draw(noise, options.steps)
    first, first_peak = time.monotonic(), peak_mb()
    warm, busy = [], []
    for _ in range(options.runs):
        begun, worked = time.monotonic(), time.process_time()
        draw(noise, options.steps)
        warm.append(time.monotonic() - begun)
        busy.append(time.process_time() - worked)
    np.save(options.image, image)
    found = {
        "load_s": loaded - start,
        "first_at": first,
        "first_peak_mb": first_peak,
        "warm_s": warm,
        "warm_cpu_s": busy,
        "peak_mb": peak_mb(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
