"""Checks of the scheduler: what each loader can execute, and the steps that it makes of it."""

from collections.abc import Iterator

from edgedistill.compiler import FAMILIES
from edgedistill.plans import SWIFT_STEPS
from edgedistill.stock import GENAI_CLASSES, objections, swift_spacing
from edgedistill.tables import TABLE, table_file

from .findings import Finding, check
from .folder import DENOISERS, INDEX, SCHEDULER, Folder
from .schedulers import GENAI_BETAS, SCALING, SPACINGS, STATED, SWIFT_BETAS

_PORTABLE = "take DDIM with trailing spacing, epsilon and clip_sample false at 1, 2, 4 or 8 steps"


@check("diffusers", "ort", "openvino", "genai")
def stated(folder: Folder, _: str) -> Iterator[Finding]:
    """What differs between the loaders' defaults is stated."""
    config = folder.json(SCHEDULER)
    flow = str(config.get("_class_name", "")).startswith("FlowMatch")
    for key in STATED if config and not flow else ():
        if key not in config:
            yield Finding(
                SCHEDULER,
                f"`{key}`",
                "no such key",
                "write it: the loaders' defaults differ",
                "warning",
            )


@check("genai")
def genai_scheduler(folder: Folder, _: str) -> Iterator[Finding]:
    """openvino.genai knows seven schedulers, two beta schedules and three spacings."""
    config = folder.json(SCHEDULER)
    for key, known in (
        ("_class_name", GENAI_CLASSES),
        ("beta_schedule", GENAI_BETAS),
        ("timestep_spacing", SPACINGS),
    ):
        if config.get(key, known[0]) not in known:
            yield Finding(
                SCHEDULER, f"`{key}` to be one of {', '.join(known)}", repr(config[key]), _PORTABLE
            )


@check("genai")
def genai_prediction(folder: Folder, _: str) -> Iterator[Finding]:
    """The LCM scheduler of openvino.genai ends the process for anything but epsilon."""
    config = folder.json(SCHEDULER)
    prediction = config.get("prediction_type", "epsilon")
    if config.get("_class_name") == "LCMScheduler" and prediction != "epsilon":
        yield Finding(
            SCHEDULER,
            "`prediction_type` 'epsilon' with LCMScheduler (others end the process with a segmentation fault)",
            repr(prediction),
            "export the network as one that predicts epsilon, or take DDIMScheduler",
        )


@check("genai")
def genai_ddim(folder: Folder, _: str) -> Iterator[Finding]:
    """The DDIM scheduler of openvino.genai throws at the first step if it were to clip, which is its default."""
    config = folder.json(SCHEDULER)
    if config.get("_class_name") != "DDIMScheduler":
        return
    for key, default in (("clip_sample", True), ("thresholding", False)):
        if config.get(key, default):
            found = repr(config[key]) if key in config else "no such key, which is true"
            yield Finding(SCHEDULER, f"`{key}` false with DDIMScheduler", found, _PORTABLE)


@check("diffusers", "ort", "openvino")
def latents_not_clipped(folder: Folder, _: str) -> Iterator[Finding]:
    """DDIM clips to [-1, 1] unless told not to, and latents are wider."""
    config = folder.json(SCHEDULER)
    is_ddim = config.get("_class_name") == "DDIMScheduler"
    if is_ddim and folder.is_latent and config.get("clip_sample", True):
        yield Finding(
            SCHEDULER,
            "`clip_sample` false for latents",
            repr(config["clip_sample"])
            if "clip_sample" in config
            else "no such key, which is true",
            "write false",
        )


@check("diffusers", "ort", "openvino")
def lcm_pipeline(folder: Folder, _: str) -> Iterator[Finding]:
    """The latent-consistency pipeline tells its scheduler things that only LCMScheduler takes."""
    name = str(folder.json(SCHEDULER).get("_class_name", "LCMScheduler"))
    if folder.pipeline.startswith("LatentConsistency") and name != "LCMScheduler":
        yield Finding(
            SCHEDULER,
            f"LCMScheduler in a {folder.pipeline}",
            repr(name),
            f"name LCMScheduler here or StableDiffusionPipeline in {INDEX}",
        )


@check("ort")
def io_binding(folder: Folder, _: str) -> Iterator[Finding]:
    """With IO binding, optimum-onnx writes the prediction over the latents that the scheduler still needs."""
    name = str(folder.json(SCHEDULER).get("_class_name", ""))
    in_place = "LatentConsistency" not in folder.pipeline and not name.startswith(SCALING)
    if folder.guidance in ("none", "baked", "embedded") and in_place:
        yield Finding(
            INDEX,
            f"IO binding turned off for a {folder.pipeline} with {name} and no guidance",
            "a loader that turns it on with CUDA, and then gives garbage",
            "call it with use_io_binding=False, or use edgedistill's own pipeline",
            "warning",
        )


@check("swift")
def swift_noise(folder: Folder, _: str) -> Iterator[Finding]:
    """Swift's schedulers have one noise schedule and predict epsilon."""
    config = folder.json(SCHEDULER)
    if not config or "Diffusion3" in folder.pipeline:
        return
    for key, value in {**SWIFT_BETAS, "prediction_type": "epsilon"}.items():
        if config.get(key, value) != value:
            yield Finding(
                SCHEDULER,
                f"`{key}` {value!r}, which Swift's schedulers are made with",
                repr(config[key]),
                "distil on Stable Diffusion's noise schedule and predict epsilon",
            )


@check("diffusers", "ort", "openvino", "genai")
def steps(folder: Folder, loader: str) -> Iterator[Finding]:
    """The stock scheduler takes the steps of the sampler table, in this loader's arithmetic."""
    config, table = folder.json(SCHEDULER), folder.table
    if not config or table is None:
        return
    count = sum(1 for row in table.rows if row.call)
    level = "error" if str(config.get("_class_name")) in FAMILIES else "warning"
    for reason in objections(config, count, table)[loader]:
        yield Finding(SCHEDULER, f"the {count} steps of {TABLE}", reason, _PORTABLE, level)


@check("openvino")
def whole_steps(folder: Folder, _: str) -> Iterator[Finding]:
    """A graph that takes whole time steps is told whole ones."""
    for network, path in folder.graphs("openvino"):
        graph = folder.graph(path) if network in DENOISERS else None
        taken = {item.dtype for item in (graph.inputs if graph else ()) if item.name == "timestep"}
        if taken & {"int32", "int64"}:
            yield from _fractions(folder, f"all that {path} takes")


@check("swift")
def swift_steps(folder: Folder, _: str) -> Iterator[Finding]:
    """Every table has whole time steps, and one is what an unmodified Swift package makes."""
    yield from _fractions(folder, "all that Swift can tell the network")
    if folder.tables and not any(swift_spacing(table) for table in folder.tables.values()):
        counts = ", ".join(map(str, SWIFT_STEPS))
        yield Finding(
            TABLE,
            f"a table, or one beside it, on the grid of DPM++ on linspace with {counts} steps",
            "none",
            "build the sampler's Swift file into the app: unmodified, Swift takes other steps",
            "warning",
        )


def _fractions(folder: Folder, why: str) -> Iterator[Finding]:
    for name, table in folder.tables.items():
        times = [row.feeds.get("timestep", 0.0) for row in table.rows if row.call]
        if broken := [time for time in times if not time.is_integer()]:
            yield Finding(
                table_file(name),
                f"whole time steps, {why}",
                str(broken[0]),
                "take another number of steps, or round the time steps and distil on them",
            )
