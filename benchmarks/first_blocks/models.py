"""Small models with random weights, built from each family's own configuration classes.

``small(FluxPipeline, torch_dtype=torch.bfloat16)`` stands in a block where a page has
``FluxPipeline.from_pretrained("…", torch_dtype=torch.bfloat16)``. Weights are rounded to bfloat16 once, so that a block
is the same model in every precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from . import parts, transformer_pipelines, unet_pipelines, video_pipelines
from .tiny import PICTURE

device = "cuda" if torch.cuda.is_available() else "cpu"
_TWIN: torch.dtype | None = None  # in which precision to build instead of the one asked for

# A network, or the components of a pipeline, by the name of its class.
_BUILDERS: dict[str, Callable[[], Any]] = {
    "StableDiffusionPipeline": unet_pipelines.stable_diffusion,
    "StableDiffusionImg2ImgPipeline": unet_pipelines.stable_diffusion_without_checker,
    "StableDiffusionPAGPipeline": unet_pipelines.stable_diffusion_without_checker,
    "StableDiffusionInpaintPipeline": unet_pipelines.inpaint,
    "StableDiffusionInstructPix2PixPipeline": unet_pipelines.instruct,
    "LatentConsistencyModelPipeline": unet_pipelines.latent_consistency,
    "ControlNetModel": unet_pipelines.controlnet,
    "StableDiffusionControlNetPipeline": unet_pipelines.stable_diffusion,
    "T2IAdapter": unet_pipelines.t2i_adapter,
    "StableDiffusionAdapterPipeline": unet_pipelines.adapted,
    "CLIPVisionModelWithProjection": partial(parts.vision, size=PICTURE, patch=8),
    "StableDiffusionXLPipeline": unet_pipelines.stable_diffusion_xl,
    "StableDiffusionXLImg2ImgPipeline": unet_pipelines.refiner,
    "DDPMPipeline": unet_pipelines.ddpm,
    "StableDiffusion3Pipeline": transformer_pipelines.stable_diffusion_3,
    "FluxPipeline": transformer_pipelines.flux,
    "ChromaPipeline": transformer_pipelines.chroma,
    "PixArtSigmaPipeline": transformer_pipelines.pixart,
    "SanaPipeline": transformer_pipelines.sana,
    "DiTPipeline": transformer_pipelines.dit,
    "HunyuanDiTPipeline": transformer_pipelines.hunyuan,
    "Lumina2Pipeline": transformer_pipelines.lumina2,
    "CogView4Pipeline": transformer_pipelines.cogview4,
    "MotionAdapter": video_pipelines.motion_adapter,
    "AnimateDiffPipeline": video_pipelines.animatediff,
    "WanPipeline": video_pipelines.wan,
    "CogVideoXPipeline": video_pipelines.cogvideox,
    "StableVideoDiffusionPipeline": video_pipelines.stable_video,
    "StableAudioPipeline": video_pipelines.stable_audio,
}


@contextlib.contextmanager
def built_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block, everything is built in this precision, whatever is asked for."""
    global _TWIN
    before, _TWIN = _TWIN, dtype
    try:
        yield
    finally:
        _TWIN = before


def small(cls: Any, *, torch_dtype: torch.dtype = torch.float32, **components: Any) -> Any:
    """A pipeline or network of this class: small, seeded, in eval mode.

    Args:
        cls: a class of diffusers.
        torch_dtype: as in ``from_pretrained``.
        components: in place of the ones that it would have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _BUILDERS[cls.__name__]()
        made = cls(**{**made, **components}) if isinstance(made, dict) else made
        modules = [made] if isinstance(made, nn.Module) else _modules(made)
        for module in modules:
            _finish(module.eval())
    if not isinstance(made, nn.Module):
        made.set_progress_bar_config(disable=True)
    return made.to(_TWIN or torch_dtype)


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _finish(module: nn.Module) -> None:
    """Weights in place of those that are zero before training, which would hide every gradient; all rounded."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            if parameter.ndim > 1 and not parameter.any():
                parameter.data.normal_(std=0.1, generator=generator)
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
