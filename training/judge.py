"""A judge of shapes that no loss has ever seen: the nearest real digits, found without any network.

The built-in classifier is part of losses, and what is optimised to please it may please nobody else. This judge
shares nothing with it but the digits: a picture on a flat background is reduced to its *ink* (how far each
pixel is from the background's colour, on a coarse grid), and the held-in real digits whose ink is nearest vote.
It has no gradient and nothing was fitted, so nothing can have been optimised against it.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import BACKGROUNDS, DIGITS, FLAT, Scene, random_scene, render

SIDE = 16
"""Side of the grid on which shapes are compared."""


def ink(pictures: Tensor) -> Tensor:
    """How much of each cell the digit covers: (n, 3, H, W) in [0, 1] -> (n, 16 * 16) in [0, 1].

    The background is the median colour of a frame of 3 pixels; the farthest colours count as full ink.
    """
    frame = torch.cat(
        [pictures[..., :3, :].flatten(2), pictures[..., -3:, :].flatten(2),
         pictures[..., 3:-3, :3].flatten(2), pictures[..., 3:-3, -3:].flatten(2)], 2
    )  # fmt: skip
    ground = frame.median(2).values[:, :, None, None]
    far = (pictures - ground).square().sum(1, keepdim=True).sqrt()
    full = far.flatten(1).quantile(0.97, dim=1).clamp_min(0.05)[:, None, None, None]
    return F.interpolate((far / full).clamp(0, 1), size=SIDE, mode="area").flatten(1)


class ShapeJudge(nn.Module):
    """The vote of the nearest shapes among (m, 256) known ones and their digits (m,).

    Call it with pictures (n, 3, H, W) of one digit on a flat background; it returns the logarithm of each digit's
    share of the ``neighbours`` nearest (Euclidean) shapes, (n, 10), ties going to the nearer ones.
    """

    def __init__(self, shapes: Tensor, digits: Tensor, neighbours: int = 5) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.register_buffer("shapes", shapes)
        self.register_buffer("digits", digits)
        self.shapes: Tensor
        self.digits: Tensor

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        distances, nearest = torch.cdist(ink(pictures), self.shapes).topk(self.neighbours, largest=False)
        votes = F.one_hot(self.digits[nearest], len(DIGITS)).to(distances)
        closeness = 1 - 1e-3 * distances[..., None]
        return ((votes * closeness).sum(1) / self.neighbours).clamp_min(1e-6).log()


def drawn(count: int, seed: int, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """Pictures of one digit on flat backgrounds without an effect, and their digits."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, two=0, effect=0)
        if BACKGROUNDS[scene.background] in FLAT:
            scenes.append(scene)
    return render(scenes, rng, held_out=held_out), torch.tensor([s.digits[0] for s in scenes])


@functools.cache
def judge(count: int = 8000, seed: int = 21) -> ShapeJudge:
    """The judge that knows ``count`` drawings of held-in digits."""
    pictures, digits = drawn(count, seed, held_out=False)
    return ShapeJudge(ink(pictures), digits).eval()


def accuracy(reader: ShapeJudge, count: int = 2000, seed: int = 22) -> float:
    """The share of ``count`` drawings of held-out digits that are read right."""
    pictures, digits = drawn(count, seed, held_out=True)
    read = torch.cat([reader(part) for part in pictures.split(100)]).argmax(1)
    return float((read == digits).double().mean())


if __name__ == "__main__":
    print(f"held-out digits read right: {accuracy(judge()):.1%}")
