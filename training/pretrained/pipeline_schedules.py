"""What a pipeline's scheduler says of its network: how its noise rises, and what it predicts. Knows configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import diffusers
import torch
from torch import Tensor

from training.diffusion import Prediction, Schedule
from training.pretrained.pipeline_faults import first_line

PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
"""Of (1 - s) x + s eps, whose network is told s T. They differ in the s that they step to."""


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """What the network of a scheduler predicts. Raises ValueError if it is not known."""
    if config.get("_class_name") in FLOWS:
        return "flow"
    name = config.get("prediction_type", "epsilon")
    if name not in PREDICTIONS:
        raise ValueError(f"its network predicts {name}; known are {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The schedule whose noise a scheduler's network is shown. Raises ValueError for what is none that is known."""
    is_flow = config.get("_class_name") in FLOWS
    for wrong, reason in _flow_faults(config) if is_flow else _faults(config):
        if wrong:
            raise ValueError(reason)
    if is_flow:
        return Schedule.rectified_flow(config.get("num_train_timesteps", 1000), config.get("shift", 1.0))
    alphas_cumprod = _alphas_cumprod(config)
    schedule = Schedule.from_alphas_cumprod(alphas_cumprod)
    if prediction_of(config) == "eps" and float(alphas_cumprod[-1]) == 0:
        raise ValueError("it predicts eps, which says nothing of x where alpha is 0, at t = 1")
    return schedule


def unheeded(config: Mapping[str, Any]) -> list[str]:
    """What of a scheduler no student learns: settings by which it bounds the x of every step."""
    return [setting for setting in ("clip_sample", "thresholding") if _says(config, setting)]


def _flow_faults(config: Mapping[str, Any]) -> list[tuple[bool, str]]:
    return [
        (bool(config.get("use_dynamic_shifting")), "a flow whose shift depends on the image's size is not known"),
        (bool(config.get("invert_sigmas")), "a flow whose time runs from noise to image (invert_sigmas) is not known"),
        (bool(config.get("scale_factors")), "a flow in latents of several sizes (scale_factors) is not known"),
    ]


def _faults(config: Mapping[str, Any]) -> list[tuple[bool, str]]:
    told_of_noise = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return [
        (
            bool(config.get("use_flow_sigmas")),
            f"its scheduler takes the noise of a flow (use_flow_sigmas); such schedulers known are {', '.join(FLOWS)}",
        ),
        (told_of_noise, "a network that is told the logarithm of its noise (timestep_type continuous) is not known"),
    ]


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    try:
        found: Tensor | None = getattr(kind.from_config(config), "alphas_cumprod", None) if kind is not None else None
    except Exception as error:  # whatever odd settings make a scheduler raise
        raise ValueError(f"its scheduler {name}: {first_line(error)}") from error
    if found is None:
        raise ValueError(f"its scheduler {name} has no alphas_cumprod and is not a rectified flow")
    # Some, such as EulerDiscreteScheduler, then end at a number beside 0, which may be above the one before.
    if _says(config, "rescale_betas_zero_snr"):
        found = torch.cat([found[:-1], found.new_zeros(1)])
    return found


def _says(config: Mapping[str, Any], setting: str) -> bool:
    """Whether a scheduler has a setting, by its config or by default: configs may hold those of other schedulers."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    known = {} if kind is None else signature(kind).parameters
    return setting in known and bool(config.get(setting, known[setting].default))
