"""Stable Diffusion's and Stable Diffusion 3's networks as a ``Denoiser``, without a call: what they take is known."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import nests
from ...denoiser import Denoiser
from ...errors import InputError
from ...schedules import VP, Flow
from ..forwards import own_forwards
from ..offloaded import Offloading
from ..shadow import networks, shadow
from ..states import own_casts
from .process import Interpolation, is_flow, table_of

__all__ = ["Family", "PipelineNetwork", "family_of", "of_text"]

Prompt = str | list[str] | None
Family = Literal["unet", "sd3"]
_BESIDE = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder", "safety_checker")
_MORE = ("addition_embed_type", "time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type")


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


def family_of(pipe: Any) -> Family | None:
    """Which of the two a pipeline is like; None for one whose network takes more, or that has other networks."""
    if set(networks(pipe)) - {"unet", "transformer", *_BESIDE} or not hasattr(pipe, "encode_prompt"):
        return None
    unet, transformer = getattr(pipe, "unet", None), getattr(pipe, "transformer", None)
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "config"):
        return None
    if isinstance(unet, nn.Module) and transformer is None:
        config: Any = unet.config
        known = type(networks(pipe)["unet"]).__name__ == "UNet2DConditionModel"
        channels = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", None)
        beside = channels is not None and config.in_channels != channels
        more = any(config.get(key) is not None for key in _MORE)
        timed = scheduler.config.get("timestep_type", "discrete") != "discrete"
        tabled = getattr(scheduler, "alphas_cumprod", None) is not None
        return "unet" if known and tabled and not (beside or more or timed or is_flow(scheduler)) else None
    if isinstance(transformer, nn.Module) and unet is None:
        known = type(networks(pipe)["transformer"]).__name__ == "SD3Transformer2DModel"
        return "sd3" if known and is_flow(scheduler) else None
    return None


def of_text(
    pipe: Any,
    family: Family,
    prompt: Prompt,
    guidance_scale: float,
    negative_prompt: Prompt,
    given: dict[str, Tensor | None],
    trained: set[int],
    interpolation: Interpolation,
    offloading: Offloading,
) -> tuple[Denoiser, dict[str, Tensor]]:
    """Model and conditioning.

    Args:
        pipe: the pipeline.
        family: its own.
        prompt, negative_prompt: texts, encoded without gradients; the empty text if None.
        guidance_scale: 1 for none.
        given: the embeddings, by name.
        trained: ``id`` of the weights that get gradients.
        interpolation: of the trained table.
        offloading: by which an offloaded pipeline's weights come and go.

    Raises:
        InputError: texts and embeddings do not go together.
    """
    guided = guidance_scale != 1
    cond, uncond = _conditioning(pipe, family, prompt, negative_prompt, given, guided)
    offloading.free()  # the text encoders
    name = "unet" if family == "unet" else "transformer"
    original = networks(pipe)[name]
    module = shadow(original, trained)
    own_forwards(original, module)
    own_casts(original, module)
    module = offloading.dressed(name, module)
    config = pipe.scheduler.config
    if family == "unet":
        network = PipelineNetwork(module, ("sample", "timestep"))
        schedule = VP.discrete(table_of(pipe.scheduler), interpolation)
        prediction = config.get("prediction_type", "epsilon")
        return Denoiser(network, schedule, prediction, guidance_scale=guidance_scale, uncond=uncond), cond
    network = PipelineNetwork(module, ("hidden_states", "timestep"))
    model = Denoiser(
        network,
        Flow(),
        "flow_prediction",
        guidance_scale=guidance_scale,
        uncond=uncond,
        time_scale=float(config.num_train_timesteps),
    )
    return model, cond


def _conditioning(
    pipe: Any, family: Family, prompt: Prompt, negative: Prompt, given: dict[str, Tensor | None], guided: bool
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
