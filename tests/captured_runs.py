"""Calls of small pipelines whose steps are captured."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backdrift.pipelines.captured import CapturedHost
from tiny_pipelines import tiny_sd, tiny_sd3

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4
GUIDANCE = 3.0


def scheduler(name: str, **config: Any) -> Any:
    import diffusers

    common = {} if name.startswith("Flow") else BETAS
    if name in ("DDIMScheduler", "DDPMScheduler"):
        common = {**common, "clip_sample": False}
    return getattr(diffusers, name)(**{**common, **config})


def call(pipe: Any, noise: Tensor, **kwargs: Any) -> Tensor:
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    return pipe("a b", latents=noise, **{**options, **kwargs}).images


def plain(host: CapturedHost) -> Tensor:
    return host.step(host.x, host.evaluate(host.x))


RUNS = [
    ("DDIMScheduler", {}),
    ("DDPMScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DEISMultistepScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


def pipeline(name: str, config: dict[str, Any]) -> Any:
    pipe = tiny_sd3() if name.startswith("Flow") else tiny_sd()
    pipe.scheduler = scheduler(name, **config)
    return pipe
