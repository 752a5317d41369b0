"""A pipeline's denoising network as a :class:`~backdrift.denoiser.Denoiser`, and its time grid.

The bridge to :func:`backdrift.sample`: solvers, forms and gradient methods work on what they are given here, and
know nothing of pipelines.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import nests
from ..denoiser import Denoiser
from ..errors import InputError, UnsupportedError
from ..grids import TimeGrid
from ..schedules import VP, Flow
from .shadow import Train, shadow, trained_parameters

Prompt = str | list[str] | None


class View(NamedTuple):
    """What :func:`as_denoiser` returns: ``sample(view.model, x_T, view.cond, ...)``.

    Attributes:
        model: the network with schedule, prediction and guidance.
        cond: the prompt's conditioning, a dictionary of the network's keyword arguments.
    """

    model: Denoiser
    cond: dict[str, Tensor]


class PipelineNetwork(nn.Module):
    """A diffusers network in the calling order ``network(x, t, cond)``; one prompt serves a whole batch.

    Args:
        network: a UNet2DConditionModel or an SD3Transformer2DModel.
        names: the keywords under which it takes x and t.
    """

    def __init__(self, network: nn.Module, names: tuple[str, str]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.training = network.training

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        rows = nests.transform(lambda c: c.expand(len(x), *c.shape[1:]) if len(c) == 1 else c, cond)
        return self.network(**{self.names[0]: x, self.names[1]: t}, **rows, return_dict=False)[0]


def as_denoiser(
    pipe: Any,
    prompt: Prompt = None,
    guidance_scale: float = 7.5,
    *,
    negative_prompt: Prompt = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    train: Train = None,
    interpolation: Literal["linear", "spline"] = "linear",
) -> View:
    """The ``Denoiser`` of a pipeline, with the conditioning of a prompt.

    The network is a copy on the same weights, in the modes and with the adapters of this moment. Its state is the
    pipeline's latents divided by ``scheduler.init_noise_sigma``: noise ~ N(0, I) at the start.

    Args:
        pipe: a pipeline like StableDiffusionPipeline (UNet; epsilon, v or sample prediction) or like
            StableDiffusion3Pipeline (flow matching). The scheduler is read for schedule and prediction
            only; its own rule for stepping is not used (see :func:`pipeline_grid` for its times).
        prompt, negative_prompt: texts, encoded without gradients; the empty text if None.
        guidance_scale: 1 for none.
        prompt_embeds, negative_prompt_embeds: (1 or B, tokens, width) instead of the texts; gradients reach them.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: (1 or B, width), Stable Diffusion 3 only.
        train: weights that get gradients: ``"unet"``, ``"lora"``, patterns of names; none by default.
        interpolation: of the trained table, ``"linear"`` or ``"spline"`` (see :meth:`VP.discrete`).

    Raises:
        InputError: texts and embeddings do not go together, or ``train`` names nothing.
        UnsupportedError: another family of pipeline, or a scheduler without a trained table.
    """
    family = _family(pipe)
    given = {
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
    }
    guided = guidance_scale != 1
    cond, uncond = _conditioning(pipe, family, prompt, negative_prompt, given, guided)
    component = "unet" if family == "unet" else "transformer"
    trained = {id(p) for p in trained_parameters(pipe, train).values()}
    module = shadow(getattr(pipe, component), trained)
    config = pipe.scheduler.config
    if family == "unet":
        network = PipelineNetwork(module, ("sample", "timestep"))
        schedule = VP.discrete(_table(pipe.scheduler), interpolation)
        prediction = config.get("prediction_type", "epsilon")
        model = Denoiser(network, schedule, prediction, guidance_scale=guidance_scale, uncond=uncond)
    else:
        network = PipelineNetwork(module, ("hidden_states", "timestep"))
        model = Denoiser(
            network,
            Flow(),
            "flow_prediction",
            guidance_scale=guidance_scale,
            uncond=uncond,
            time_scale=float(config.num_train_timesteps),
        )
    return View(model, cond)


def pipeline_grid(pipe: Any, num_inference_steps: int) -> TimeGrid:
    """The times at which the pipeline's own scheduler would step.

    With DDIM's times, Euler's method on the exponential form is the pipeline's own DDIM run; with
    FlowMatchEuler's, Euler's method on the original form is its own run.

    Args:
        pipe: a pipeline that :func:`as_denoiser` takes.
        num_inference_steps: as in the pipeline's call.

    Raises:
        InputError: ``num_inference_steps`` is not positive.
        UnsupportedError: another family of pipeline, or a scheduler whose list of times repeats some (Heun, PNDM).
    """
    if (
        isinstance(num_inference_steps, bool)
        or not isinstance(num_inference_steps, int)
        or num_inference_steps < 1
    ):
        raise InputError(f"num_inference_steps must be a whole number >= 1; got {num_inference_steps!r}")
    scheduler = copy.deepcopy(pipe.scheduler)
    if _family(pipe) == "sd3":
        if scheduler.config.get("use_dynamic_shifting", False):
            raise UnsupportedError(
                "this scheduler shifts its times by the picture's size (use_dynamic_shifting): pass the times "
                "themselves, TimeGrid(scheduler.sigmas) after set_timesteps(..., mu=...)"
            )
        scheduler.set_timesteps(num_inference_steps)
        return TimeGrid(scheduler.sigmas.double())
    _table(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    times = [float(t) for t in scheduler.timesteps]
    if any(a <= b for a, b in itertools.pairwise(times)):
        raise UnsupportedError(
            f"{type(scheduler).__name__} asks the network more than once at a time, so its times are no grid; use "
            "a TimeGrid of your own, or DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    return TimeGrid([*times, *_last(scheduler, times[-1])])


def _last(scheduler: Any, t: float) -> list[float]:
    """Where the scheduler's last step leads: sigma = 0 (t = -1), or the cleanest trained time."""
    final = getattr(scheduler, "final_alpha_cumprod", None)
    if final is None:
        clean = scheduler.config.get("final_sigmas_type", "zero") == "zero"
    else:
        clean = float(final) == 1.0
    if clean:
        return [-1.0]
    return [0.0] if t > 0 else []


def _family(pipe: Any) -> Literal["unet", "sd3"]:
    unet, transformer = getattr(pipe, "unet", None), getattr(pipe, "transformer", None)
    name = type(pipe).__name__
    if isinstance(unet, nn.Module):
        config: Any = unet.config
        for key in ("addition_embed_type", "time_cond_proj_dim", "class_embed_type"):
            if config.get(key) is not None:
                raise UnsupportedError(
                    f"the UNet of {name} takes more than text ({key} = {config.get(key)!r}): build a Denoiser "
                    "around it by hand, with what it takes in cond"
                )
        return "unet"
    if isinstance(transformer, nn.Module) and type(transformer).__name__ == "SD3Transformer2DModel":
        return "sd3"
    raise UnsupportedError(
        f"as_denoiser knows pipelines with a text-conditioned UNet (Stable Diffusion) or an SD3 transformer; "
        f"{name} is neither. Build a Denoiser around its network by hand"
    )


def _table(scheduler: Any) -> Tensor:
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UnsupportedError(
            f"{type(scheduler).__name__} has no alphas_cumprod to read the schedule from; give the pipeline a "
            "scheduler that has, such as DDIMScheduler"
        )
    return torch.as_tensor(table)


def _conditioning(
    pipe: Any, family: str, prompt: Prompt, negative: Prompt, given: dict[str, Tensor | None], guided: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The network's keywords for the prompt and, with guidance, for the negative prompt."""
    pooled = family == "sd3"
    for text, name in ((prompt, "prompt"), (negative, "negative_prompt")):
        if text is not None and given[f"{name}_embeds"] is not None:
            raise InputError(f"give {name} or {name}_embeds, not both")
    extra = [
        name for name, value in given.items() if value is not None and name.endswith("pooled_prompt_embeds")
    ]
    if extra and not pooled:
        raise InputError(
            f"{extra[0]} is for Stable Diffusion 3; {type(pipe).__name__} has no pooled conditioning"
        )
    cond = _embeddings(pipe, pooled, prompt, given["prompt_embeds"], given["pooled_prompt_embeds"], "")
    if not guided:
        return cond, None
    names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    return cond, _embeddings(pipe, pooled, negative, given[names[0]], given[names[1]], "negative_")


def _embeddings(
    pipe: Any, pooled: bool, text: Prompt, embeds: Tensor | None, pooled_embeds: Tensor | None, prefix: str
) -> dict[str, Tensor]:
    if pooled and (embeds is None) != (pooled_embeds is None):
        raise InputError(
            f"Stable Diffusion 3 takes {prefix}prompt_embeds and {prefix}pooled_prompt_embeds together"
        )
    if embeds is None:
        text = "" if text is None else text
        device = pipe._execution_device
        with torch.no_grad():
            if pooled:
                embeds, _, pooled_embeds, _ = pipe.encode_prompt(
                    text, text, text, device=device, do_classifier_free_guidance=False
                )
            else:
                embeds, _ = pipe.encode_prompt(text, device, 1, False)
    cond = {"encoder_hidden_states": embeds}
    if pooled_embeds is not None:
        cond["pooled_projections"] = pooled_embeds
    return cond
