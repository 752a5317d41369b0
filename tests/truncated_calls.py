"""Pipelines whose calls carry gradients in some of their steps."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tiny_pipelines import (
    PICTURE,
    tiny_sd,
    tiny_sd3,
)
from truncated_loops import heun_passes

N = 4
CASES = {
    "sd-ddim": (tiny_sd, "DDIMScheduler", {}, list(range(N))),
    "sd-euler": (tiny_sd, "EulerDiscreteScheduler", {}, list(range(N))),
    "sd-heun": (tiny_sd, "HeunDiscreteScheduler", {}, heun_passes(N)),
    "sd-dpm": (tiny_sd, "DPMSolverMultistepScheduler", {}, list(range(N))),
    "sd-pndm": (tiny_sd, "PNDMScheduler", {"skip_prk_steps": True}, [0, 0, 1, 2, 3]),
    "sd3-euler": (tiny_sd3, "FlowMatchEulerDiscreteScheduler", {}, list(range(N))),
    "sd3-heun": (tiny_sd3, "FlowMatchHeunDiscreteScheduler", {}, heun_passes(N)),
    "sd3-dpm": (
        tiny_sd3,
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        list(range(N)),
    ),
}


def with_lora(pipe: Any) -> Any:
    from peft import LoraConfig

    torch.manual_seed(7)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return pipe


def lora(pipe: Any) -> list[Tensor]:
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return [p for n, p in network.named_parameters() if "lora_" in n]


def prepared(case: str) -> tuple[Any, list[int]]:
    build, scheduler, config, passes = CASES[case]
    pipe = with_lora(build())
    cls = getattr(diffusers, scheduler)
    own = {} if scheduler.startswith("FlowMatch") else dict(pipe.scheduler.config)
    pipe.scheduler = cls.from_config({k: v for k, v in own.items() if not k.startswith("_")} | config)
    return pipe, passes


def arguments(pipe: Any, noise: Tensor, steps: int = N) -> dict[str, Any]:
    size = {"height": PICTURE, "width": PICTURE}
    return {"latents": noise, "num_inference_steps": steps, "guidance_scale": 5.0, **size}
