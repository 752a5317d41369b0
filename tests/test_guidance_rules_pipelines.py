"""The rules on pipelines: each beside the same rule in ``bd.sample``, which is held against its paper elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.guidance import Guidance, Relative, presets
from backdrift.guidance.attempt import plain
from tiny_pipelines import noise_for, tiny_sd, tiny_sd3

STEPS = 5


def dark(images: Tensor) -> Tensor:
    """A loss whose gradient by tiny latents is of order 1."""
    return 100 * images.square().mean((1, 2, 3))


def sd(name: str, **options: Any) -> Any:
    import diffusers

    pipe = tiny_sd()
    scheduler = getattr(diffusers, name)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", **options)
    return pipe


PIPES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "epsilon": (lambda: sd("DDIMScheduler", clip_sample=False), bd.Euler(), "exponential"),
    "v": (
        lambda: sd("DDIMScheduler", clip_sample=False, prediction_type="v_prediction"),
        bd.Euler(),
        "exponential",
    ),
    "multistep": (lambda: sd("DPMSolverMultistepScheduler"), bd.DPMSolverPP(), "data"),
    "flow": (tiny_sd3, bd.Euler(), "original"),
}
RULES: dict[str, Callable[..., Guidance]] = {
    "freedom": lambda **k: presets.FreeDoM(dark, 0.3, **k),
    "dps": lambda **k: presets.DPS(dark, 15.0, **k),
    "lgd": lambda **k: presets.LGD(dark, Relative(0.3), samples=2, **k),
    "universal": lambda **k: presets.UniversalGuidance(dark, 4.0, 2, 1.0, **k),
    "mpgd": lambda **k: presets.MPGD(dark, 1.0, "recomputed", **k),
    "mpgd-kept": lambda **k: presets.MPGD(dark, 0.3, "kept", **k),
    "tfg": lambda **k: presets.TFG(dark, 0.5, 0.5, iterations=2, **k),
}


OPTIONS: dict[str, Any] = {"start": 0.3, "stop": 1.0, "repeats": 2, "seed": [5]}


class Setting:
    """A pipeline, its guided call, and the same run in ``bd.sample`` on the pipeline's view."""

    def __init__(self, kind: str) -> None:
        make, self.solver, self.form = PIPES[kind]
        self.pipe = make()
        self.latents, self.view = noise_for(self.pipe), bd.as_denoiser(self.pipe, "a cat", 4.0)
        self.travelled = self.guided(Guidance(plain, dark, **OPTIONS))

    def guided(self, guidance: Guidance) -> Tensor:
        call = {"num_inference_steps": STEPS, "latents": self.latents.clone(), "guidance_scale": 4.0}
        return bd.guide(self.pipe, "a cat", guidance, **call).images

    def decode(self, x0: Tensor) -> Tensor:
        config = self.pipe.vae.config
        shifted = x0 / config.scaling_factor + (config.shift_factor or 0.0)
        return self.pipe.vae.decode(shifted, return_dict=False)[0] / 2 + 0.5

    def sampled(self, guidance: Guidance) -> Tensor:
        grid = bd.pipeline_grid(self.pipe, STEPS)
        how: dict[str, Any] = {"solver": self.solver, "form": self.form, "grid": grid, "guidance": guidance}
        with torch.no_grad():
            return self.decode(bd.sample(self.view.model, self.latents, self.view.cond, **how).x0)


@pytest.fixture(scope="module", params=PIPES)
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_on_a_pipeline_is_the_rule_in_sample(rule: str, setting: Setting) -> None:
    expected = setting.sampled(RULES[rule](**OPTIONS, decode=setting.decode))
    assert float((expected - setting.travelled).abs().max()) > 1e-2  # the rule does something here
    torch.testing.assert_close(setting.guided(RULES[rule](**OPTIONS)), expected, rtol=2e-3, atol=5e-4)
