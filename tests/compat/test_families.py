"""Every family of pipelines, differentiated by noise, embeddings and weights: the bits of plain autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from by_hand import blocks_with_gradients, drawing
from torch import Tensor, nn
from traps import FAMILIES, Family

import backdrift as bd
from tiny_families import (
    tiny_animatediff,
    tiny_dit,
    tiny_modular,
    tiny_pixart,
    tiny_pixels,
    tiny_sana,
    tiny_stable_audio,
    tiny_wan,
)
from tiny_pipelines import (
    PICTURE,
    TOKENS,
    WIDTH,
    embeds_for,
    tiny_flux,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
)

SIZE = {"height": PICTURE, "width": PICTURE}
PROMPT = (1, TOKENS, WIDTH)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair() -> dict[str, Tensor]:
    return {"prompt_embeds": normal(*PROMPT, seed=1), "negative_prompt_embeds": normal(*PROMPT, seed=2)}


def masks(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.ones(1, TOKENS, dtype=dtype) for name in names}


@dataclass
class Case:
    """How a family is called.

    Attributes:
        given: the call's tensors that get gradients, besides the noise.
        rest: the call's other arguments.
        latents: the noise goes in as ``latents=``; else the pipeline draws it.
    """

    build: Callable[[], Any]
    shape: tuple[int, ...]
    given: Callable[[Any], dict[str, Tensor]]
    rest: dict[str, Any]
    latents: bool = True


def case(*names: str, **how: Any) -> Case:
    """A case, and its line on the page: family, pipeline, embeddings, result."""
    made = Case(**how)
    noise = "`latents=`" if made.latents else "`differentiable(pipe, noise=…)`"
    FAMILIES.append(Family(names[0], names[1], noise, names[2], "`train=`", names[3]))
    return made


BOTH = "`prompt_embeds=`, `negative_prompt_embeds=`"
POOLED = BOTH + " and the pooled ones"
PICTURES = "`.images` (N, 3, H, W)"
CASES = {
    "sd": case(
        "Stable Diffusion",
        "StableDiffusionPipeline",
        BOTH,
        PICTURES,
        build=tiny_sd,
        shape=(1, 4, 8, 8),
        given=embeds_for,
        rest=SIZE,
    ),
    "sdxl": case(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        POOLED,
        PICTURES,
        build=tiny_sdxl,
        shape=(1, 4, 8, 8),
        given=embeds_for,
        rest=SIZE,
    ),
    "sd3": case(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        POOLED,
        PICTURES,
        build=tiny_sd3,
        shape=(1, 4, 8, 8),
        given=embeds_for,
        rest=SIZE,
    ),
    "flux": case(
        "Flux",
        "FluxPipeline",
        "`prompt_embeds=`, `pooled_prompt_embeds=`",
        PICTURES,
        build=tiny_flux,
        shape=(1, 16, 16),
        given=embeds_for,
        rest=SIZE,
    ),
    "pixart": case(
        "PixArt",
        "PixArtSigmaPipeline",
        BOTH,
        PICTURES,
        build=tiny_pixart,
        shape=(1, 4, 8, 8),
        given=lambda pipe: pair(),
        rest={
            **SIZE,
            **masks("prompt_attention_mask", "negative_prompt_attention_mask"),
            "negative_prompt": None,
            "use_resolution_binning": False,
        },
    ),
    "dit": case(
        "DiT",
        "DiTPipeline",
        "none (class labels)",
        PICTURES,
        build=tiny_dit,
        shape=(1, 4, 8, 8),
        given=lambda pipe: {},
        rest={"class_labels": [3]},
        latents=False,
    ),
    "ddpm": case(
        "DDPM, in pixels",
        "DDPMPipeline",
        "none",
        PICTURES,
        build=tiny_pixels,
        shape=(1, 3, 8, 8),
        given=lambda pipe: {},
        rest={},
        latents=False,
    ),
    "ddim": case(
        "DDIM, in pixels",
        "DDIMPipeline",
        "none",
        PICTURES,
        build=lambda: tiny_pixels("DDIMPipeline"),
        shape=(1, 3, 8, 8),
        given=lambda pipe: {},
        rest={"eta": 0.5},
        latents=False,
    ),
    "sana": case(
        "Sana",
        "SanaPipeline",
        BOTH,
        PICTURES,
        build=tiny_sana,
        shape=(1, 4, 16, 16),
        given=lambda pipe: pair(),
        rest={
            **masks("prompt_attention_mask", "negative_prompt_attention_mask"),
            "height": 32,
            "width": 32,
            "negative_prompt": None,
            "use_resolution_binning": False,
        },
    ),
    "animatediff": case(
        "AnimateDiff",
        "AnimateDiffPipeline",
        BOTH,
        "`.frames` (N, frames, 3, H, W)",
        build=tiny_animatediff,
        shape=(1, 4, 2, 8, 8),
        given=lambda pipe: pair(),
        rest={**SIZE, "num_frames": 2},
    ),
    "wan": case(
        "Wan",
        "WanPipeline",
        BOTH,
        "`.frames` (N, frames, 3, H, W)",
        build=tiny_wan,
        shape=(1, 4, 2, 8, 8),
        given=lambda pipe: pair(),
        rest={**SIZE, "num_frames": 2},
    ),
    "stable audio": case(
        "Stable Audio",
        "StableAudioPipeline",
        BOTH,
        "`.audios` (N, 2, samples)",
        build=tiny_stable_audio,
        shape=(1, 3, 16),
        given=lambda pipe: pair(),
        rest={
            **masks("attention_mask", "negative_attention_mask", dtype=torch.long),
            "audio_end_in_s": 8.0,
        },
    ),
    "modular": case(
        "Modular (Stable Diffusion XL's blocks)",
        "StableDiffusionXLModularPipeline",
        "the inputs of the blocks that are left",
        'the state\'s `images`, `output="images"`',
        build=tiny_modular,
        shape=(1, 4, 8, 8),
        given=lambda pipe: {
            k: v for k, v in embeds_for(tiny_sdxl()).items() if pipe._blocks.sub_blocks.pop("text_encoder", 1)
        },
        rest={**SIZE, "output": "images"},
    ),
}


def plain(pipe: Any, made: Case, noise: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The picture, film or sound of the pipeline's own code with gradients on."""
    call = type(pipe).__call__
    if not hasattr(call, "__wrapped__"):
        with blocks_with_gradients(pipe):
            return pipe(latents=noise, output_type="pt", **arguments)
    if made.latents:
        return call.__wrapped__(pipe, latents=noise, output_type="pt", **arguments)[0]
    with drawing(pipe, noise):
        return call.__wrapped__(pipe, output_type="pt", **arguments)[0]


def loss_of(result: Tensor) -> Tensor:
    return (
        result * torch.linspace(-1, 1, result.numel()).reshape(result.shape)
    ).sum() + result.square().sum()


def network_of(pipe: Any) -> str:
    return "unet" if isinstance(getattr(pipe, "unet", None), nn.Module) else "transformer"


@pytest.mark.parametrize("name", CASES)
def test_noise_embeddings_and_weights(name: str) -> None:
    made = CASES[name]
    pipe = made.build()
    component = network_of(pipe)
    given = {k: v.requires_grad_() for k, v in made.given(pipe).items()}
    noise = normal(*made.shape).requires_grad_()
    weights = [p for p in getattr(pipe, component).parameters() if p.requires_grad]
    leaves = [noise, *given.values(), *weights]
    arguments: dict[str, Any] = {**given, **made.rest, "num_inference_steps": 3}
    arguments["generator"] = torch.Generator().manual_seed(5)
    expected = plain(pipe, made, noise, arguments)
    theirs = torch.autograd.grad(loss_of(expected), leaves, allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in theirs[: 1 + len(given)])
    for memory in ("min", "max"):
        arguments["generator"].manual_seed(5)
        own = {"latents": noise} if made.latents else {}
        with bd.differentiable(
            pipe, memory, train=component, clamp=True, noise=None if made.latents else noise
        ) as run:
            out = pipe(**own, **arguments)
        result = out if isinstance(out, Tensor) else out[0]
        ours = torch.autograd.grad(loss_of(result), leaves, allow_unused=True)
        assert torch.equal(result, expected)
        for mine, true in zip(ours, theirs, strict=True):
            assert (mine is None) == (true is None)
            assert mine is None or torch.equal(mine, true)
        assert (run.stats.calls_redone == 0) == (memory == "max")


def test_every_case_is_a_class_of_diffusers() -> None:
    import diffusers

    for family in FAMILIES:
        assert inspect.isclass(getattr(diffusers, family.pipeline))
