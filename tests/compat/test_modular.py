"""Modular pipelines: blocks under ``no_grad`` inside blocks under ``no_grad``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import blocks_with_gradients
from torch import Tensor
from traps import Trap

import backdrift as bd
from backdrift.errors import UnsupportedError
from tiny_families import tiny_modular
from tiny_pipelines import PICTURE, noise_for, tiny_sdxl

TRAP = Trap(
    "Modular pipelines (some families exist only there)",
    "no `__wrapped__`, and hundreds of blocks under `no_grad`.",
)
CALL: dict[str, Any] = {
    "prompt": "a red 7",
    "height": PICTURE,
    "width": PICTURE,
    "num_inference_steps": 2,
}


def loss_of(images: Tensor) -> Tensor:
    return (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum()


def plain(pipe: Any, **arguments: Any) -> Tensor:
    with blocks_with_gradients(pipe):
        return pipe(output="images", output_type="pt", **arguments)


@TRAP.handled("whatever is asked for: the whole state, one output, several; text encoders included")
@pytest.mark.parametrize("asked", [None, "images", ["images", "latents"]])
def test_every_kind_of_output(asked: Any) -> None:
    pipe = tiny_modular()
    noise = noise_for(tiny_sdxl()).requires_grad_()
    leaves = [noise, *pipe.text_encoder.parameters()]
    expected = plain(pipe, latents=noise, **CALL)
    theirs = torch.autograd.grad(loss_of(expected), leaves, allow_unused=True)
    assert sum(g is not None for g in theirs) > 10
    with bd.differentiable(pipe, "min", train="text_encoder", clamp=True) as run:
        out = pipe(latents=noise, output=asked, **CALL)
    images = out if asked == "images" else out.values["images"] if asked is None else out["images"]
    assert torch.equal(images, expected)
    ours = torch.autograd.grad(loss_of(images), leaves, allow_unused=True)
    for mine, true in zip(ours, theirs, strict=True):
        assert (mine is None) == (true is None)
        assert mine is None or torch.equal(mine, true)
    assert len(run.pil) == 1
    assert not pipe(output="images", output_type="pt", **CALL).requires_grad


@TRAP.handled("a state handed in, whose tensors require grad")
def test_a_state_goes_on_with_its_gradients() -> None:
    from diffusers.modular_pipelines import PipelineState

    pipe = tiny_modular()
    noise = noise_for(tiny_sdxl()).requires_grad_()
    expected = plain(pipe, latents=noise, **CALL)
    state = PipelineState()
    state.set("latents", noise)
    images = bd.differentiable(pipe, "min", clamp=True)(state, output="images", **CALL)
    (mine,) = torch.autograd.grad(loss_of(images), noise)
    assert torch.equal(mine, torch.autograd.grad(loss_of(expected), noise)[0])
    assert state.values.keys() == {"latents"}


@TRAP.handled("noise that a block draws (`noise=`)")
def test_noise_drawn_by_a_block() -> None:
    pipe = tiny_modular()
    noise = noise_for(tiny_sdxl()).requires_grad_()
    expected = plain(pipe, latents=noise, **CALL)
    images = bd.differentiable(pipe, "max", noise=noise, clamp=True)(output="images", **CALL)
    assert torch.equal(images, expected)
    (mine,) = torch.autograd.grad(loss_of(images), noise)
    assert torch.equal(mine, torch.autograd.grad(loss_of(expected), noise)[0])


@TRAP.handled("guidance that skips layers for single calls: a redone call skips them too")
def test_guidance_that_skips_layers() -> None:
    from diffusers import LayerSkipConfig, SkipLayerGuidance

    results = []
    for skipping in (True, False):
        pipe = tiny_modular()
        config = LayerSkipConfig(
            indices=[0], fqn="mid_block.attentions.0.transformer_blocks", skip_attention=True
        )
        pipe.update_components(
            guider=SkipLayerGuidance(
                guidance_scale=5.0,
                skip_layer_guidance_scale=2.8 if skipping else 0.0,
                skip_layer_config=config,
                skip_layer_guidance_start=0.0,
                skip_layer_guidance_stop=1.0,
            )
        )
        noise = noise_for(tiny_sdxl()).requires_grad_()
        expected = plain(pipe, latents=noise, **CALL)
        (true,) = torch.autograd.grad(loss_of(expected), noise)
        for memory in ("min", "max"):
            images = bd.differentiable(pipe, memory, clamp=True)(latents=noise, output="images", **CALL)
            assert torch.equal(images, expected)
            assert torch.equal(torch.autograd.grad(loss_of(images), noise)[0], true)
        results.append(expected)
    assert not torch.equal(*results)


@TRAP.refused("a block that detaches: it is named")
def test_a_block_that_detaches_is_refused() -> None:
    pipe = tiny_modular()
    cls = type(pipe._blocks.sub_blocks["decode"])

    class Cutting(cls):  # type: ignore[misc,valid-type]
        def __call__(self, components: Any, state: Any) -> Any:
            state.set("latents", state.get("latents").detach())
            return components, state

    pipe._blocks.sub_blocks["decode"] = Cutting()
    with pytest.raises(UnsupportedError, match=r"the block Cutting .*detach"):
        bd.differentiable(pipe)
