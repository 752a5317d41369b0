"""Stable Diffusion's and Stable Diffusion 3's sampling loops written out by hand, with the gradient through some steps.

Nothing here knows of backdrift: plain torch on the pipeline's own parts, ``torch.no_grad`` and ``detach`` where a step
carries no gradient. ``passes`` says to which step each pass through the loop belongs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def heun_passes(steps: int) -> list[int]:
    """Two passes a step, but one in the last."""
    return [i // 2 for i in range(2 * steps - 1)]


def sampled_by_hand(
    pipe: Any,
    noise: Tensor,
    embeds: dict[str, Tensor],
    passes: Sequence[int],
    *,
    carrying: Sequence[int],
    cut: int = 0,
    detach_input: bool = False,
    discount: float = 1.0,
    input_discount: float = 1.0,
    guidance_scale: float = 5.0,
) -> Tensor:
    """The pictures, clamped to [0, 1].

    Args:
        carrying: the steps whose network call has a graph.
        cut: the step at whose beginning the latents are detached (all before is under ``no_grad``).
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    total = passes[-1] + 1
    scheduler.set_timesteps(total)
    assert len(scheduler.timesteps) == len(passes)
    sd3 = hasattr(pipe, "transformer")
    latents = noise if sd3 else noise * scheduler.init_noise_sigma
    both = torch.cat([embeds["negative_prompt_embeds"], embeds["prompt_embeds"]])
    pooled = (
        torch.cat([embeds["negative_pooled_prompt_embeds"], embeds["pooled_prompt_embeds"]]) if sd3 else None
    )
    for number, (step, t) in enumerate(zip(passes, scheduler.timesteps, strict=True)):
        with torch.no_grad() if step < cut else nullcontext():
            with nullcontext() if step in carrying else torch.no_grad():
                given = torch.cat([latents] * 2)
                if not sd3:
                    given = scheduler.scale_model_input(given, t)
                if detach_input:
                    given = given.detach()
                elif input_discount != 1 and given.requires_grad:
                    given = Scaled.apply(given, input_discount)
                if sd3:
                    eps = pipe.transformer(
                        hidden_states=given,
                        timestep=t.expand(2),
                        encoder_hidden_states=both,
                        pooled_projections=pooled,
                        return_dict=False,
                    )[0]
                else:
                    eps = pipe.unet(given, t, encoder_hidden_states=both, return_dict=False)[0]
                without, with_prompt = eps.chunk(2)
                eps = without + guidance_scale * (with_prompt - without)
            latents = scheduler.step(eps, t, latents, return_dict=False)[0]
        last_of_step = number + 1 == len(passes) or passes[number + 1] != step
        if discount != 1 and last_of_step and step + 1 < total and latents.requires_grad:
            latents = Scaled.apply(latents, discount)
    latents = latents / pipe.vae.config.scaling_factor
    if sd3:
        latents = latents + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(latents, return_dict=False)[0]
    return (decoded * 0.5 + 0.5).clamp(0, 1)


class Scaled(torch.autograd.Function):
    """The same values; the gradient times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None
