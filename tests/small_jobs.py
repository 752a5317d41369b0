"""Small pipelines with arguments of a call, large enough that scratch memory inside kernels is a small share."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

import tiny_pipelines as tiny
from backdrift import differentiable
from live_bytes import LiveBytes

SIDE = 32  # of the latents


def small_sd3() -> Any:
    """SD3 with position embeddings for these latents."""
    from diffusers import SD3Transformer2DModel

    pipe = tiny.tiny_sd3()
    config = dict(pipe.transformer.config) | {"sample_size": SIDE, "pos_embed_max_size": SIDE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer = SD3Transformer2DModel.from_config(config).eval()
    return pipe


def _with_wide_decoder(build: Callable[[], Any]) -> Callable[[], Any]:
    """The CPU's convolutions rearrange their arguments in scratch memory, and pad narrow ones to 16 channels."""

    def built() -> Any:
        from diffusers import AutoencoderKL

        pipe = build()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe.vae = AutoencoderKL.from_config(
                dict(pipe.vae.config) | {"block_out_channels": (32, 32)}
            ).eval()
        return pipe

    return built


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": _with_wide_decoder(tiny.tiny_sd),
    "sdxl": _with_wide_decoder(tiny.tiny_sdxl),
    "sd3": _with_wide_decoder(small_sd3),
    "flux": _with_wide_decoder(tiny.tiny_flux),
}


def call_of(pipe: Any, steps: int, *, side: int = SIDE, batch: int = 1, **more: Any) -> dict[str, Any]:
    """Keywords of a call whose noise requires grad."""
    flux = type(pipe).__name__.startswith("Flux")
    shape = (batch, (side // 2) ** 2, 16) if flux else (batch, 4, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    embeds = {k: v.expand(batch, *v.shape[1:]) for k, v in tiny.embeds_for(pipe).items()}
    return {
        "latents": noise,
        "num_inference_steps": steps,
        "height": 2 * side,
        "width": 2 * side,
        **embeds,
        **more,
    }


def gradients(
    pipe: Any, call: dict[str, Any], score: Any = None, **how: Any
) -> tuple[list[torch.Tensor], Any]:
    """Gradients of the noise and of the weights named by ``train``, and the run."""
    score = score or (lambda images: images.square().mean())
    with differentiable(pipe, **how) as run:
        images = pipe(**call).images
    modules = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    parts = {f"{k}.{n}": p for k, m in modules.items() for n, p in m.named_parameters()}
    inputs = [call["latents"], *(parts[name] for name in run.trained)]
    return list(torch.autograd.grad(score(images), inputs)), run


def measured(pipe: Any, call: dict[str, Any], score: Any = None, **how: Any) -> int:
    """Most bytes alive in one such job beyond those before it: the allocator's own record."""
    gradients(pipe, call, score, **how)  # what is made once is made
    gc.collect()
    with LiveBytes() as live:
        gradients(pipe, call, score, **how)
    return live.peak


def heavy_flux() -> Any:
    """Weights are most of what it needs; they are those of linear layers, which the CPU does not rearrange in scratch
    memory as it does those of convolutions."""
    from diffusers import FluxTransformer2DModel

    pipe = tiny.tiny_flux()
    more = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 4}
    config = dict(pipe.transformer.config) | more | {"axes_dims_rope": (8, 12, 12)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer = FluxTransformer2DModel.from_config(config).eval()
    return pipe
