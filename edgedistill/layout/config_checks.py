"""Checks of the networks' configurations and of how they fit one another."""

from collections.abc import Iterator, Mapping
from typing import Any

from .findings import Finding, check
from .folder import INDEX, Folder
from .index_checks import is_known, is_stable_diffusion, is_xl

_WRITE = "write the key as diffusers' own configuration has it"
_VAE = ("scaling_factor", "latent_channels", "in_channels", "out_channels", "block_out_channels")
_TEXT = ("max_position_embeddings", "num_hidden_layers", "hidden_size", "vocab_size")
KEYS: Mapping[str, tuple[str, ...]] = {
    "unet": ("in_channels", "sample_size", "cross_attention_dim"),
    "text_encoder": _TEXT,
    "text_encoder_2": (*_TEXT, "projection_dim"),
    "controlnet": ("cross_attention_dim", "block_out_channels", "layers_per_block"),
    "vae_decoder": _VAE,
    "vae_encoder": _VAE,
}
"""What loaders read of a configuration; each fills what is missing with a default of its own."""
_KINDS: Mapping[str, tuple[type, ...]] = {
    "addition_embed_type": (str,),
    "block_out_channels": (list,),
    "sample_size": (int, list),
    "scaling_factor": (int, float),
}
_WHOLE = (int,)
_SHIFT = "shift_factor"
_SHIFTED = ("StableDiffusion3", "FluxPipeline", "FluxImg2Img", "FluxInpaint", "FluxFill")
"""How the names of pipelines begin that add the factor to latents; diffusers' fail without it."""
_KEYS_XL = ("addition_embed_type", "addition_time_embed_dim")


@check("ort", "openvino", "genai", "swift")
def keys(folder: Folder, _: str) -> Iterator[Finding]:
    """Every key that a loader reads is there and of its kind."""
    for network in folder.networks:
        if not is_known(folder, network):
            continue
        config, path = folder.config(network), f"{network}/config.json"
        more = _KEYS_XL if network == "unet" and is_xl(folder) else ()
        for key in (*KEYS.get(network, ()), *more) if config else ():
            kinds = _KINDS.get(key, _WHOLE)
            if not isinstance(config.get(key), kinds):
                found = repr(config[key]) if config.get(key) is not None else "no such key"
                names = " or ".join(kind.__name__ for kind in kinds)
                yield Finding(path, f"`{key}`, {names}", found, _WRITE)


@check("ort", "openvino")
def time_cond_proj_dim(folder: Folder, _: str) -> Iterator[Finding]:
    """The width of the guidance embedding is stated, if only as null."""
    if folder.config("unet") and "time_cond_proj_dim" not in folder.config("unet"):
        yield Finding(
            "unet/config.json",
            "`time_cond_proj_dim`: a width, or null",
            "no such key",
            "write null for a network without a guidance embedding",
            "warning",
        )


@check("diffusers", "ort", "openvino", "genai")
def guidance_embedding(folder: Folder, _: str) -> Iterator[Finding]:
    """The guidance mode of the sampler, the pipeline's class and the network's width of w agree."""
    config = folder.config("unet")
    width = config.get("time_cond_proj_dim")
    if not config:
        return
    if folder.guidance == "embedded" and width is None:
        yield Finding(
            "unet/config.json",
            "`time_cond_proj_dim`, for the guidance mode of sampler.json is 'embedded'",
            "null",
            _WRITE,
        )
    if folder.guidance in ("none", "cfg", "baked") and width is not None:
        yield Finding(
            "unet/config.json",
            f"`time_cond_proj_dim` null, for the guidance mode of sampler.json is {folder.guidance!r}",
            str(width),
            "bake w into the network and write null, or export with guidance embedded",
        )
    if folder.pipeline.startswith("LatentConsistency") and width is None:
        yield Finding(
            "unet/config.json",
            f"`time_cond_proj_dim`, which a {folder.pipeline} embeds its guidance with",
            "null",
            f"name StableDiffusionPipeline in {INDEX} for a network without the embedding",
        )


@check("diffusers", "ort", "openvino", "genai", "swift")
def sizes_agree(folder: Folder, _: str) -> Iterator[Finding]:
    """Encoders give what the denoiser takes, and the denoiser what the decoder takes."""
    if not is_stable_diffusion(folder):
        return
    unet, path = folder.config("unet"), "unet/config.json"
    encoders = [
        folder.config(name) for name in ("text_encoder", "text_encoder_2")[: 1 + is_xl(folder)]
    ]
    widths = [config.get("hidden_size") for config in encoders]
    known = [width for width in widths if isinstance(width, int)]
    text = unet.get("cross_attention_dim")
    if len(known) == len(widths) and isinstance(text, int) and text != sum(known):
        yield Finding(
            path,
            f"`cross_attention_dim` {sum(known)}, the text encoders' `hidden_size`",
            str(text),
            "take the encoders that the UNet was trained with",
        )
    latent = (folder.config("vae_decoder") or folder.config("vae")).get("latent_channels")
    given = unet.get("out_channels", latent)
    if isinstance(latent, int) and given != latent:
        yield Finding(
            path,
            f"`out_channels` {latent}, the decoder's `latent_channels`",
            str(given),
            "take the decoder that the UNet was trained with",
        )


@check("diffusers", "genai", "ort", "openvino")
def tiny_decoder(folder: Folder, loader: str) -> Iterator[Finding]:
    """AutoencoderTiny is declared as each loader wants it, and its latents are not scaled."""
    path = "vae/config.json" if loader == "diffusers" else "vae_decoder/config.json"
    config = folder.json(path)
    if config.get("_class_name") != "AutoencoderTiny":
        return
    declared = folder.entries.get("vae", (None, None))[1]
    if loader == "diffusers" and declared != "AutoencoderTiny":
        yield Finding(
            INDEX,
            "`vae` to be AutoencoderTiny, as vae/config.json says",
            repr(declared),
            "declare what the weights are; a folder for openvino.genai is one without vae/",
        )
    channels = {"latent_channels": 4} if is_stable_diffusion(folder) else {}
    for key, value in {"scaling_factor": 1.0, **channels}.items():
        if config.get(key) != value:
            yield Finding(
                path,
                f"`{key}` {value} of AutoencoderTiny",
                str(config.get(key)),
                "write it: loaders divide latents by the factor before they decode",
            )


@check("genai")
def tiny_encoder(folder: Folder, _: str) -> Iterator[Finding]:
    """openvino.genai draws the latents of an image from mean and variance, and AutoencoderTiny gives neither."""
    path = "vae_encoder/config.json"
    if folder.json(path).get("_class_name") == "AutoencoderTiny":
        yield Finding(
            path,
            "an AutoencoderKL for image-to-image and inpainting",
            "AutoencoderTiny",
            "make pictures of prompts alone there, or use edgedistill's own pipeline",
            "warning",
        )


@check("ort", "openvino", "genai", "swift")
def decoders_agree(folder: Folder, _: str) -> Iterator[Finding]:
    """Both halves of the autoencoder, and the whole, tell the same sizes."""
    whole = folder.config("vae")
    for half in ("vae_decoder", "vae_encoder"):
        config = folder.config(half)
        for key in (*_VAE, _SHIFT) if whole and config else ():
            told, wanted = (_told(side, key) for side in (config, whole))
            if wanted is not None and told is not None and told != wanted:
                yield Finding(
                    f"{half}/config.json",
                    f"`{key}` {wanted}, as vae/config.json says",
                    str(told),
                    "copy the configuration of the whole autoencoder",
                )


def _told(config: Mapping[str, Any], key: str) -> Any:
    """Return what a key stands for: a shift that is null or missing is none."""
    return (config.get(key) or 0) if key == _SHIFT else config.get(key)


@check("diffusers", "ort", "openvino", "genai")
def shift(folder: Folder, loader: str) -> Iterator[Finding]:
    """A shift of the latents is told to pipelines that add it, and there is none in the others."""
    for part in ("vae",) if loader == "diffusers" else ("vae_decoder", "vae_encoder"):
        config, path = folder.config(part), f"{part}/config.json"
        told = config.get(_SHIFT)
        if not config or not is_known(folder, part):
            continue
        if folder.pipeline.startswith(_SHIFTED) and not isinstance(told, int | float):
            expected = f"`{_SHIFT}`, int or float, which a {folder.pipeline} adds to latents"
            yield Finding(path, expected, "no such key" if told is None else repr(told), _WRITE)
        elif is_stable_diffusion(folder) and told:
            yield Finding(
                path,
                f"`{_SHIFT}` 0: of the loaders of a {folder.pipeline} openvino.genai alone adds it",
                repr(told),
                "take an autoencoder without a shift, or run the pipeline with edgedistill",
                "warning",
            )
