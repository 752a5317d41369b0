"""Pipelines whose views are tested, the calls that these are made of, and the pipelines' own runs beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import backdrift as bd
from tiny_conditioned import CASES, normal, text, tokens
from tiny_families import (
    tiny_animatediff,
    tiny_cogvideox,
    tiny_pixart,
    tiny_pixels,
    tiny_sana,
    tiny_stable_audio,
    tiny_wan,
)
from tiny_pipelines import TOKENS, WIDTH, noise_for, tiny_flux, tiny_sdxl

N = 4
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def with_scheduler(build: Callable[[], Any], name: str, **config: Any) -> Any:
    """A pipeline with another scheduler."""
    import diffusers

    pipe = build()
    pipe.scheduler = getattr(diffusers, name)(**config)
    return pipe


def ddim(build: Callable[[], Any], **config: Any) -> Any:
    return with_scheduler(build, "DDIMScheduler", **{**TABLE, "clip_sample": False, **config})


def flow(build: Callable[[], Any], **config: Any) -> Any:
    return with_scheduler(build, "FlowMatchEulerDiscreteScheduler", **{"shift": 3.0, **config})


def shifted() -> Any:
    """Flux-dev's own scheduler shifts its times by the picture's size."""
    return flow(tiny_flux, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)


def guided_flux() -> Any:
    """Flux-dev's network is told the guidance scale."""
    from diffusers import FluxTransformer2DModel

    pipe = tiny_flux()
    config = {k: v for k, v in pipe.transformer.config.items() if k != "_use_default_values"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer = FluxTransformer2DModel.from_config({**config, "guidance_embeds": True}).eval()
    return pipe


def sentences(pipe: Any) -> dict[str, Any]:
    call = {**tokens(1, TOKENS, WIDTH), "latents": noise_for(pipe), "guidance_scale": 3.0}
    return {k: v for k, v in call.items() if k != "negative_prompt"}


def film(pipe: Any) -> dict[str, Any]:
    pair = {
        "prompt_embeds": normal(1, TOKENS, WIDTH, seed=1),
        "negative_prompt_embeds": normal(1, TOKENS, WIDTH, seed=2),
    }
    size = {"height": 16, "width": 16, "num_frames": 2, "guidance_scale": 3.0}
    return {**pair, **size, "latents": normal(1, 4, 2, 8, 8)}


def clip(pipe: Any) -> dict[str, Any]:
    """Latents of CogVideoX have their frames before their channels."""
    size = {"num_frames": 5, "max_sequence_length": TOKENS}
    return {**film(pipe), **size, "latents": normal(1, 2, 4, 8, 8)}


def waves(pipe: Any) -> dict[str, Any]:
    pair = {k: v for k, v in film(pipe).items() if k.endswith("embeds")}
    masks = {
        k: torch.ones(1, TOKENS, dtype=torch.long) for k in ("attention_mask", "negative_attention_mask")
    }
    return {**pair, **masks, "audio_end_in_s": 8.0, "guidance_scale": 3.0, "latents": normal(1, 3, 16)}


Case = tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]
VIEWS: dict[str, Case] = {
    "sdxl, Euler": (tiny_sdxl, text),
    "sdxl, DDIM, v, rescaled": (
        lambda: ddim(tiny_sdxl, prediction_type="v_prediction", timestep_spacing="trailing"),
        lambda pipe: {**text(pipe), "guidance_rescale": 0.7},
    ),
    "sdxl, EDM": (lambda: with_scheduler(tiny_sdxl, "EDMEulerScheduler"), text),
    "sdxl, EDM, v": (
        lambda: with_scheduler(tiny_sdxl, "EDMEulerScheduler", prediction_type="v_prediction", sigma_data=1.0),
        text,
    ),
    "sdxl, Euler in continuous time": (
        lambda: with_scheduler(
            tiny_sdxl, "EulerDiscreteScheduler", prediction_type="v_prediction", timestep_type="continuous",
            use_karras_sigmas=True, sigma_min=0.002, sigma_max=80.0,
        ),
        text,
    ),
    "flux, shifted by size": (shifted, text),
    "flux, told the scale": (guided_flux, text),
    "pixart, DDIM": (lambda: ddim(tiny_pixart), lambda pipe: {**sentences(pipe), "height": 16, "width": 16}),
    "sana, flow": (
        lambda: flow(tiny_sana),
        lambda pipe: {**sentences(pipe), "height": 32, "width": 32, "latents": normal(1, 4, 16, 16)},
    ),
    "wan, flow": (lambda: flow(tiny_wan), film),
    "animatediff": (tiny_animatediff, film),
    "cogvideox": (tiny_cogvideox, clip),
    "stable audio": (
        lambda: with_scheduler(
            tiny_stable_audio, "EDMDPMSolverMultistepScheduler", solver_order=1, prediction_type="v_prediction"
        ),
        waves,
    ),
    "pixels, DDIM": (lambda: tiny_pixels("DDIMPipeline"), lambda pipe: {"batch_size": 2}),
    **{
        name: CASES[name]
        for name in (
            "flux, true guidance", "t2i adapter", "controlnet", "sd3 controlnet", "flux controlnet", "flux fill",
            "flux kontext", "inpainting, 9 channels", "img2img", "sd, two pictures",
        )
    },
}  # fmt: skip


def built(name: str) -> tuple[Any, dict[str, Any]]:
    build, arguments = VIEWS[name]
    pipe = build()
    return pipe, arguments(pipe)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def own_run(pipe: Any, call: dict[str, Any], steps: int = N, run: Any = None) -> Tensor:
    """The pipeline's own clean latents; with its own arguments where the view says more kindly that there are none."""
    torch.manual_seed(3)
    more = {"negative_prompt": None} if "prompt_attention_mask" in call else {}
    pixels = type(pipe).__name__ == "DDIMPipeline"
    shown = "np" if pixels else "latent"
    out = (run or pipe)(**call, **more, output_type=shown, num_inference_steps=steps, generator=seeded())
    found = next(getattr(out, kind) for kind in ("frames", "audios", "images") if hasattr(out, kind))
    return torch.as_tensor(found).permute(0, 3, 1, 2) * 2 - 1 if pixels else found


def view_of(pipe: Any, call: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(3)  # some draw the control picture's latents from the global generator
    return bd.as_denoiser(pipe, **{"num_inference_steps": N, **call, **more}, generator=seeded())


def leaves_of(call: dict[str, Any]) -> dict[str, Tensor]:
    """Noise, embeddings and pictures of a call, requiring grad."""
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in call.items()
        if isinstance(value, Tensor) and "mask" not in name
    }


def gradients(state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = normal(*state.shape, seed=8).to(state)
    found = torch.autograd.grad((weight * state).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[k] - g).norm() / g.norm()) for k, g in expected.items())
