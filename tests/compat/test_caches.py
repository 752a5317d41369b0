"""Caches over the steps: what one call of the network leaves for the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor
from traps import Trap

import backdrift as bd
from backdrift.errors import UnsupportedError
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_flux, tiny_sd

TRAP = Trap(
    "FirstBlockCache, DeepCache-like and other caches of features over the steps",
    "recomputing outside the cache's context raises.",
)
SIZE = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 6}
CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.4),
    "mag": lambda: MagCacheConfig(
        threshold=0.5, max_skip_steps=2, num_inference_steps=6, mag_ratios=[1.0] * 6
    ),
    "taylor": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
}


def loss_of(images: Tensor) -> Tensor:
    return (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum()


def inputs(pipe: Any) -> dict[str, Tensor]:
    return {k: v.requires_grad_() for k, v in {**embeds_for(pipe), "latents": noise_for(pipe)}.items()}


@TRAP.handled(
    "diffusers' first-block cache, MagCache and TaylorSeer: a redone call finds the state that the first one found, "
    "gradients through skipped steps included; noise, embeddings and weights"
)
@pytest.mark.parametrize("cache", CACHES)
def test_caches_over_the_steps(cache: str) -> None:
    pipe = tiny_flux()
    pipe.transformer.enable_cache(CACHES[cache]())
    given = inputs(pipe)
    leaves = [*given.values(), *pipe.transformer.parameters()]
    call = type(pipe).__call__.__wrapped__
    expected = call(pipe, output_type="pt", **given, **SIZE).images
    theirs = torch.autograd.grad(loss_of(expected), leaves, allow_unused=True)
    uncached = tiny_flux()
    with torch.no_grad():  # the cache did skip something
        assert not torch.equal(call(uncached, output_type="pt", **given, **SIZE).images, expected)
    for memory in ("min", "max"):
        for _ in range(2):  # the second call starts anew
            with bd.differentiable(pipe, memory, train="transformer", clamp=True):
                images = pipe(**given, **SIZE).images
            assert torch.equal(images, expected)
        ours = torch.autograd.grad(loss_of(images), leaves, allow_unused=True)
        for mine, true in zip(ours, theirs, strict=True):
            assert (mine is None) == (true is None)
            assert mine is None or torch.equal(mine, true)
    assert torch.equal(call(pipe, output_type="pt", **given, **SIZE).images, expected)


@TRAP.refused(
    "caches that ask the pipeline for its time (pyramid attention broadcast, FasterCache): first-block cache instead"
)
def test_caches_that_ask_the_pipeline_are_refused() -> None:
    pipe = tiny_flux()
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
    )
    with pytest.raises(UnsupportedError, match=r"pipe\.transformer\.disable_cache\(\)"):
        bd.differentiable(pipe)


class DeepCacheLike:
    """Keeps the middle of a UNet over the steps, by functions that it puts in place of ``forward``."""

    def __init__(self, pipe: Any, interval: int) -> None:
        self.pipe, self.interval, self.calls, self.kept = pipe, interval, 0, None
        inner = pipe.unet.mid_block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.calls % self.interval == 0:
                self.kept = inner(*args, **kwargs)
            self.calls += 1
            return self.kept

        pipe.unet.mid_block.forward = forward


@TRAP.refused(
    "DeepCache-like patches, functions in place of a layer's `forward` that keep state of their own"
)
def test_patched_forwards_are_refused() -> None:
    pipe = tiny_sd()
    run = bd.differentiable(pipe)
    DeepCacheLike(pipe, 2)
    with pytest.raises(UnsupportedError, match=r"unet\.mid_block has a forward .* DeepCacheLike"):
        run(**inputs(pipe), **SIZE)
    assert run.stats.calls_forward == 0


@TRAP.handled("functions in place of a layer's `forward`, or another method, that only call the layer")
@pytest.mark.parametrize("kind", ["closure", "method", "decode", "pipeline"])
def test_stateless_patches_are_followed(kind: str) -> None:
    from types import MethodType

    pipe = tiny_sd()
    block = pipe.unet.mid_block
    if kind == "closure":
        inner = block.forward
        block.forward = lambda *args, **kwargs: 0.5 * inner(*args, **kwargs)
    elif kind == "decode":
        decode = pipe.vae.decode
        pipe.vae.decode = lambda z, *args, **kwargs: decode(0.5 * z, *args, **kwargs)
    elif kind == "pipeline":
        encode = type(pipe).prepare_latents
        pipe.prepare_latents = MethodType(
            lambda self, *args, **kwargs: (
                encode(self, *args, **kwargs) + self.vae.post_quant_conv.bias.mean()
            ),
            pipe,
        )
    else:
        plain = type(block).forward
        block.forward = MethodType(lambda self, *args, **kwargs: 0.5 * plain(self, *args, **kwargs), block)
    given = inputs(pipe)
    leaves = [*given.values(), *pipe.unet.parameters()]
    expected = type(pipe).__call__.__wrapped__(pipe, output_type="pt", **given, **SIZE).images
    theirs = torch.autograd.grad(loss_of(expected), leaves, allow_unused=True)
    images = bd.differentiable(pipe, "min", train="unet", clamp=True)(**given, **SIZE).images
    loss_of(images).backward()
    for leaf, true in zip(leaves, theirs, strict=True):
        assert (leaf.grad is None) == (true is None)
        assert true is None or torch.equal(leaf.grad, true)
    assert all(weight.grad is None for weight in pipe.vae.parameters())  # nobody asked for these
