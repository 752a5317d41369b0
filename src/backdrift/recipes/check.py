"""Is the gradient right, on this pipeline and this machine? Two comparisons, written as a run.

*Against plain autograd*: the same call without backdrift, keeping every activation. The two gradients must be
the same bits on a CPU, at a fraction of the memory.

*Against finite differences*: along a random direction d, in float64 and on a shorter run, the derivative
``<dL/dx_T, d>`` must agree with a central difference of ``L(x_T + h d)``. This knows nothing of autograd. Where a
scheduler would round to float32 in between, it is kept from that: see :mod:`backdrift.recipes.unrounded`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accelerators import has_float64
from ..descent.subject import describe_pipeline, make_examples, picture_size, sampler_call
from ..losses import Loss, resolve
from ..pipelines.differentiable import differentiable
from ..pipelines.refusals import undecorated_call
from ..pipelines.shadow import copied_scheduler
from ..run import Run
from ..stats import RunStats
from .unrounded import Unrounded


@dataclass
class Pulled:
    """A picture, the loss on it, the loss's gradient on the noise, and what that took."""

    images: Tensor
    loss: float
    gradient: Tensor
    seconds: float
    stats: RunStats


def check_gradient(
    pipe: Any,
    prompt: str,
    loss: Any,
    *,
    num_inference_steps: int = 31,
    short_steps: int = 4,
    guidance_scale: float = 3.0,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
) -> Run:
    """Compare the gradient of a loss with respect to the noise with plain autograd and finite differences.

    Args:
        pipe: A pipeline; it is copied in float64 for the finite differences.
        loss: As :func:`backdrift.optimize` takes it.
        num_inference_steps: Steps of the comparison with plain autograd, which keeps all their activations.
        short_steps: Steps of the comparison with finite differences.

    Returns:
        The run. Its figures are ``"largest difference to plain autograd"`` (0 where all bits agree),
        ``"relative difference to finite differences"``, and the activations and seconds of both ways.
    """
    objective = resolve(loss)
    height, width = picture_size(pipe, height, width)
    noise = make_examples(pipe, [prompt], height, width, seed)[0].noise
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, None)
    settings = call | {
        "short_steps": short_steps,
        "loss": objective.spec,
        "pipeline": describe_pipeline(pipe),
    }
    run = Run.open(
        "check", settings, title="the gradient through the whole run, checked", prompt=[prompt], seed=seed, out=out,
        resume=resume, unfingerprinted=(), device=getattr(pipe, "_execution_device", None),
    )  # fmt: skip
    if run.finished:
        return run
    with run.writing():
        began = time.perf_counter()
        ours, plain = (
            pull(pipe, prompt, noise, objective, call),
            pull_plainly(pipe, prompt, noise, objective, call),
        )
        short = call | {"num_inference_steps": short_steps}
        slope, difference = against_differences(pipe, prompt, noise, objective, short, seed)
        run.save_picture("picture", ours.images, f"the picture, on which {objective.spec} is {ours.loss:.4g}")
        size = ours.gradient[0].flatten(0, -3).norm(dim=0)
        caption = "how strongly each place of the noise pulls on the loss"
        run.save_picture("gradient", (size / size.max()).expand(3, *size.shape), caption)
        run.record["figures"] = {
            "largest difference to plain autograd": (ours.gradient - plain.gradient).abs().max().item(),
            "same bits as plain autograd": "yes" if torch.equal(ours.gradient, plain.gradient) else "no",
            f"slope along a random direction ({short_steps} steps, float64)": slope,
            "relative difference to finite differences": difference,
            "activations held at once, backdrift (MB)": ours.stats.peak_bytes / 1e6,
            "activations held at once, plain autograd (MB)": plain.stats.peak_bytes / 1e6,
            "seconds, backdrift": ours.seconds,
            "seconds, plain autograd": plain.seconds,
        }
        run.record["stats"] = {
            "network_calls": ours.stats.network_calls,
            "redone": ours.stats.calls_redone,
            "vjps": ours.stats.vjps,
            "peak_bytes": ours.stats.peak_bytes,
            "seconds": time.perf_counter() - began,
        }
        run.finish()
    return run


def pull(
    pipe: Any, prompt: str, noise: Tensor, loss: Loss, call: dict[str, Any], memory: str = "min"
) -> Pulled:
    """The gradient by ``differentiable``, pictures clamped as diffusers does."""
    began = time.perf_counter()
    leaf = noise.detach().clone().requires_grad_()
    with differentiable(pipe, memory=memory, clamp=True) as tracked:
        images = pipe(prompt=prompt, latents=leaf, **_random(call), output_type="pt").images
    return _pulled(images, leaf, loss(images, prompt), began, tracked.stats)


def pull_plainly(pipe: Any, prompt: str, noise: Tensor, loss: Loss, call: dict[str, Any]) -> Pulled:
    """The gradient by the pipeline's own call with gradients on, all activations kept."""
    held = pull(pipe, prompt, noise, loss, call, "max").stats  # only to learn what plain autograd holds
    began = time.perf_counter()
    leaf = noise.detach().clone().requires_grad_()
    # Multistep schedulers keep the last outputs, here with all their graphs: not in the user's scheduler.
    own = copy.copy(pipe)
    own.__dict__["scheduler"] = copied_scheduler(pipe.scheduler)
    with torch.enable_grad():
        out = undecorated_call(type(pipe))(
            own, prompt=prompt, latents=leaf, **_random(call), output_type="pt"
        )
        return _pulled(out.images, leaf, loss(out.images, prompt), began, held)


def against_differences(
    pipe: Any, prompt: str, noise: Tensor, loss: Loss, call: dict[str, Any], seed: int, step: float = 1e-2
) -> tuple[float, float]:
    """The slope along a random direction of unit length, in float64, and how far central differences are from it.

    They are of fourth order in the step, so that it can be large compared with what is lost to rounding.
    """
    pipe, loss = copy.deepcopy(pipe), copy.deepcopy(loss)
    if not has_float64(noise.device):
        pipe, noise = pipe.to("cpu"), noise.cpu()
    pipe, loss, noise = pipe.to(torch.float64), loss.to(noise.device).double(), noise.double()
    draw = torch.Generator().manual_seed(seed + 1)
    direction = torch.randn(noise.shape, generator=draw, dtype=torch.float64).to(noise.device)
    direction = direction / direction.norm()

    def value(at: Tensor) -> float:
        # differentiable() for its unclamped pictures; no gradient is taken
        with torch.no_grad(), differentiable(pipe, memory="min"):
            images = pipe(prompt=prompt, latents=at, **_random(call), output_type="pt").images.detach()
        return loss(images, prompt).sum().item()

    with Unrounded():
        leaf = noise.clone().requires_grad_()
        with differentiable(pipe, memory="min"):
            images = pipe(prompt=prompt, latents=leaf, **_random(call), output_type="pt").images
        (gradient,) = torch.autograd.grad(loss(images, prompt).sum(), leaf)
        slope = (gradient * direction).sum().item()
        measured = central_slope(lambda h: value(noise + h * direction), step)
    return slope, abs(slope - measured) / abs(measured)


def central_slope(value: Callable[[float], float], step: float) -> float:
    """The derivative of ``value`` at 0 by central differences of fourth order: four evaluations."""
    near, far = (value(h) - value(-h) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def _random(call: dict[str, Any]) -> dict[str, Any]:
    """The call with a fresh generator, so that stochastic samplers draw the same noise every time."""
    return call | {"generator": torch.Generator().manual_seed(0)}


def _pulled(images: Tensor, leaf: Tensor, values: Tensor, began: float, stats: RunStats) -> Pulled:
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return Pulled(images.detach(), values.sum().item(), gradient, time.perf_counter() - began, stats)
