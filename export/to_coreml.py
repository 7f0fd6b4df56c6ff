"""One network to one Core ML package: traced, converted, run once beside PyTorch, then put in place."""

import contextlib
import gc
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import edgedistill
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import ConfigError, ContractError
from edgedistill.mlpackage import quiet_coremltools, write_package

from .checking import TRY_ELSE, Check, check_file, named
from .formats import DEPLOYMENT_TARGETS
from .frozen import Frozen, expected_of
from .recording import trace
from .stages import stage
from .worker import called

# dB SNR below which a package is broken and not merely rounded; whether it is good enough is for the
# floors of edgedistill.parity to say. Large networks lose more in float16: Stable Diffusion 1.5 keeps 48 dB.
LEAST_DB = {"float32": 100.0, "float16": 40.0}
_DTYPES = ("float32", "int32")
_MEANINGS = {
    "x": "The noised state.",
    "noise": "Unit Gaussian noise, an entry of the bank.",
    "t": "The label of the time.",
    "class": "The index of the class.",
    "w": "The guidance weight, guidance scale - 1.",
    "s": "The label of the time to jump to.",
    "step": "The number of steps in all.",
    "r": "The resolution.",
    "tokens": "The prompt in tokens.",
    "text": "The embedding of each token of the prompt.",
    "pooled": "The embedding of the prompt.",
    "size": "Height, width, top, left, height, width: of the picture, its crop, and what is made of it.",
    "image": "The image.",
    "mask": "1 where something is drawn, 0 where the image is kept.",
    "residual": "What is added to a skip connection.",
    "latent": "The latent.",
    "raw": "The prediction.",
}


def write_coreml(
    network: nn.Module,
    signature: Signature,
    path: Path,
    *,
    precision: str = "float16",
    deployment_target: str = "iOS17",
    consume: bool = False,
) -> dict[str, Any]:
    """Write a network as a Core ML ML Program, with float32 inputs and outputs.

    In float16 the sinusoids of timestep and guidance stay in float32 with all that leads to them: their
    angles reach thousands of radians, of which float16 keeps less than a turn.

    Args:
        network: In eval mode, without gradients.
        signature: Declared names, dtypes and shapes; the batch must be fixed.
        path: The ``.mlpackage`` to write.
        precision: ``"float16"`` or ``"float32"``, of the arithmetic and the weights.
        deployment_target: The earliest system it must run on.
        consume: Give the network's memory back before the package is run; it is of no use afterwards. A large
            package is run in a process of its own.

    Returns:
        What made it: options, versions, and ``snr_db`` against PyTorch.

    Raises:
        ConfigError: If precision or deployment target is unknown.
        ContractError: If the batch is free, or a dtype or an operation is not Core ML's.
        CheckFailedError: If the package's answer is not the network's.
        MissingDependencyError: If coremltools is not installed.
    """
    _check(signature, precision, deployment_target)
    frozen = Frozen(network, signature)
    expected = expected_of(frozen)
    alone = consume and frozen.is_large
    with quiet_coremltools() as coremltools, _without_known_warnings():
        model = convert_coreml(coremltools, frozen, precision, deployment_target, consume=consume)
        options = {"device": "reference"}
        check = Check("coreml", signature, expected, LEAST_DB[precision], options)
        snr_db = write_package(
            model,
            path,
            lambda made: called(
                check_file, check, made, named(path), alone=alone, what=named(path)
            ),
        )
    return {
        "exporter": "coremltools",
        "precision": precision,
        "deployment_target": deployment_target,
        "coremltools": coremltools.__version__,
        "torch": torch.__version__,
        "snr_db": snr_db,
    }


def _check(signature: Signature, precision: str, deployment_target: str) -> None:
    for what, value, known in (
        ("precision", precision, tuple(LEAST_DB)),
        ("deployment target", deployment_target, DEPLOYMENT_TARGETS),
    ):
        if value not in known:
            msg = f"Unknown Core ML {what} {value!r}: choose one of {', '.join(known)}."
            raise ConfigError(msg)
    if signature.batch is None:
        msg = (
            "Core ML needs a fixed batch, got a free one: coremltools cannot convert group norms with it; "
            "choose a size with `signature.with_batch(n)`."
        )
        raise ContractError(msg)
    for spec in (*signature.inputs, *signature.outputs):
        if spec.dtype not in _DTYPES:
            msg = f"`{spec.name}`: a Core ML package is written with {' or '.join(_DTYPES)} here, got {spec.dtype}."
            raise ContractError(msg)


def convert_coreml(
    coremltools: Any, frozen: Frozen, precision: str, target: str, *, consume: bool = False
) -> Any:
    """Trace and convert, unchecked and unsaved; arguments as of `write_coreml`."""
    system = getattr(coremltools.target, target)
    try:
        program = coremltools.convert(
            trace(frozen),
            convert_to="milinternal",
            inputs=[
                _tensor_type(coremltools, spec, spec.shape) for spec in frozen.signature.inputs
            ],
            outputs=[_tensor_type(coremltools, spec) for spec in frozen.signature.outputs],
            minimum_deployment_target=system,
            pass_pipeline=coremltools.PassPipeline.EMPTY,
        )
        if consume:
            frozen.release()
        stage("converting")
        with tempfile.TemporaryDirectory() as folder:
            model = coremltools.convert(
                program,
                convert_to="mlprogram",
                minimum_deployment_target=system,
                skip_model_load=True,
                **_arithmetic(coremltools, precision, Path(folder)),
            )
    except NotImplementedError as error:
        network = type(frozen.network).__name__
        msg = f"coremltools {coremltools.__version__} cannot convert this {network} for {target} ({error}). {TRY_ELSE}"
        raise ContractError(msg) from error
    _describe(model, frozen.signature)
    model._mil_program = program = None  # its weights are in the package now
    gc.collect()
    return model


def _arithmetic(coremltools: Any, precision: str, folder: Path) -> dict[str, Any]:
    pipeline = coremltools.PassPipeline.DEFAULT
    if precision == "float16":
        from . import coreml_float16

        pipeline.passes = coreml_float16.passes(pipeline.passes)
        pipeline.set_options("edgedistill::halve", {"folder": folder})
        return {"compute_precision": coremltools.precision.FLOAT16, "pass_pipeline": pipeline}
    # It makes scale and shift of a group norm a batch norm of variance 1, and forgets that this op adds
    # 1e-5 to the variance: every norm comes out 106 dB true. Float16 does not see it.
    pipeline.remove_passes({"common::fuse_elementwise_to_batchnorm"})
    return {"compute_precision": coremltools.precision.FLOAT32, "pass_pipeline": pipeline}


def _tensor_type(coremltools: Any, spec: TensorSpec, shape: Any = None) -> Any:
    return coremltools.TensorType(name=spec.name, shape=shape, dtype=np.dtype(spec.dtype).type)


def _describe(model: Any, signature: Signature) -> None:
    """Say what it is, and nothing of when and where it was made."""
    whole = any(spec.kind == "noise" for spec in signature.inputs)
    what = "A whole sampler" if whole else "A network"
    model.short_description = f"{what} of a distilled diffusion model, written by edgedistill."
    model.version = edgedistill.__version__
    for spec in signature.inputs:
        model.input_description[spec.name] = _MEANINGS.get(spec.kind, "")
    for spec in signature.outputs:
        model.output_description[spec.name] = _MEANINGS.get(spec.kind, "")
    model.user_defined_metadata.pop("com.github.apple.coremltools.conversion_date", None)


@contextlib.contextmanager
def _without_known_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # Sizes are fixed here, so what is traced as a constant is one.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # coremltools converts TorchScript; its torch.export frontend gives the same graph more slowly.
        warnings.filterwarnings("ignore", "`torch.jit", category=DeprecationWarning)
        # apple/coremltools#2633; numpy 2.4 makes it an error, hence the ceiling of the coreml extra.
        warnings.filterwarnings("ignore", "Conversion of an array", category=DeprecationWarning)
        yield
