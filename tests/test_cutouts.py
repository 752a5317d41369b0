"""Losses on random crops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError


def mean_square(images: Tensor) -> Tensor:
    return images.square().mean((1, 2, 3))


def test_the_value_is_the_mean_over_the_crops_and_its_gradient_too() -> None:
    loss = bd.losses.Cutouts(mean_square, count=5)
    x = torch.rand(
        2, 3, 12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()
    crops = loss.crops(12, 20)
    assert len(set(crops)) > 1
    assert all(6 <= side <= 12 and top + side <= 12 and left + side <= 20 for top, left, side in crops)
    by_hand = sum(mean_square(x[..., t : t + s, left : left + s]) for t, left, s in crops) / 5
    torch.testing.assert_close(loss(x), by_hand, rtol=1e-14, atol=0)
    wanted = torch.zeros_like(x)
    for t, left, s in crops:
        wanted[..., t : t + s, left : left + s] += (
            2 * x.detach()[..., t : t + s, left : left + s] / (3 * s * s) / 5
        )
    (found,) = torch.autograd.grad(loss(x).sum(), x)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-13, atol=0)


def test_crops_are_drawn_once_from_the_seed() -> None:
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = bd.losses.Cutouts(mean_square, seed=3)
    torch.rand(7)  # what others draw does not matter
    assert torch.equal(loss(x), loss(x))
    assert torch.equal(loss(x)[1:2], loss(x[1:2]))
    assert torch.equal(loss(x), bd.losses.Cutouts(mean_square, seed=3)(x))
    assert not torch.equal(loss(x), bd.losses.Cutouts(mean_square, seed=4)(x))


def test_power_and_least_say_how_large_crops_are() -> None:
    def sides(**options: Any) -> list[int]:
        return [side for *_, side in bd.losses.Cutouts(mean_square, count=64, **options).crops(100, 100)]

    assert sum(sides(power=0.1)) > sum(sides(power=1.0)) > sum(sides(power=4.0))
    assert min(sides(least=0.9)) >= 90
    assert sides(least=1.0) == [100] * 64


def test_as_text() -> None:
    loss = bd.losses.resolve("0.5*cutouts:3 brightness + contrast")
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one = bd.losses.Cutouts("brightness", count=3)
    expected = 0.5 * one(x) + bd.losses.resolve("contrast")(x)
    torch.testing.assert_close(loss(x), expected)
    assert one.spec == "cutouts:3 brightness"
    other = bd.losses.Cutouts("brightness", 4, power=0.7, least=0.25, seed=9)
    assert torch.equal(bd.losses.resolve(other.spec)(x), other(x))
    for wrong in ("cutouts:clip:a", "cutouts:4", "cutouts:-1 brightness"):
        with pytest.raises(InputError, match="number of crops"):
            bd.losses.resolve(wrong)
    with pytest.raises(InputError, match="least"):
        bd.losses.Cutouts("brightness", least=0.0)
