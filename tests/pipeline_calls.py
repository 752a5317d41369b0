"""Calls of tiny pipelines with gradients, plain autograd's through the same call, and a loss of their pictures."""

from __future__ import annotations

from typing import Any

import torch

from tiny_pipelines import (
    PICTURE,
    embeds_for,
    noise_for,
)

SIZE = {"height": PICTURE, "width": PICTURE}


def call_arguments(pipe: Any, steps: int = 3, seed: int = 0) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Keywords of a call, and the tensors among them that get gradients (fresh leaves each time)."""
    embeds = {k: v.requires_grad_() for k, v in embeds_for(pipe).items()}
    leaves = list(embeds.values())
    arguments: dict[str, Any] = {**embeds, "num_inference_steps": steps}
    arguments["generator"] = torch.Generator().manual_seed(seed)
    name = type(pipe).__name__
    if "Img2Img" in name or "ControlNet" in name:
        image = torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(1))
        arguments["image"] = image.requires_grad_()
        leaves.append(image)
    if "Img2Img" in name:
        arguments["strength"] = 0.8
    else:
        arguments["latents"] = noise_for(pipe).requires_grad_()
        leaves.append(arguments["latents"])
        arguments |= SIZE
    return arguments, leaves


def plain(pipe: Any, **arguments: Any) -> torch.Tensor:
    return type(pipe).__call__.__wrapped__(pipe, output_type="pt", **arguments).images


def loss_of(images: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, images.numel()).reshape(images.shape)
    return (images * weights).sum() + images.square().sum()


def assert_equal(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), i
        assert a is None or torch.equal(a, b), (i, (a - b).abs().max())
