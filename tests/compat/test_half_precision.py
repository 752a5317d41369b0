"""Decoders that a pipeline turns into float32 for their call and back before ``backward``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from traps import Trap

import backdrift as bd
from backdrift.errors import UnsupportedError
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_sdxl

TRAP = Trap(
    "Half precision: a float16 SDXL upcasts its decoder, decodes, and casts it back before `backward`",
    "raises on the first backward; so do mixtures like it.",
)


def half_sdxl(dtype: torch.dtype) -> Any:
    pipe = tiny_sdxl()
    pipe.vae.register_to_config(force_upcast=True)
    return pipe.to(dtype)


@TRAP.handled("float16 (upcast and cast back), and bfloat16 throughout; noise, embeddings and weights")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory", ["min", 2_000_000, "max"])
def test_the_bits_of_a_decoder_of_its_own(dtype: torch.dtype, memory: Any) -> None:
    pipe = half_sdxl(dtype)
    embeds = {k: v.to(dtype).requires_grad_() for k, v in embeds_for(pipe).items()}
    noise = noise_for(pipe).to(dtype).requires_grad_()
    arguments: dict[str, Any] = {**embeds, "height": PICTURE, "width": PICTURE, "num_inference_steps": 2}
    latents = type(pipe).__call__.__wrapped__(pipe, latents=noise, output_type="latent", **arguments)[0]
    decoder = copy.deepcopy(pipe.vae).to(torch.float32 if dtype == torch.float16 else dtype)
    scaled = latents.to(decoder.dtype) / decoder.config.scaling_factor
    expected = decoder.decode(scaled).sample * 0.5 + 0.5
    leaves = [noise, *embeds.values(), *pipe.unet.parameters()]
    slope = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
    theirs = torch.autograd.grad((expected * slope).sum(), leaves, allow_unused=True)
    with bd.differentiable(pipe, memory, train="unet"):
        images = pipe(latents=noise, **arguments).images
    assert pipe.vae.dtype == dtype
    assert torch.equal(images, expected)
    ours = torch.autograd.grad((images * slope).sum(), leaves, allow_unused=True)
    for mine, true in zip(ours, theirs, strict=True):
        assert (mine is None) == (true is None)
        assert mine is None or torch.equal(mine, true)


@TRAP.refused("training the weights of a decoder that is upcast for each call: keep it in float32")
def test_training_an_upcast_decoder_is_refused() -> None:
    pipe = half_sdxl(torch.float16)
    with pytest.raises(UnsupportedError, match=r"pipe\.vae\.to\(torch\.float32\)"):
        bd.differentiable(pipe, train="vae")
    pipe.vae.to(torch.float32)
    assert bd.differentiable(pipe, train="vae").trained
