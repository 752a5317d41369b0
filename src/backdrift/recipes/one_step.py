"""One-step guidance (FreeDoM, Yu et al. 2023), the usual way to steer a sampler by a loss on pictures.

At each step the finished picture is *estimated* from the noisy one by a single network call,
``x0 = (x - sigma eps)/alpha``; the loss on that estimate pulls the next state, ``x' <- x' - rho dL/dx``, by
``rho = strength * s * RMS(eps_c - eps_0) / RMS(dL/dx)`` with the guidance scale s (without classifier-free
guidance RMS(eps) takes the place of s RMS(eps_c - eps_0)). ``repeats`` > 1 goes back a step with fresh noise
and tries again ("time travel"). Every sample has its own rho.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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


def search(
    pipe: Any,
    prompt: str,
    noises: Callable[[int], Tensor],
    loss: Callable[[Tensor], Tensor],
    seconds: float,
    *,
    num_inference_steps: int = 31,
    guidance_scale: float = 7.5,
) -> tuple[Tensor, dict[str, Any]]:
    """The best picture that one-step guidance finds within ``seconds``.

    Strengths, windows and repeats are tried from ``noises(0)``, then from further noises, so the baseline also
    has the luck of many draws. At least one try is made, and a try that has begun is finished.

    Returns:
        The picture (1, 3, H, W), and {``loss``, ``tries``, ``seconds``, ``draw``, the best try's settings}.
    """
    began = time.perf_counter()
    best: Tensor | None = None
    found: dict[str, Any] = {"tries": 0}
    for draw, how in _tries():
        image = guide_one_step(
            pipe, [prompt], noises(draw), loss, how, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, seed=draw,
        )  # fmt: skip
        with torch.no_grad():
            value = loss(image).item()
        found["tries"] += 1
        if best is None or value < found["loss"]:
            best = image
            found |= {"loss": value, "draw": draw, **asdict(how)}
        if time.perf_counter() - began >= seconds:
            break
    assert best is not None  # the tries never end by themselves
    return best, found | {"seconds": time.perf_counter() - began}


def _tries() -> Iterator[tuple[int, OneStep]]:
    strengths, windows = (0.2, 0.5, 0.1, 1.0), ((0.3, 0.7), (0.0, 0.7), (0.0, 1.0))
    settings = [OneStep(s, *w, r) for r in (1, 3) for w in windows for s in strengths]
    for draw in itertools.count():
        for how in settings:
            yield draw, how


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
