"""Graphs as loaders want them: spoken to in its dialect, a network answers what it always does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from edgedistill.contract import Signature
from edgedistill.errors import ContractError
from edgedistill.models import store
from edgedistill.models.controlnet import ControlNet, build_controlnet, controlled
from edgedistill.models.vae import VaeDecoder, VaeEncoder, build_autoencoder
from edgedistill.network import CheckedNetwork
from export.dialects import Dialect, batch_of, plain

W = 6.5
UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
TEXT = {
    "bos_token_id": 27,
    "eos_token_id": 28,
    "pad_token_id": 28,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 12,
    "vocab_size": 29,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def unet(**further: object) -> nn.Module:
    torch.manual_seed(0)
    return store.build({"_class_name": "UNet2DConditionModel", **UNET, **further}).eval()


def guided() -> nn.Module:
    extra = {"image_channels": 0, "residual_inputs": False, "scalar_inputs": {"w": 1000.0}}
    network = unet(_class_name="ExtendedUNet2DConditionModel", **extra)
    nn.init.normal_(network.time_embedding.cond_proj.weight)
    return network


def sdxl() -> nn.Module:
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )


def controlnet() -> ControlNet:
    torch.manual_seed(0)
    names = set(UNET) - {"sample_size", "out_channels", "up_block_types"}
    stock = build_controlnet(
        {name: UNET[name] for name in names} | {"conditioning_embedding_out_channels": [4, 8]}
    )
    for parameter in stock.parameters():
        if not parameter.any():  # of the convolutions that are zero before training
            nn.init.normal_(parameter)
    return ControlNet(stock.eval(), (8, 8))


def encoder(name: str = "CLIPTextModel") -> nn.Module:
    torch.manual_seed(0)
    return store.build({"architectures": [name], **TEXT}).eval()


def half(kind: type) -> nn.Module:
    torch.manual_seed(0)
    return kind(build_autoencoder(VAE), (8, 8)).eval()


def session_of(spoken: nn.Module, signature: Signature) -> Callable[[dict], dict]:
    """Run a traced-to-be module by the names, dtypes and ranks of its graph."""
    graph = plain(signature)

    def run(feeds: dict) -> dict:
        for spec in graph.inputs:
            value = feeds[spec.name]
            assert (value.dtype, value.ndim) == (np.dtype(spec.dtype), len(spec.shape))
        with torch.no_grad():
            made = store.call_outputs(spoken, {k: torch.from_numpy(v) for k, v in feeds.items()})
        names = [spec.name for spec in graph.outputs]
        return {name: value.numpy() for name, value in zip(names, made, strict=True)}

    return run


def feeds(signature: Signature, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for spec in signature.inputs:
        shape = (count, *spec.shape[1:])
        match spec.kind:
            case "t":
                made[spec.name] = np.array([999, 499, 999][:count], np.float32)
            case "w":
                made[spec.name] = np.full(shape, W, np.float32)
            case "tokens":
                made[spec.name] = rng.integers(0, 29, shape)
            case _:
                made[spec.name] = rng.standard_normal(shape, dtype=np.float32)
    return made


@pytest.mark.parametrize("form", ["onnx", "openvino", "coreml"])
@pytest.mark.parametrize(
    "make",
    [
        *(unet, guided, sdxl, lambda: controlled(unet()), controlnet),
        *(encoder, lambda: half(VaeDecoder), lambda: half(VaeEncoder)),
    ],
    ids=["unet", "guided", "sdxl", "controlled", "controlnet", "text", "decoder", "encoder"],
)
def test_in_every_dialect_a_network_answers_what_it_always_does(form: str, make: Callable) -> None:
    network = make()
    free = form != "coreml" and not isinstance(network, ControlNet)
    dialect = Dialect(form, w=W, guided=True, free_sizes=free)
    own = store.signature(network).bind(length=12)
    graph, spoken = dialect.of(network, own.with_batch(batch_of(dialect, network)))
    given = feeds(own, 3)
    expected = CheckedNetwork("n", own, session_of(network, own))(given)
    made = CheckedNetwork("n", graph, session_of(spoken, graph))(given)
    assert list(made) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, atol=1e-4)


def names(signature: Signature) -> list[tuple]:
    specs = (*signature.inputs, *signature.outputs)
    return [(spec.graph_name, spec.dtype, spec.shape) for spec in specs]


@pytest.mark.parametrize(
    ("form", "timestep", "text", "width"),
    [
        ("onnx", ("timestep", "float32", ()), ("batch", 12, 16), "width"),
        ("openvino", ("timestep", "int64", ("batch",)), ("batch", 12, 16), "width"),
        ("coreml", ("timestep", "float32", (2,)), (2, 16, 1, 12), 8),
    ],
)
def test_what_the_graph_of_a_denoiser_takes(form, timestep, text, width) -> None:
    network, free = guided(), form != "coreml"
    dialect = Dialect(form, guided=True, w=W, free_sizes=free)
    batch = batch_of(dialect, network)
    own = store.signature(network).bind(length=12).with_batch(batch)
    height = "height" if free else 8
    told = [("timestep_cond", "float32", (batch, 256))] if free else []
    assert names(dialect.of(network, own)[0]) == [
        ("sample", "float32", (batch, 4, height, width)),
        timestep,
        ("encoder_hidden_states", "float32", text),
        *told,
        ("out_sample" if free else "noise_pred", "float32", (batch, 4, height, width)),
    ]


@pytest.mark.parametrize(
    ("form", "batch", "text"),
    [("onnx", "batch", ("batch", 12, 16)), ("coreml", 2, (2, 16, 1, 12))],
)
def test_what_a_controlnet_gives_its_denoiser_takes(form, batch, text) -> None:
    dialect = Dialect(form, controlled=True)
    graphs = []
    for network in (controlnet(), controlled(unet())):
        assert batch_of(dialect, network) == batch
        own = store.signature(network).bind(length=12).with_batch(batch)
        graphs.append(names(dialect.of(network, own)[0]))
    shapes = [(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4), (16, 4, 4)]
    residuals = [
        (f"additional_residual_{i}", "float32", (batch, *shape)) for i, shape in enumerate(shapes)
    ]
    picture = ("controlnet_cond", "float32", (batch, 3, 16, 16))
    assert graphs[0][2:] == [("encoder_hidden_states", "float32", text), picture, *residuals]
    assert graphs[1][3:-1] == residuals


@pytest.mark.parametrize(
    ("kind", "form", "expected"),
    [
        ("CLIPTextModel", "onnx", ["last_hidden_state", "pooler_output"]),
        ("CLIPTextModelWithProjection", "openvino", ["text_embeds", "last_hidden_state"]),
        ("CLIPTextModelWithProjection", "coreml", ["hidden_embeds", "pooled_outputs"]),
    ],
)
def test_two_encoders_give_what_leaves_the_last_layer_but_one(kind, form, expected) -> None:
    network = encoder(kind)
    own = store.signature(network)
    graph, spoken = Dialect(form, two_encoders=True).of(network, own)
    states = [] if form == "coreml" else [f"hidden_states.{i}" for i in range(3)]
    assert [spec.graph_name for spec in graph.outputs] == [*expected, *states]
    given = feeds(own, 3)
    made = CheckedNetwork("n", graph, session_of(spoken, graph))(given)
    with torch.no_grad():
        wanted = network.layers(torch.from_numpy(given["input_ids"]))[-2].numpy()
    np.testing.assert_allclose(made["encoder_hidden_states"], wanted, atol=1e-5)


def test_apples_halves_of_the_autoencoder() -> None:
    for kind, taken, given in ((VaeDecoder, "z", "image"), (VaeEncoder, "x", "latent")):
        network = half(kind)
        graph, _ = Dialect("coreml").of(network, store.signature(network).with_batch(1))
        assert [name for name, *_ in names(graph)] == [taken, given]
    assert graph.outputs[0].shape == (1, 8, 8, 8)


def test_networks_that_no_loader_knows_are_refused() -> None:
    pixel = nn.Conv2d(1, 1, 1)
    with pytest.raises(ContractError, match="Loaders of pipelines know no Conv2d; export with"):
        Dialect("onnx").of(pixel, Signature((), ()))
