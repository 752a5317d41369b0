"""Kinds of digits that captions do not name, by a stated rule, and the small network that tells them apart.

The rule looks at the real digits as scikit-learn has them, 8×8 pixels of ink from 0 to 16:

- a *one with a foot* has at least 1.3 pixels' worth of ink in the two left and the two right columns of its two lowest
  rows, where a stroke underneath lies; the next one below has 1.1, the last one above 1.5;
- a *plain seven* has less than 2.55 pixels' worth of ink in each of its four middle rows (the fourth to the seventh);
  a bar through the stem takes more. The border is not as clear as that of the feet: 2.5 beside 2.56.

Both were found by looking: 27 of 182 ones have a foot, 11 of 179 sevens are plain. Digits are dealt into two halves,
in turn within each kind. The network that ships learns from half A and is measured on half B; the judge
(:func:`judge`) knows half B and is measured on half A.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backdrift.losses.digit_kinds import KINDS, KindNetwork

from .judge import ShapeJudge, ink
from .loop import device, train
from .scenes import BACKGROUNDS, FLAT, Scene, random_scene, render, soft_mask

FOOT, BAR = 1.3, 2.55


def kind_of(pictures: Tensor, digits: Tensor) -> Tensor:
    """Of real digits (n, 8, 8) in [0, 1] and which they are, (n,): the kinds' places in ``digit_kinds.KINDS``, (n,)."""
    under = pictures[:, 6:, [0, 1, 6, 7]].sum((1, 2))
    widest = pictures[:, 3:7].sum(2).amax(1)
    kind = torch.full_like(digits, KINDS.index("another digit"))
    ones, sevens = digits == 1, digits == 7
    kind[ones] = torch.where(
        under[ones] >= FOOT, KINDS.index("one with a foot"), KINDS.index("one without a foot")
    )
    kind[sevens] = torch.where(widest[sevens] < BAR, KINDS.index("plain seven"), KINDS.index("crossed seven"))
    return kind


@functools.cache
def real_kinds(half: str) -> list[Tensor]:
    """The real digits of each kind in a half, "A" or "B": five tensors (n, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, digits = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target)
    kind = kind_of(pictures, digits)
    return [pictures[kind == k]["AB".index(half) :: 2] for k in range(len(KINDS))]


@functools.cache
def kind_masks(half: str) -> list[Tensor]:
    """The same as soft masks, as :func:`training.scenes.digit_masks` makes them: five tensors (n, 96, 96) in [0, 1]."""
    masks = []
    for pictures in real_kinds(half):
        padded = F.pad(pictures[:, None], (2, 2, 2, 2))
        masks.append(soft_mask(F.interpolate(padded, size=96, mode="bicubic", align_corners=False)[:, 0]))
    return masks


def drawn(kinds: Tensor, half: str, rng: np.random.Generator, *, flat: bool = False) -> Tensor:
    """One digit of each kind (n,) from a half, in random colours on random backgrounds: (n, 3, 64, 64) in [0, 1]."""
    scenes: list[Scene] = []
    for kind in kinds.tolist():
        scene = random_scene(rng, two=0, effect=0)
        while flat and BACKGROUNDS[scene.background] not in FLAT:
            scene = random_scene(rng, two=0, effect=0)
        scenes.append(Scene((kind,), scene.colours, scene.background))
    return render(scenes, rng, masks=kind_masks(half))


def roughened(x: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """Zoomed, turned, moved, sometimes softened, grainy: so that generated pictures are not outside what was seen."""
    n = len(x)
    zoom, turn = (torch.from_numpy(rng.uniform(*r, n)).float() for r in ((0.85, 1.12), (-0.12, 0.12)))
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom * turn.cos()
    theta[:, 0, 1], theta[:, 1, 0] = zoom * turn.sin(), -zoom * turn.sin()
    theta[:, :, 2] = torch.from_numpy(rng.uniform(-0.08, 0.08, (n, 2))).float()
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if rng.random() < 0.5:
        x = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), size=64, mode="bilinear")
    return x + 0.03 * rng.random() * torch.randn(x.shape, generator=generator)


def train_kinds(steps: int = 1500, batch: int = 60) -> KindNetwork:
    """Cross-entropy; every kind equally often, from half A."""
    torch.manual_seed(0)
    network, where = KindNetwork(), device()
    kinds = torch.arange(batch) % len(KINDS)

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        x = roughened(drawn(kinds, "A", rng), rng, generator).to(where)
        # The network is small: bfloat16 would be no faster.
        with torch.autocast(where.type, enabled=False):
            return F.cross_entropy(network(x), kinds.to(where), label_smoothing=0.02)

    train("kinds", network, loss, steps=steps, lr=6e-3, ema=0.99, weight_decay=0.02)
    return network


@functools.cache
def judge(count: int = 4000, seed: int = 23) -> ShapeJudge:
    """The vote of the five nearest shapes among ``count`` drawings from half B on flat backgrounds.

    No network, nothing fitted, and digits that the network has not seen: (n, 3, 64, 64) -> (n, 10) logarithms of
    shares, of which the first five are those of the kinds.
    """
    kinds = torch.arange(count) % len(KINDS)
    rng = np.random.default_rng(seed)
    shapes = [ink(drawn(part, "B", rng, flat=True)) for part in kinds.split(200)]
    return ShapeJudge(torch.cat(shapes), kinds).eval()


@torch.no_grad()
def accuracy(
    reader: torch.nn.Module, half: str, *, flat: bool, count: int = 1000, seed: int = 24
) -> dict[str, float]:
    """The share of drawings from a half that are read right, of each kind and over all of them."""
    kinds = torch.arange(count) % len(KINDS)
    rng = np.random.default_rng(seed)
    right = torch.cat(
        [reader(drawn(part, half, rng, flat=flat)).argmax(1) == part for part in kinds.split(100)]
    )
    found = {name: float(right[kinds == k].double().mean()) for k, name in enumerate(KINDS)}
    return found | {"all": float(right.double().mean())}


def figures(network: torch.nn.Module) -> dict[str, str]:
    """The figures of the card."""
    counts = [[len(x) for x in real_kinds(half)] for half in "AB"]
    flat, any_ground, other = (
        accuracy(network, "B", flat=True), accuracy(network, "B", flat=False), accuracy(judge(), "A", flat=True)
    )  # fmt: skip
    found = {
        f"real digits of the kind '{name}', learnt from / held out": f"{a} / {b}"
        for name, a, b in zip(KINDS, *counts, strict=True)
    }
    read = "1,000 drawings of held-out digits on flat backgrounds, read right"
    return {
        **found,
        **{f"{read}: {name}": f"{share:.1%}" for name, share in flat.items()},
        "the same on any background: all": f"{any_ground['all']:.1%}",
        "the judge of `training/kinds.py`, which knows the other half: all": f"{other['all']:.1%}",
    }


if __name__ == "__main__":
    print(accuracy(judge(), "A", flat=True))
