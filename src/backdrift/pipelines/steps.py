"""Whether the steps of a pipeline's schedulers are differentiable, found before it samples.

diffusers' own classes are compared with plain autograd in the tests. Their code and that of others is searched for what
cuts the graph; the step of a class from elsewhere is differentiated once on a few numbers and compared with finite
differences.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..accelerators import random_numbers_kept
from ..errors import UnsupportedError
from .refusals import names, plain_class, reached
from .shadow import copied_scheduler

_TOKENS = {"multinomial", "argmax", "topk", "gumbel_noised"}
_CUTS = {"detach", "no_grad", "inference_mode", "set_grad_enabled", "numpy", "from_numpy"}
# Arguments that pipelines and schedulers read as plain numbers: rounded, truncated, turned into positions.
_NUMBERS = (
    "timesteps",
    "sigmas",
    "strength",
    "denoising_start",
    "denoising_end",
    "control_guidance_start",
    "control_guidance_end",
    "num_inference_steps",
    "audio_start_in_s",
    "audio_end_in_s",
)
_RIGHT: set[Any] = set()  # schedulers from elsewhere, with their settings, whose gradient was found right
_TOLERANCE = 0.05  # between a gradient and finite differences in float32


def check_steps(pipe: Any) -> None:
    """Refuse a pipeline whose scheduler (or quantising decoder) has no gradient, or a wrong one.

    Raises:
        UnsupportedError: naming the scheduler's class, what it does, and what to do.
    """
    for key, value in list(vars(pipe).items()):
        if callable(getattr(value, "step", None)) and callable(getattr(value, "set_timesteps", None)):
            cls: Any = type(value)
            _check_code(key, cls)
            if not type(value).__module__.startswith("diffusers.") and not inspect.isclass(value):
                _check_numbers(key, value)
    if any(type(value).__name__ == "VQModel" for value in vars(pipe).values()):
        name = plain_class(type(pipe)).__name__
        if not any("force_not_quantize" in _keywords(code) for _, code in reached(plain_class(type(pipe)))):
            raise UnsupportedError(
                f"{name} rounds its latents to a codebook before it decodes them, and the gradient of that is a guess "
                "(straight-through): ask for output_type='latent' and decode with vqvae.decode(latents, "
                "force_not_quantize=True)"
            )


def check_numbers(inputs: dict[str, Tensor]) -> None:
    """Refuse tensors that require grad where the pipeline reads a plain number.

    Raises:
        UnsupportedError: naming the argument.
    """
    for name in inputs:
        if name.split("[")[0] in _NUMBERS:
            raise UnsupportedError(
                f"{name} requires grad, but pipelines and schedulers read it as a plain number (rounded, truncated "
                "or turned into a position), which has no gradient: pass it detached; for gradients by times "
                "use backdrift.sample"
            )


@cache
def _check_code(key: str, cls: Any) -> None:
    used: dict[str, str] = {}
    for name, code in reached(cls, "step"):
        used |= dict.fromkeys(names(code), name)
    if not _TOKENS.isdisjoint(used):
        raise UnsupportedError(
            f"{cls.__name__} samples discrete tokens ({', '.join(sorted(_TOKENS & used.keys()))}), which have no "
            "gradient: use a pipeline whose latents are continuous"
        )
    cuts = sorted(_CUTS & used.keys())
    if cuts or hasattr(cls.step, "__wrapped__"):
        what = f"{used[cuts[0]]} uses {cuts[0]}" if cuts else "step is decorated"
        raise UnsupportedError(
            f"the step of {cls.__name__} ({key}) cuts the gradient: {what}. Use one of diffusers' own schedulers: "
            f"pipe.{key} = DDIMScheduler.from_config(pipe.{key}.config)"
        )


def _check_numbers(key: str, scheduler: Any) -> None:
    setting = (type(scheduler), str(getattr(scheduler, "config", None)))
    if setting in _RIGHT:
        return
    with random_numbers_kept():
        error = step_error(scheduler)
    if error is not None and error > _TOLERANCE:
        raise UnsupportedError(
            f"the step of {type(scheduler).__name__} ({key}) has a gradient that is {error:.0%} off finite "
            "differences: it rounds or detaches what it computes with. Use one of diffusers' own schedulers: "
            f"pipe.{key} = DDIMScheduler.from_config(pipe.{key}.config)"
        )
    _RIGHT.add(setting)


def step_error(scheduler: Any, steps: int = 4) -> float | None:
    """The relative error of a scheduler's gradient against a central difference, over a few steps on a toy network.

    Returns:
        The error, or None if the scheduler cannot be run like this.
    """
    generator = torch.Generator().manual_seed(0)
    start, way = torch.randn(2, 1, 4, 4, 4, generator=generator).double()

    def end_of(x: Tensor) -> Tensor:
        own, torch_seed = copied_scheduler(scheduler), torch.default_generator.manual_seed(0)
        takes = inspect.signature(own.step).parameters
        extra = {"generator": torch_seed} if "generator" in takes else {}
        own.set_timesteps(steps)
        for t in own.timesteps:
            scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
            x = own.step(torch.tanh(0.7 * scaled + 0.1), t, x, **extra, return_dict=False)[0]
        return x.double().square().mean().sqrt()

    try:
        moving = torch.zeros((), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            end = end_of(start + moving * way)
        found = torch.autograd.grad(end, moving)[0] if end.requires_grad else torch.zeros(())
        with torch.no_grad():
            # The wider one for schedulers that compute in float32, the narrower one for those that clip.
            slopes = [(end_of(start + h * way) - end_of(start - h * way)) / (2 * h) for h in (1e-3, 1e-4)]
            if found == 0:  # as of a step that rounds: right, but of no use
                slopes = [end_of(start + way) - end_of(start)]
    except Exception:  # takes other arguments: nothing can be said
        return None
    return min(abs(float(found - true)) / max(abs(float(true)), 1e-3) for true in slopes)


def _keywords(code: Any) -> set[str]:
    words: set[str] = set()
    for constant in code.co_consts:
        if isinstance(constant, tuple):
            words |= {word for word in constant if isinstance(word, str)}
        elif hasattr(constant, "co_consts"):
            words |= _keywords(constant)
    return words
