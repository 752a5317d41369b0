"""Pipelines that take no noise or no embeddings: the tensor takes the place of the pipeline's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import drawing
from torch import Tensor
from traps import Trap

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError
from tiny_families import tiny_dit, tiny_pixels
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_flux, tiny_sd, tiny_sd_img2img

TRAP = Trap(
    "Pipelines without `latents=` (DiT, DDPM, DDIM, image to image …) or without `prompt_embeds=`",
    "no way to hand the tensor in.",
)
SIZE = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 2}


def loss_of(images: Tensor) -> Tensor:
    return (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cases() -> dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]]:
    picture = torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(1))
    sd = tiny_sd_img2img()
    return {
        "ddpm": (tiny_pixels(), (2, 3, 8, 8), {"batch_size": 2, "num_inference_steps": 2}),
        "dit": (tiny_dit(), (1, 4, 8, 8), {"class_labels": [2], "num_inference_steps": 2}),
        "image to image": (
            sd,
            (1, 4, 8, 8),
            {**embeds_for(sd), "image": picture, "strength": 0.9, "num_inference_steps": 3},
        ),
    }


@TRAP.handled(
    "`differentiable(pipe, noise=…)`: the tensor takes the place of the pipeline's own first draw of its shape; "
    "schedulers and autoencoders draw what they would have drawn"
)
@pytest.mark.parametrize("name", ["ddpm", "dit", "image to image"])
def test_the_bits_of_a_draw_replaced_by_hand(name: str) -> None:
    pipe, shape, arguments = cases()[name]
    noise, generator = normal(*shape).requires_grad_(), torch.Generator().manual_seed(4)
    with drawing(pipe, noise):
        call = type(pipe).__call__.__wrapped__
        expected = call(pipe, output_type="pt", generator=generator, **arguments).images
    (true,) = torch.autograd.grad(loss_of(expected), noise)
    with bd.differentiable(pipe, "min", clamp=True, noise=noise) as run:
        images = pipe(generator=generator.manual_seed(4), **arguments).images
        assert torch.equal(images, expected)
        assert torch.equal(torch.autograd.grad(loss_of(images), noise)[0], true)
        run.noise = None  # the pipeline's own again
        own = pipe(generator=generator.manual_seed(4), **arguments).images
    plainly = pipe(generator=generator.manual_seed(4), output_type="pt", **arguments).images
    assert torch.equal(own.detach(), plainly)


@TRAP.handled("noise equal to what the pipeline would have drawn gives the pipeline's own picture")
def test_the_pipelines_own_picture() -> None:
    pipe = tiny_pixels()
    noise = normal(1, 3, 8, 8, seed=6)
    plainly = pipe(generator=torch.Generator().manual_seed(6), num_inference_steps=3, output_type="pt").images
    run = bd.differentiable(pipe, "min", clamp=True, noise=noise)
    ours = run(generator=torch.Generator().manual_seed(6), num_inference_steps=3).images
    assert torch.equal(ours, plainly)


@TRAP.refused(
    "noise of another shape than the pipeline draws, or noise and `latents=` at once: the shapes are named"
)
@pytest.mark.parametrize("build", [tiny_pixels, tiny_sd, tiny_flux])
def test_noise_without_a_place_is_refused(build: Any) -> None:
    pipe = build()
    arguments: dict[str, Any] = {"num_inference_steps": 2}
    message = r"drew noise of the shape \(1, 3, 8, 8\)"
    if build is not tiny_pixels:
        arguments |= {**embeds_for(pipe), **SIZE, "latents": noise_for(pipe)}
        message = "no latents="
    run = bd.differentiable(pipe, "min", noise=normal(1, 3, 9, 9))
    with pytest.raises(InputError, match=message):
        run(**arguments)
    assert run.stats.calls_forward == 0


@TRAP.handled(
    "embeddings of a pipeline that takes none: a forward hook on its text encoder or embedding layer that returns the "
    "tensor"
)
def test_an_embedding_through_a_hook() -> None:
    pipe = tiny_dit()
    embedding = normal(2, 8, seed=3).requires_grad_()
    noise = normal(1, 4, 8, 8)
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.class_embedder.register_forward_hook(lambda *_: embedding)
    with drawing(pipe, noise):
        call = type(pipe).__call__.__wrapped__
        expected = call(pipe, [3], num_inference_steps=3, output_type="pt").images
    (true,) = torch.autograd.grad(loss_of(expected), embedding)
    assert true.abs().sum() > 0
    for memory in ("min", "max"):
        run = bd.differentiable(pipe, memory, clamp=True, noise=noise)
        images = run([3], num_inference_steps=3).images
        assert torch.equal(torch.autograd.grad(loss_of(images), embedding)[0], true)


def test_noise_that_the_pipeline_cuts_off_is_named() -> None:
    pipe = tiny_sd()
    noise = noise_for(pipe).requires_grad_()

    def cut(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"].detach()}

    run = bd.differentiable(pipe, "min", noise=noise, train="unet")
    with pytest.raises(MissingGradientError, match="noise"):
        run(**embeds_for(pipe), **SIZE, callback_on_step_end=cut)
