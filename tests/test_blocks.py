"""Blocks that are redone one at a time inside a call: the bits of plain autograd, fewer bytes, changes noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from backdrift.blocks import LEVELS, Level, install, installed, units
from backdrift.errors import InputError, StateChangedError
from backdrift.memory import Ledger
from backdrift.pipelines.shadow import shadow
from live_bytes import LiveBytes
from tiny_pipelines import TOKENS, WIDTH, tiny_sd3, tiny_unet, tiny_vae

STEPS = 3


def unet(
    level: Level, memory: Any, train: bool = False, dropout: bool = False, free: bool = False
) -> list[torch.Tensor]:
    """Gradients through three calls of a UNet; plain autograd where there is neither level nor memory."""
    net = tiny_unet(dropout=0.5) if dropout else tiny_unet()
    net.train(dropout)
    if free:
        net.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    trained = list(net.parameters()) if train else []
    copy: Any = shadow(net, {id(p) for p in trained})
    install(copy, level)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=draw, requires_grad=True)
    text = torch.randn(2, TOKENS, WIDTH, generator=draw, requires_grad=True)
    ledger = Ledger(memory) if memory is not None else None
    torch.manual_seed(5)
    y = x
    for t in range(STEPS):
        if ledger is None:
            out = copy(y, torch.tensor(t), text, return_dict=False)[0]
        else:
            arguments = {"modules": [("unet", copy)], "owned": True, "return_dict": False}
            out = ledger.call(copy, y, torch.tensor(t), text, **arguments)[0]
        y = y - 0.1 * out
    return list(torch.autograd.grad(y.square().sum(), [x, text, *trained]))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("memory", [None, "min", "max", 2_000_000])
@pytest.mark.parametrize("level", LEVELS[1:])
def test_gradients_are_those_of_plain_autograd(level: Level, memory: Any) -> None:
    assert equal(unet(level, memory), unet("whole", None))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_gradients_of_weights_too(level: Level) -> None:
    assert equal(unet(level, "min", train=True), unet("whole", None, train=True))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_random_numbers_are_drawn_again(level: Level) -> None:
    plain = unet("whole", None, dropout=True)
    assert equal(unet(level, None, dropout=True), plain)
    assert equal(unet(level, "min", dropout=True), plain)
    assert not equal(plain, unet("whole", None))


@pytest.mark.parametrize("memory", [None, "min", "max"])
@pytest.mark.parametrize("level", LEVELS[1:])
def test_blocks_that_edit_their_inputs_are_none_of_the_units(level: Level, memory: Any) -> None:
    """FreeU writes into the features that a block is given, which autograd refuses where they are given again."""
    free = unet("whole", None, free=True)
    assert equal(unet(level, memory, free=True), free)
    assert not equal(unet("whole", None), free)


def test_units_are_the_blocks_that_the_networks_name() -> None:
    net, transformer, vae = tiny_unet(), tiny_sd3().transformer, tiny_vae()
    assert {n for n, _ in units(net, "block")} == {
        *(f"{side}_blocks.{i}" for side in ("down", "up") for i in (0, 1)),
        "mid_block",
    }
    assert {n.rsplit(".", 2)[-2] for n, _ in units(net, "resnet")} == {"resnets", "transformer_blocks"}
    both = [f"transformer_blocks.{i}" for i in (0, 1)]
    assert [n for n, _ in units(transformer, "block")] == [n for n, _ in units(transformer, "resnet")] == both
    assert "decoder.mid_block.attentions.0" in {n for n, _ in units(vae, "resnet")}
    assert units(vae, "whole") == []
    with pytest.raises(InputError, match="'whole', 'block', 'resnet'"):
        units(vae, "layer")  # type: ignore[arg-type]


def test_a_decoder_in_parts_holds_its_largest_part() -> None:
    """Closed form for a chain of n equal blocks: n + 1 inputs are held, and one block's activations at a time."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.SiLU())))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    chain = Chain().requires_grad_(False)
    x = torch.randn(4096, 8, requires_grad=True)
    one = x.nbytes

    def held() -> int:
        with LiveBytes() as live:
            y = chain(x)
        assert y.requires_grad
        return round(live.left / one)

    assert held() == 6 * 4 + 1  # what SiLU saves, and the output
    with installed(chain, "block"):
        assert held() == 6  # the inputs of all blocks but the first, which exists anyway, and the output
    assert held() == 6 * 4 + 1


def test_changed_weights_raise() -> None:
    net = tiny_unet()
    copy: Any = shadow(net, {id(p) for p in net.parameters()})
    install(copy, "resnet")
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    out = copy(x, torch.tensor(1), torch.randn(1, TOKENS, WIDTH), return_dict=False)[0]
    with torch.no_grad():
        net.mid_block.resnets[0].conv1.weight.mul_(2)
    with pytest.raises(StateChangedError, match="modified in place"):
        out.sum().backward()


def test_a_block_that_does_not_repeat_itself_raises() -> None:
    net = tiny_unet()
    copy: Any = shadow(net, set())
    block = copy.mid_block
    inner, times = block.forward, []

    def moody(*args: Any, **kwargs: Any) -> Any:
        times.append(1)
        out = inner(*args, **kwargs)
        return out if len(times) == 1 else out * torch.ones_like(out, requires_grad=True)

    block.forward = moody
    install(copy, "block")
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    out = copy(x, torch.tensor(1), torch.randn(1, TOKENS, WIDTH), return_dict=False)[0]
    with pytest.raises(StateChangedError, match="mid_block did not repeat itself"):
        out.sum().backward()


def test_twice_through_a_retained_graph() -> None:
    net = shadow(tiny_unet(), set())
    install(net, "resnet")
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    y = net(x, torch.tensor(1), torch.randn(1, TOKENS, WIDTH), return_dict=False)[0].square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0])
