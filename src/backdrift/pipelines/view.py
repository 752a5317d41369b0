"""A pipeline's denoising network as a :class:`~backdrift.denoiser.Denoiser`, and its time grid.

The bridge to :func:`backdrift.sample`: solvers, forms and gradient methods work on what they are given here, and
know nothing of pipelines. Stable Diffusion's and Stable Diffusion 3's networks are read as they are; of any other
pipeline the user's own call is made once and listened to (:mod:`.views.observed`), which says what its networks are
given, how guidance is made of what they return, and at which times they are asked.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import InputError, UnsupportedError
from ..grids import TimeGrid
from .decoding import Decoder
from .frozen import Frozen
from .offloaded import Offloading
from .shadow import Train, trained_parameters
from .trainable import check_trainable
from .views.asked import asked
from .views.called import called
from .views.observed import Observed, check_view, observed
from .views.of_text import Prompt, family_of, of_text
from .views.process import Interpolation, grid_of, is_flow, process_of, times_of

__all__ = ["View", "as_denoiser", "pipeline_grid"]

_GUIDANCE = 7.5  # of Stable Diffusion's and Stable Diffusion 3's


@dataclass(frozen=True)
class View:
    """What :func:`as_denoiser` returns: ``sample(view.model, x_T, view.cond, grid=view.grid(20))``.

    Attributes:
        model: the network with schedule, prediction and guidance.
        cond: the conditioning, a dictionary of the network's arguments. A tensor that was handed in, and that the
            pipeline passes on as it is, is in it itself.
        x_T: where the call that the view was made of starts, (B, …), with its graph: by ``latents=``, ``generator=``,
            or a picture's noised latents. None where no call was made.
    """

    model: Denoiser
    cond: dict[str, Any]
    x_T: Tensor | None = None
    _pipe: Any = field(default=None, repr=False)
    _found: Observed | None = field(default=None, repr=False)
    _call: Mapping[str, Any] | None = field(default=None, repr=False)
    _offloading: Offloading | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Any]:
        """``model, cond = as_denoiser(…)``."""
        return iter((self.model, self.cond))

    def grid(self, num_inference_steps: int | None = None) -> TimeGrid:
        """The times at which the pipeline would step in this call: :func:`pipeline_grid`, for the call's own size.

        Args:
            num_inference_steps: those of the call if None.

        Raises:
            InputError: ``num_inference_steps`` is not positive, or not given where no call was made.
            UnsupportedError: the scheduler's list of times repeats some (Heun, PNDM).
        """
        found = self._found
        if num_inference_steps is not None:
            _check_steps(num_inference_steps)
        if found is None or self._call is None:
            if num_inference_steps is None:
                raise InputError("this view was made without a call: give num_inference_steps")
            return pipeline_grid(self._pipe, num_inference_steps)
        if num_inference_steps is not None:
            call = asked(self._pipe, {}, {**self._call, "num_inference_steps": num_inference_steps})
            with torch.no_grad():
                found = observed(self._pipe, call, set(), outputs=[heard.output for heard in found.calls])
        return grid_of(self._pipe.scheduler, found.times)

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1], not clamped, of clean samples; differentiable.

        Raises:
            UnsupportedError: how this pipeline decodes is not known: decode with its parts.
        """
        return self.decoding()(x0)

    def decoding(self, frozen: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
        """:meth:`decode`, with the copy ``frozen`` of the pipeline's autoencoder where one is given."""
        calls = [] if self._found is None else self._found.calls
        return Decoder(self._pipe, frozen=frozen, networks=self._networks).of(calls)

    def autoencoder(self, x0: Tensor) -> nn.Module | None:
        """A frozen copy of the network that decodes such clean samples; None for a pipeline in pixels.

        Raises:
            UnsupportedError: how this pipeline decodes is not known.
        """
        return Decoder(self._pipe, networks=self._networks).autoencoder(x0)

    @property
    def _networks(self) -> Frozen:
        return Frozen(self._pipe, self._offloading)  # made anew: the decoder may have other weights


def as_denoiser(
    pipe: Any,
    prompt: Prompt = None,
    guidance_scale: float | None = None,
    *,
    negative_prompt: Prompt = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    train: Train = None,
    interpolation: Interpolation = "linear",
    **call: Any,
) -> View:
    """The ``Denoiser`` of a pipeline, with the conditioning of a prompt.

    The network is a copy on the same weights, in the modes and with the adapters of this moment. Its state is the
    network's own input: the pipeline's latents, divided by ``scheduler.init_noise_sigma`` at the start, where they are
    noise ~ N(0, I); of EDM's schedulers it is x0 + sigma eps, and the start is sigma times noise.

    Stable Diffusion and Stable Diffusion 3 are read as they are unless ``call`` says more. Of other pipelines (Stable
    Diffusion XL, Flux, PixArt, Sana, control networks, inpainting, image to image, video, sound) the call is made once,
    on a copy, for one step's network calls. The rest of its loop is gone through without any, to see that all steps are
    alike: guidance that changes on the way, latents that are put back between steps, a second network for low noise,
    and rules other than classifier-free guidance (rescaled or not) are refused by name. Network calls that the pipeline
    makes one after the other (true guidance of Flux) stay two.

    The weights of an offloaded pipeline's networks are on the device for the view's calls, forward and backward, in the
    pipeline's own grain: a network, a block, or a layer (:mod:`~backdrift.residence`). A whole network stays there
    until pictures are decoded or the model is gone. The pipeline's hooks are left as they are.

    Args:
        pipe: a diffusers pipeline. The scheduler is read for schedule and prediction only; its own rule for stepping is
            not used (see :meth:`View.grid` for its times).
        prompt, negative_prompt: texts; the empty text if None. Encoded without gradients, unless ``train`` names
            weights of a text encoder.
        guidance_scale: as the pipeline spells it, 1 for none (Flux: the number that the network is told). Its own
            default if None; 7.5 for Stable Diffusion and Stable Diffusion 3.
        prompt_embeds, negative_prompt_embeds: (1 or B, tokens, width) instead of the texts; gradients reach them.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: (1 or B, width), where the pipeline takes them.
        train: weights that get gradients: ``"unet"``, ``"lora"``, patterns of names; none by default.
        interpolation: of the trained table, ``"linear"`` or ``"spline"`` (see :meth:`VP.discrete`).
        call: more of the pipeline's own arguments: ``height=``, ``image=``, ``control_image=``, ``true_cfg_scale=``,
            ``latents=`` and ``generator=`` (for ``x_T``), ``num_inference_steps=`` …. Gradients reach tensors among
            them that require grad.

    Raises:
        InputError: texts and embeddings do not go together, the pipeline takes no such argument, or ``train`` names
            nothing.
        MissingGradientError: something requires grad and has no part in the view.
        UnsupportedError: the pipeline has no such view; says why and what to do.
    """
    given = {
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
    }
    weights = trained_parameters(pipe, train)
    check_trainable(pipe, weights)
    trained = {id(p) for p in weights.values()}
    offloading = Offloading(pipe)
    family = family_of(pipe)
    scale = _GUIDANCE if guidance_scale is None and family is not None else guidance_scale
    inside = all(name.startswith(("unet.", "transformer.")) for name in weights)
    if family is not None and scale is not None and inside and not call:
        check_view(pipe)
        model, cond = of_text(
            pipe, family, prompt, scale, negative_prompt, given, trained, interpolation, offloading
        )
        return View(_leaving(model, offloading), cond, None, pipe, _offloading=offloading)
    texts = {"prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": scale}
    arguments = asked(pipe, {**texts, **given}, call)
    found = observed(pipe, arguments, trained, interpolation, offloading=offloading)
    made = called(found, arguments, weights)
    model = _leaving(made.model, offloading)
    return View(model, made.cond, made.x_T, pipe, found, arguments, offloading)


def pipeline_grid(pipe: Any, num_inference_steps: int) -> TimeGrid:
    """The times at which the pipeline's own scheduler would step.

    With DDIM's times, Euler's method on the exponential form is the pipeline's own DDIM run; with
    FlowMatchEuler's, Euler's method on the original form is its own run.

    Args:
        pipe: a pipeline that :func:`as_denoiser` takes, or its :class:`View`. The times of flows depend on the call in
            most pipelines (Stable Diffusion 3's do not), so there the view is needed.
        num_inference_steps: as in the pipeline's call.

    Raises:
        InputError: ``num_inference_steps`` is not positive.
        UnsupportedError: the times depend on the call, or the scheduler's list of times repeats some (Heun, PNDM).
    """
    _check_steps(num_inference_steps)
    if isinstance(pipe, View):
        return pipe.grid(num_inference_steps)
    scheduler = copy.deepcopy(pipe.scheduler)
    process = process_of(scheduler)
    named = f"as_denoiser(pipe, prompt, …).grid({num_inference_steps})"
    if scheduler.config.get("use_dynamic_shifting", False):
        raise UnsupportedError(
            "this scheduler shifts its times by the picture's size (use_dynamic_shifting): take those of a call, "
            f"{named}"
        )
    if is_flow(scheduler) and family_of(pipe) is None:
        raise UnsupportedError(
            f"{type(pipe).__name__} gives its scheduler times of its own in each call: take those of a call, {named}"
        )
    scheduler.set_timesteps(num_inference_steps)
    return grid_of(scheduler, times_of(scheduler, process))


def _leaving(model: Denoiser, offloading: Offloading) -> Denoiser:
    """The same; what it has left on the device of an offloaded pipeline goes with it."""
    if offloading.turns is not None:
        weakref.finalize(model, offloading.turns.leave)
    return model


def _check_steps(num_inference_steps: int) -> None:
    if (
        isinstance(num_inference_steps, bool)
        or not isinstance(num_inference_steps, int)
        or num_inference_steps < 1
    ):
        raise InputError(f"num_inference_steps must be a whole number >= 1; got {num_inference_steps!r}")
