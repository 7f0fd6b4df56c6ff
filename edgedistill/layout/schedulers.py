"""What the loaders' schedulers read of a configuration and what they can make of it, as data.

Sources: openvino.genai 2026.4 (`schedulers/{types,ddim,lcm}.cpp`), measured with 2026.4.1;
apple/ml-stable-diffusion (`DPMSolverMultistepScheduler.swift`); diffusers 0.39.
"""

from collections.abc import Mapping
from typing import Any

GENAI_BETAS = ("linear", "scaled_linear")
SPACINGS = ("leading", "linspace", "trailing")
STATED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
"""Keys whose defaults differ between diffusers' schedulers and openvino.genai's."""

SWIFT_BETAS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

SCALING = ("Euler", "LMS", "Heun", "KDPM2", "EDM")
"""How the names of schedulers begin that scale the network's input, so that it is not the latents' buffer."""

_DIFFUSERS = """
Amused CMStochasticIterative CogVideoXDDIM CogVideoXDPM ConsistencyDecoder CosineDPMSolverMultistep
DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DDPMWuerstchen DEISMultistep DPMSolverMultistep
DPMSolverMultistepInverse DPMSolverSDE DPMSolverSinglestep EDMDPMSolverMultistep EDMEuler
EulerAncestralDiscrete EulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM
HeunDiscrete IPNDM KDPM2AncestralDiscrete KDPM2Discrete KarrasVe LCM LMSDiscrete PNDM RePaint
SASolver SCM ScoreSdeVe ScoreSdeVp TCD UnCLIP UniPCMultistep VQDiffusion
"""
DIFFUSERS_CLASSES = frozenset(f"{name}Scheduler" for name in _DIFFUSERS.split())
