"""Tiny pipelines whose networks get more than the state: masks, control pictures, adapters; and their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiny_families import tiny_pixart, tiny_pixels, tiny_sana
from tiny_pipelines import (
    PICTURE,
    TOKENS,
    WIDTH,
    embeds_for,
    noise_for,
    tiny_controlnet,
    tiny_flux,
    tiny_sd,
    tiny_sd3,
    tiny_sd_img2img,
    tiny_sdxl,
)

SIZE = {"height": PICTURE, "width": PICTURE}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_inpainting(channels: int) -> Any:
    """A StableDiffusionInpaintPipeline whose UNet takes the mask and the masked picture (9), or not (4)."""
    from diffusers import StableDiffusionInpaintPipeline

    parts = tiny_sd(in_channels=channels).components
    parts = {k: v for k, v in parts.items() if k != "image_encoder"}
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux_like(name: str, channels: int) -> Any:
    """One of Flux's other pipelines from the parts of ``tiny_flux``, its network with so many input channels."""
    import diffusers

    parts = {
        k: v for k, v in tiny_flux().components.items() if k not in ("image_encoder", "feature_extractor")
    }
    own = parts["transformer"]
    if own.config.in_channels != channels:
        torch.manual_seed(0)
        config = {k: v for k, v in own.config.items() if k != "_use_default_values"}
        config = {**config, "in_channels": channels, "out_channels": own.config.in_channels}
        parts["transformer"] = type(own).from_config(config).eval()
    if "ControlNet" in name:
        torch.manual_seed(1)
        control = diffusers.FluxControlNetModel.from_transformer(
            own, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
        ).eval()
        parts["controlnet"] = with_weights(control)
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_weights(module: Any) -> Any:
    """The control network, whose zero layers would hide what it is given, with weights in them."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return module


def tiny_adapter() -> Any:
    """A StableDiffusionAdapterPipeline: its UNet takes the adapter's features out of the list that it is given."""
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    torch.manual_seed(1)
    adapter = T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    parts = tiny_sd(down_block_types=down, up_block_types=up).components
    parts = {k: v for k, v in parts.items() if k != "image_encoder"}
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapter.eval(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_controlnet() -> Any:
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    parts = tiny_sd3().components
    torch.manual_seed(1)
    control = with_weights(SD3ControlNetModel.from_transformer(parts["transformer"], 1, 0).eval())
    known = ("image_encoder", "feature_extractor")
    pipe = StableDiffusion3ControlNetPipeline(
        **{k: v for k, v in parts.items() if k not in known}, controlnet=control
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture() -> Tensor:
    return torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(1))


def mask() -> Tensor:
    return (torch.arange(PICTURE) < PICTURE // 2).float().expand(1, 1, PICTURE, PICTURE)


def tokens(*shape: int) -> dict[str, Any]:
    pair = {"prompt_embeds": normal(*shape, seed=1), "negative_prompt_embeds": normal(*shape, seed=2)}
    masks = {f"{kind}prompt_attention_mask": torch.ones(1, TOKENS) for kind in ("", "negative_")}
    return {**pair, **masks, "negative_prompt": None, "use_resolution_binning": False}


def text(pipe: Any) -> dict[str, Any]:
    return {**embeds_for(pipe), "latents": noise_for(pipe), **SIZE, "guidance_scale": 3.0}


Case = tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]
CASES: dict[str, Case] = {
    "sd": (tiny_sd, text),
    "sd, two pictures": (
        tiny_sd,
        lambda pipe: {**text(pipe), "latents": normal(2, 4, 8, 8), "num_images_per_prompt": 2},
    ),
    "t2i adapter": (tiny_adapter, lambda pipe: {**text(pipe), "image": picture()}),
    "sdxl": (tiny_sdxl, text),
    "sd3": (tiny_sd3, text),
    "flux": (tiny_flux, text),
    "flux, true guidance": (
        tiny_flux,
        lambda pipe: {
            **text(pipe),
            "true_cfg_scale": 2.0,
            "negative_prompt_embeds": normal(1, TOKENS, WIDTH, seed=4),
            "negative_pooled_prompt_embeds": normal(1, WIDTH, seed=5),
        },
    ),
    "pixart": (
        tiny_pixart,
        lambda pipe: {**tokens(1, TOKENS, WIDTH), **SIZE, "latents": noise_for(pipe), "guidance_scale": 3.0},
    ),
    "sana": (
        tiny_sana,
        lambda pipe: {**tokens(1, TOKENS, WIDTH), "height": 32, "width": 32, "latents": normal(1, 4, 16, 16)},
    ),
    "controlnet": (tiny_controlnet, lambda pipe: {**text(pipe), "image": picture()}),
    "inpainting, 9 channels": (
        lambda: tiny_inpainting(9),
        lambda pipe: {**text(pipe), "image": picture(), "mask_image": mask()},
    ),
    "inpainting, 4 channels": (
        lambda: tiny_inpainting(4),
        lambda pipe: {**text(pipe), "image": picture(), "mask_image": mask()},
    ),
    "sd3 controlnet": (tiny_sd3_controlnet, lambda pipe: {**text(pipe), "control_image": picture()}),
    "flux controlnet": (
        lambda: tiny_flux_like("FluxControlNetPipeline", 16),
        lambda pipe: {**text(pipe), "control_image": picture()},
    ),
    "flux fill": (  # the masked picture and the mask lie beside the latents in each token
        lambda: tiny_flux_like("FluxFillPipeline", 16 + 16 + 16),
        lambda pipe: {**text(pipe), "image": picture(), "mask_image": mask()},
    ),
    "flux kontext": (  # the picture's tokens lie behind the latents'
        lambda: tiny_flux_like("FluxKontextPipeline", 16),
        lambda pipe: {**text(pipe), "image": picture(), "_auto_resize": False, "max_area": PICTURE**2},
    ),
    "img2img": (tiny_sd_img2img, lambda pipe: {**embeds_for(pipe), "image": picture(), "strength": 0.7}),
    "pixels": (tiny_pixels, lambda pipe: {}),
}
