"""Views (``bd.as_denoiser``) of pipelines whose networks wait on the CPU until they are called."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from offloaded_runs import (
    PIPELINES,
    TRAP,
    WAYS,
    Watched,
    hooks_of,
    largest,
    largest_block,
    leaves_of,
    nbytes,
    network_of,
    table_of,
)
from torch import Tensor

import backdrift as bd
from backdrift.errors import StateChangedError, UnsupportedError
from tiny_pipelines import PICTURE, noise_for, tiny_sd, tiny_sdxl


def view_of(pipe: Any, train: str | None, inputs: dict[str, Tensor]) -> Any:
    """Of Stable Diffusion and Stable Diffusion 3 without a call, of others by one."""
    if type(pipe).__name__ in ("StableDiffusionPipeline", "StableDiffusion3Pipeline"):
        return bd.as_denoiser(pipe, **{k: v for k, v in inputs.items() if k != "latents"}, train=train)
    return bd.as_denoiser(pipe, **inputs, height=PICTURE, width=PICTURE, num_inference_steps=2, train=train)


def sampled(pipe: Any, train: str, gradient: Any) -> list[Tensor]:
    """Clean latents, pictures, and the gradients of noise, embeddings and weights."""
    inputs = leaves_of(pipe)
    view = view_of(pipe, train, inputs)
    x0 = bd.sample(view.model, inputs["latents"], view.cond, grid=view.grid(2), gradient=gradient).x0
    pictures = view.decode(x0)
    weights = bd.differentiable(pipe, train=train).parameters
    leaves = [*inputs.values(), *weights.values()]
    loss = (pictures * torch.linspace(-1, 1, pictures.numel()).reshape(pictures.shape)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    named = zip([*inputs, *weights], found, strict=True)
    assert [name for name, g in named if g is None] in ([], ["negative_pooled_prompt_embeds"])
    return [x0.detach(), pictures.detach(), *(g for g in found if g is not None)]


@TRAP.handled(
    "views (`bd.as_denoiser`): the same samples, pictures and gradients by noise, embeddings and weights, in the "
    "pipeline's own grain"
)
@pytest.mark.parametrize(
    ("name", "way"),
    [("sd", "model"), ("sd", "sequential"), ("sd", "blocks"), ("sdxl", "model"), ("sdxl", "leaves"),
     ("flux", "sequential"), ("sd3", "blocks")],
)  # fmt: skip
def test_a_view_brings_weights_in_the_pipelines_own_grain(
    name: str, way: str, devices: list[Watched]
) -> None:
    train = f"{'unet' if name.startswith('sd') and name != 'sd3' else 'transformer'}.*attn*"
    gradients = (bd.Exact("min"), bd.Plain(), bd.SymplecticAdjoint())
    pipe = PIPELINES[name]()
    wanted = [sampled(pipe, train, gradient) for gradient in gradients]
    networks = [network_of(pipe), pipe.vae]
    measure = nbytes if way == "model" else largest_block if way == "blocks" else largest
    bound = max(map(measure, networks))
    devices.clear()
    WAYS[way](pipe)
    hooks = hooks_of(pipe)
    for gradient, expected in zip(gradients, wanted, strict=True):
        for found, true in zip(sampled(pipe, train, gradient), expected, strict=True):
            assert torch.equal(found, true)
    assert hooks_of(pipe) == hooks
    gc.collect()  # the views' own
    used = [device for device in devices if device.peak]
    assert used
    for device in used:
        assert bound / 2 < device.peak <= bound
        assert all(len(together) == 1 for together in device.together)
        assert device.nbytes == 0


@TRAP.handled("views whose prompts are encoded and whose text encoder is trained")
@pytest.mark.parametrize("way", ["model", "sequential"])
def test_a_text_encoder_beside_a_view(way: str) -> None:
    results = []
    for offload in (False, True):
        pipe = tiny_sdxl()
        if offload:
            WAYS[way](pipe)
        train = "text_encoder_2.*fc1*"
        view = bd.as_denoiser(pipe, "a b", 3.0, train=train, latents=noise_for(pipe), num_inference_steps=2)
        x0 = bd.sample(view.model, view.x_T, view.cond, grid=view.grid(), gradient=bd.Exact("min")).x0
        weights = list(bd.differentiable(pipe, train=train).parameters.values())
        results.append([x0.detach(), *torch.autograd.grad(x0.square().sum(), weights)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@TRAP.handled("weights edited between a view's run and its backward pass are noticed, also by plain autograd")
@pytest.mark.parametrize("gradient", [bd.Plain(), bd.Exact("min"), bd.Exact("max")])
@pytest.mark.parametrize("way", ["model", "sequential", "leaves"])
def test_weights_edited_at_home_are_noticed_by_a_view(way: str, gradient: Any) -> None:
    pipe = tiny_sd()
    WAYS[way](pipe)
    inputs = leaves_of(pipe)
    view = view_of(pipe, None, inputs)
    x0 = bd.sample(view.model, inputs["latents"], view.cond, grid=view.grid(2), gradient=gradient).x0
    with torch.no_grad():
        home = table_of(pipe.unet)["conv_in.weight"] if way == "sequential" else pipe.unet.conv_in.weight
        home.mul_(2)
    with pytest.raises(StateChangedError, match=r"conv_in\.weight"):
        x0.sum().backward()


@TRAP.refused("`bd.verify` of an offloaded pipeline, whose networks it would copy in float64")
@pytest.mark.parametrize("way", ["model", "blocks"])
@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_a_certificate_wants_one_device(build: Any, way: str) -> None:
    pipe = build()
    WAYS[way](pipe)
    with pytest.raises(UnsupportedError, match=r"is offloaded.*one device"):
        bd.verify(pipe, prompt="a", loss=lambda images: images.square().flatten(1).mean(1), steps=[2])
