"""Where the files of networks lie: by format in a bundle, by network where the loaders of pipelines look."""

import re

BUNDLE, SINGLE_ROOT = "bundle", "single-root"
LAYOUTS = (BUNDLE, SINGLE_ROOT)
INDEX = "model_index.json"
"""What makes a folder one that loaders open."""
PACKAGES = "coreml/packages"
RESOURCES = "coreml/Resources"
SOURCES = "coreml/Swift"
_GRAPHS = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
_HALVES = ("vae_decoder", "vae_encoder")
CONTROLNET = "controlnet"


def place(
    layout: str,
    form: str,
    precision: str,
    network: str,
    suffix: str = "",
    *,
    model: str = "",
    controlled: bool = False,
) -> str:
    """Return the path of a network's file, or of the folder of its weights, in a bundle.

    Args:
        layout: One of `LAYOUTS`.
        form: ``torch``, ``onnx``, ``openvino`` or ``coreml``.
        precision: Of the artifact; a single root holds one per format.
        network: Its name.
        suffix: Of the file.
        model: Name of the model, which Apple's names tell, as their converter writes it.
        controlled: Whether it takes residuals of a ControlNet, which Apple's names tell.
    """
    if layout == BUNDLE:
        return f"{form}/{precision}/{network}{suffix}"
    if form == "torch":
        return "vae" if network in _HALVES else network
    if form == "coreml":
        if network == CONTROLNET:
            return f"{PACKAGES}/ControlNet_control{suffix}"
        name = f"control-{network}" if controlled else network
        version = re.sub(r"[^A-Za-z0-9_.-]", "_", model)
        return f"{PACKAGES}/Stable_Diffusion_version_{version}_{name}{suffix}"
    return f"{network}/{_GRAPHS[form]}"
