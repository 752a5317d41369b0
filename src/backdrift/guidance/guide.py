"""``guide``: a pipeline's call, guided at its scheduler's steps."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, MissingGradientError, UnsupportedError
from ..losses import resolve
from ..nests import tensors
from ..pipelines.calls import PipelineCall
from ..pipelines.capture import Capture, CapturedHost
from ..pipelines.endings import ending_of
from ..pipelines.modular import is_modular
from ..pipelines.outputs import SafetyBeside, first_tensor, to_pil
from ..pipelines.refusals import plain_class
from .base import Guidance, Losses
from .measured import usual_strength
from .symplectic import SymplecticAdjointGuidance
from .trace import GuidanceTrace


@dataclass(frozen=True)
class Guided:
    """What :func:`guide` returns.

    Attributes:
        images: (N, 3, H, W) in [0, 1], not clamped.
        trace: what guidance did.
        flagged: what the pipeline's safety checker says of each picture; None without a checker.
        seconds: wall time of the call.
    """

    images: Tensor
    trace: GuidanceTrace
    flagged: list[bool] | None
    seconds: float
    _pipe: Any

    @property
    def pil(self) -> list[Any]:
        """PIL copies of the pictures, clamped."""
        return to_pil(self._pipe, self.images)


def guide(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    guidance: Guidance | Losses,
    *,
    num_inference_steps: int = 100,
    seed: int | Sequence[int] = 0,
    latents: Tensor | None = None,
    **call: Any,
) -> Guided:
    """Sample pictures that a loss guides, in Symplectic Adjoint Guidance's own order.

    The pipeline's own code runs on a copy of it that shares the weights. Where its scheduler would step, the guided
    step is taken: the step itself, then the pull, then fresh noise and again where it is repeated; what a multistep
    scheduler remembers is of the last attempt.

    Args:
        pipe: a diffusers pipeline with one scheduler: DDIM, DDPM, DPM-Solver(++), DEIS, Euler (ancestral) or
            FlowMatchEuler.
        prompt: one for each picture (or as many as the pipeline makes of it: ``num_images_per_prompt``).
        guidance: a rule with its loss, such as :class:`~backdrift.SymplecticAdjointGuidance`; or a loss, for that rule
            with its defaults (on a built-in pipeline with a strength that was measured there,
            :mod:`~backdrift.guidance.measured`).
        num_inference_steps: the paper's 100.
        seed: of the pictures' noise: one number, from which picture i takes ``seed + i``, or one for each.
        latents: the noise itself, in the pipeline's own shape.
        call: the pipeline's own arguments (``guidance_scale``, ``height``, ``negative_prompt``, ``image`` …).

    Raises:
        InputError: arguments do not go together, or the guidance does not fit the run; nothing has been sampled then.
        UnsupportedError: the pipeline's steps cannot be taken again, or how it decodes is not known.
        MissingGradientError: an argument requires grad.
        NonFiniteError: the loss or its gradient became NaN or infinite.

    Example:
        >>> style = bd.SymplecticAdjointGuidance("style:reference.png", n=4, repeats=2)
        >>> bd.guide(pipe, "a red seven", style, num_inference_steps=100).pil[0]
    """
    _check(pipe, prompt, num_inference_steps, call)
    if not isinstance(guidance, Guidance):
        loss = resolve(guidance)
        strength = usual_strength(pipe, loss, num_inference_steps, call)
        guidance = SymplecticAdjointGuidance(loss, strength=strength)
    prompts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
    per_prompt = call.get("num_images_per_prompt") or 1
    each = None if prompts is None else [p for p in prompts for _ in range(per_prompt)]
    count = _count(each, latents, call)
    if latents is not None and len(latents) != count:
        raise InputError(f"latents has {len(latents)} samples, and the call makes {count} pictures")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors([latents, *call.values()])):
        raise MissingGradientError(
            "an argument of guide requires grad, but a guided run is not differentiated: detach it, or guide under "
            "torch.no_grad()"
        )
    call |= {"num_inference_steps": num_inference_steps, "generator": _generators(seed, count)}
    if prompt is not None:
        call["prompt"] = prompts if len(prompts or []) > 1 else prompt
    if latents is not None:
        call["latents"] = latents

    begun = time.perf_counter()
    ending = ending_of(plain_class(type(pipe)), clamp=False)
    made = PipelineCall.of(pipe, (), call, ending.output_type if ending is not None else "pt")

    def take(host: CapturedHost) -> Tensor:
        if host.index == 0:
            guidance.begin(host.total, len(host.x))
        return guidance.advance(host)

    def rehearse(latents: Tensor, decode: Any, total: int | None) -> None:
        if total is None and _starts_from_noise(call):
            total = num_inference_steps
        if total is not None:
            guidance.check(total, count)
        guidance.rehearse(latents[:count], decode, each)  # guidance has the state twice

    with (
        torch.no_grad(),
        Capture.of_clone(
            pipe, take, decode=guidance.scoring.decode, prompts=each, opening=rehearse
        ) as capture,
    ):
        safety = None
        clone = capture.pipe
        if vars(clone).get("safety_checker") is not None and hasattr(clone, "run_safety_checker"):
            safety = clone.__dict__["run_safety_checker"] = SafetyBeside(pipe.run_safety_checker)
        if ending is None:
            out = made.run(clone)
        else:
            with ending:
                out = made.run(clone)
            out = ending.in_place_of_arrays(out)
    images = first_tensor(out)
    if images is None:
        raise UnsupportedError(
            f"{type(pipe).__name__} did not return pictures as a tensor, so they cannot be shown"
        )
    flags = None if safety is None else safety.flags
    return Guided(images.detach(), guidance.trace, flags, time.perf_counter() - begun, pipe)


def _check(pipe: Any, prompt: Any, num_inference_steps: Any, call: dict[str, Any]) -> None:
    if (
        isinstance(num_inference_steps, bool)
        or not isinstance(num_inference_steps, int)
        or num_inference_steps < 1
    ):
        raise InputError(f"num_inference_steps must be a whole number >= 1; got {num_inference_steps!r}")
    for name in ("generator", "output_type", "callback_on_step_end"):
        if name in call:
            other = {
                "generator": "seed=",
                "output_type": "the returned images",
                "callback_on_step_end": "callback=",
            }
            raise InputError(
                f"guide sets {name} itself: leave it out, and use {other[name]} of guide or the guidance"
            )
    if torch.is_inference_mode_enabled():
        raise InputError("guide inside torch.inference_mode(): leave that, it forbids gradients")
    cls = plain_class(type(pipe))
    known = inspect.signature(cls.__call__).parameters
    # Ordinary pipelines have ** for names that are no longer used; what is misspelled would be lost there in silence.
    names = [k for k, p in known.items() if k != "self" and p.kind is not p.VAR_KEYWORD]
    asked = [*(["prompt"] if prompt is not None else []), *call]
    wrong = [] if is_modular(cls) else [name for name in asked if name not in names]
    if wrong:
        raise InputError(f"{cls.__name__} takes no argument {wrong[0]!r}; it takes {', '.join(names)}")


def _starts_from_noise(call: dict[str, Any]) -> bool:
    """Whether the run has as many steps as were asked for: those that start from a picture have fewer, and a call may
    have a list of times of its own."""
    return all(call.get(name) is None for name in ("strength", "image", "timesteps", "sigmas"))


def _count(prompts: list[str] | None, latents: Tensor | None, call: dict[str, Any]) -> int:
    """Pictures that the call will make."""
    if prompts is not None:
        return len(prompts)
    embeds = call.get("prompt_embeds")
    if isinstance(embeds, Tensor):
        return len(embeds) * (call.get("num_images_per_prompt") or 1)
    if latents is not None:
        return len(latents)
    labels = call.get("class_labels")
    if isinstance(labels, list):
        return len(labels)
    return int(call.get("batch_size") or 1)


def _generators(seed: int | Sequence[int], count: int) -> Any:
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise InputError(
            f"seed is a whole number >= 0, or one for each of the {count} pictures; got {seed!r}"
        )
    made = [torch.Generator().manual_seed(s) for s in seeds]
    return made[0] if count == 1 else made
