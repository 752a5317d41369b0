"""Pipelines whose networks, or single blocks of them, keep state of their own: the gradient is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.blocks import install
from backdrift.errors import StateChangedError
from backdrift.pipelines.shadow import shadow
from tiny_pipelines import PICTURE, TOKENS, WIDTH, embeds_for, noise_for, tiny_sd, tiny_unet


class Counting(nn.Module):
    """Stands before a layer, and counts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.inner(*args, **kwargs) * (1 + 0.05 * self.calls)


def gradient(pipe: Any, memory: Any) -> Tensor:
    noise = noise_for(pipe).requires_grad_()
    call = {**embeds_for(pipe), "height": PICTURE, "width": PICTURE, "num_inference_steps": 2}
    with bd.differentiable(pipe, memory=memory):
        images = pipe(latents=noise, **call).images
    return torch.autograd.grad(images.square().sum(), noise)[0]


@pytest.mark.parametrize(
    "memory", ["min", bd.Choices(keep=0, network="block"), bd.Choices(keep=0, network="resnet")]
)
@pytest.mark.parametrize("where", ["conv_in", "mid_block"])
def test_a_counter_in_a_network(where: str, memory: Any) -> None:
    pipe = tiny_sd()
    if where == "conv_in":
        pipe.unet.conv_in = Counting(pipe.unet.conv_in)
    else:
        block = pipe.unet.mid_block.resnets[0]
        block.conv1 = Counting(block.conv1)
    with pytest.raises(StateChangedError, match=r"did not repeat itself.*% off, where rounding explains"):
        gradient(pipe, memory)
    assert gradient(pipe, "max").isfinite().all()


def test_the_block_is_named() -> None:
    net = tiny_unet()
    copy: Any = shadow(net, set())
    copy.mid_block.resnets[0].conv1 = Counting(copy.mid_block.resnets[0].conv1)
    install(copy, "block")
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    out = copy(x, torch.tensor(1), torch.randn(1, TOKENS, WIDTH), return_dict=False)[0]
    with pytest.raises(
        StateChangedError, match=r"UNet2DConditionModel's mid_block did not repeat itself.*% off"
    ):
        out.sum().backward()
