"""Attention processors and block-level checkpointing that the user has set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from traps import Trap

import backdrift as bd
from backdrift.errors import UnsupportedError
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_sd, tiny_sd3

TRAP = Trap(
    "Attention processors and block-level checkpointing set by the user",
    "nothing known; nested checkpointing recomputes what it has recomputed.",
)
SIZE = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 2}


def loss_of(images: Tensor) -> Tensor:
    return (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum()


def assert_bits(pipe: Any, train: str) -> None:
    """Noise, embeddings and weights, against plain autograd through the same pipeline."""
    given = {k: v.requires_grad_() for k, v in embeds_for(pipe).items()}
    given["latents"] = noise_for(pipe).requires_grad_()
    leaves = [*given.values(), *getattr(pipe, train).parameters()]
    expected = type(pipe).__call__.__wrapped__(pipe, output_type="pt", **given, **SIZE).images
    theirs = torch.autograd.grad(loss_of(expected), leaves, allow_unused=True)
    for memory in ("min", "max"):
        images = bd.differentiable(pipe, memory, train=train, clamp=True)(**given, **SIZE).images
        assert torch.equal(images, expected)
        ours = torch.autograd.grad(loss_of(images), leaves, allow_unused=True)
        for mine, true in zip(ours, theirs, strict=True):
            assert (mine is None) == (true is None)
            assert mine is None or torch.equal(mine, true)


@TRAP.handled("diffusers' own processors: classic, sliced, and fused query, key and value")
@pytest.mark.parametrize("kind", ["classic", "sliced", "fused"])
def test_processors(kind: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe = tiny_sd()
    if kind == "classic":
        pipe.unet.set_attn_processor(AttnProcessor())
    elif kind == "sliced":
        pipe.enable_attention_slicing(1)
    else:
        pipe.fuse_qkv_projections(vae=False)
    assert_bits(pipe, "unet")


class Sharper:
    """A processor from elsewhere."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = map(attn.head_to_batch_dim, (query, key, value))
        mixed = attn.batch_to_head_dim(torch.softmax(2 * attn.scale * query @ key.mT, -1) @ value)
        return attn.to_out[1](attn.to_out[0](mixed))


@TRAP.handled("processors from elsewhere")
def test_a_processor_from_elsewhere() -> None:
    pipe = tiny_sd()
    pipe.unet.set_attn_processor(Sharper())
    assert_bits(pipe, "unet")


@TRAP.handled("`enable_gradient_checkpointing()` on the network")
@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3])
def test_checkpointing_of_blocks(build: Any) -> None:
    pipe = build()
    component = "unet" if build is tiny_sd else "transformer"
    getattr(pipe, component).enable_gradient_checkpointing()
    getattr(pipe, component).train()
    assert_bits(pipe, component)


class Cutting(Sharper):
    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Tensor:
        return super().__call__(attn, hidden_states.detach(), encoder_hidden_states)


@TRAP.refused("processors that cut the graph (`detach`, `no_grad`), custom diffusion's among them")
@pytest.mark.parametrize("kind", ["own", "custom diffusion"])
def test_a_processor_that_detaches_is_refused(kind: str) -> None:
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    pipe = tiny_sd()
    pipe.unet.set_attn_processor(Cutting() if kind == "own" else CustomDiffusionAttnProcessor(False, False))
    with pytest.raises(UnsupportedError, match=r"unet\.\S+ .*(detach|no_grad)"):
        bd.differentiable(pipe)
