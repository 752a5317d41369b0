"""One-step guidance (FreeDoM, Yu et al. 2023), the usual way to steer a sampler by a loss on pictures.

At each step the finished picture is *estimated* from the noisy one by a single network call,
``x0 = (x - sigma eps)/alpha``; the loss on that estimate pulls the next state, ``x' <- x' - rho dL/dx``, by
``rho = strength * s * RMS(eps_c - eps_0) / RMS(dL/dx)`` with the guidance scale s (without classifier-free
guidance RMS(eps) takes the place of s RMS(eps_c - eps_0)). ``repeats`` > 1 goes back a step with fresh noise
and tries again ("time travel"). Every sample has its own rho.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..descent.randomness import generator
from ..errors import InputError
from .ddim import DDIM


@dataclass(frozen=True)
class OneStep:
    """How strongly and when to guide.

    Attributes:
        strength: FreeDoM's 0.2.
        start, stop: the fraction of the run in which the loss pulls; FreeDoM's 0.3 to 0.7.
        repeats: tries per guided step; FreeDoM's 3.
    """

    strength: float = 0.2
    start: float = 0.3
    stop: float = 0.7
    repeats: int = 1

    def __post_init__(self) -> None:
        if not (self.strength > 0 and 0 <= self.start < self.stop <= 1 and self.repeats >= 1):
            raise InputError(f"{self}: needs strength > 0, 0 <= start < stop <= 1 and repeats >= 1.")


def guide_one_step(
    pipe: Any,
    prompts: Sequence[str],
    noise: Tensor,
    loss: Callable[[Tensor], Tensor],
    how: OneStep,
    *,
    num_inference_steps: int = 31,
    guidance_scale: float = 7.5,
    seed: int = 0,
) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1], not clamped, of a DDIM run that ``loss`` guides.

    Args:
        noise: (n, …), standard normal.
        loss: pictures -> (n,).
        seed: of the fresh noise where ``repeats`` > 1.
    """
    with torch.no_grad():
        ddim = DDIM(pipe, prompts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        x, fresh = noise.to(ddim.positive), generator(seed, "time travel")
        for i in range(len(ddim)):
            following = x
            guided = how.start <= i / len(ddim) < how.stop
            for k in range(how.repeats if guided else 1):
                if k:
                    x = _back(ddim, following, i, fresh)
                following = (
                    _guided_step(ddim, x, i, loss, how.strength) if guided else _plain_step(ddim, x, i)
                )
            x = following
        return ddim.decode(x)


def safety_flags(pipe: Any, images: Tensor) -> list[bool]:
    """What the pipeline's safety checker says of pictures in [0, 1] that its own call did not finish."""
    if getattr(pipe, "safety_checker", None) is None or not hasattr(pipe, "run_safety_checker"):
        return [False] * len(images)
    _, flags = pipe.run_safety_checker(images.detach() * 2 - 1, images.device, pipe.dtype)
    return [bool(flag) for flag in flags]


def calls_of(how: OneStep, num_inference_steps: int) -> int:
    """Network calls of one guided run for each picture, forward and back: a guided step's estimate is pulled back."""
    guided = sum(how.start <= i / num_inference_steps < how.stop for i in range(num_inference_steps))
    return num_inference_steps - guided + 2 * how.repeats * guided


def _guided_step(ddim: DDIM, x: Tensor, i: int, loss: Callable[[Tensor], Tensor], strength: float) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        eps, more = ddim.predict(x, i)
        (pull,) = torch.autograd.grad(loss(ddim.decode(ddim.clean(x, eps, i))).sum(), x)
    unit = _rms(ddim.guidance_scale * more if ddim.negative is not None else eps.detach())
    rho = strength * unit / _rms(pull).clamp_min(torch.finfo(pull.dtype).tiny)
    return ddim.step(x.detach(), eps.detach(), i) - rho * pull


def _plain_step(ddim: DDIM, x: Tensor, i: int) -> Tensor:
    return ddim.step(x, ddim.predict(x, i)[0], i)


def _back(ddim: DDIM, x: Tensor, i: int, fresh: torch.Generator) -> Tensor:
    """From time i + 1 to time i by the forward process: scaled, with fresh noise."""
    ratio = (ddim.alphas[i] / ddim.alphas[i + 1]).item()
    spread = (ddim.sigmas[i] ** 2 - (ratio * ddim.sigmas[i + 1]) ** 2).clamp_min(0).sqrt().item()
    return ratio * x + spread * torch.randn(x.shape, generator=fresh).to(x)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, (n, 1, 1, 1)."""
    return x.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (x.ndim - 1))
