"""The classifier of digit, colour and background that measures the pipelines and serves as a loss."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backdrift.pipelines.classifier import SceneClassifier

from .loop import device, train
from .scenes import BACKGROUNDS, COLOURS, DIGITS, EFFECTS, Scene, random_scene, render

GREY = EFFECTS.index("in black and white")


def halves(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right digit of two-digit pictures (n, 3, 64, 64), each enlarged to fill a picture."""
    left, right = pictures[:, :, 14:50, :36], pictures[:, :, 14:50, 28:]
    return tuple(F.interpolate(x, size=64, mode="bilinear", align_corners=False) for x in (left, right))  # type: ignore[return-value]


def _roughen(x: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """Zoom, shift, soften and add grain, so that generated pictures are not outside what was seen."""
    zoom = torch.from_numpy(rng.uniform(0.8, 1.15, len(x))).float()
    turn = torch.from_numpy(rng.uniform(-0.2, 0.2, len(x))).float()
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom * turn.cos()
    theta[:, 0, 1] = zoom * turn.sin()
    theta[:, 1, 0] = -theta[:, 0, 1]
    theta[:, :, 2] = torch.from_numpy(rng.uniform(-0.12, 0.12, (len(x), 2))).float()
    x = F.grid_sample(
        x,
        F.affine_grid(theta, list(x.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    if rng.random() < 0.5:
        x = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), size=64, mode="bilinear")
    return x + 0.03 * rng.random() * torch.randn(x.shape, generator=generator)


def train_classifier(steps: int = 2200, batch: int = 48) -> SceneClassifier:
    """Cross-entropy on the three heads; the colour head is not asked about black-and-white pictures."""
    torch.manual_seed(0)
    net, where = SceneClassifier(DIGITS, list(COLOURS), BACKGROUNDS), device()

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        scenes = [random_scene(rng, two=0.2, effect=0.25) for _ in range(batch)]
        x = render(scenes, rng)
        pair = torch.tensor([len(s.digits) == 2 for s in scenes])
        side = rng.integers(2, size=batch)
        if pair.any():
            left, right = halves(x[pair])
            choice = torch.from_numpy(side[pair.numpy()])[:, None, None, None]
            x[pair] = torch.where(choice == 0, left, right)
        x = _roughen(x, rng, generator).to(where)
        pick = [s.digits[int(k) % len(s.digits)] for s, k in zip(scenes, side, strict=True)]
        paint = [s.colours[int(k) % len(s.digits)] for s, k in zip(scenes, side, strict=True)]
        coloured = torch.tensor([s.effect != GREY for s in scenes], device=where)
        out = {k: v.float() for k, v in net(x).items()}
        ground = torch.tensor([s.background for s in scenes], device=where)
        return (
            F.cross_entropy(out["digit"], torch.tensor(pick, device=where), label_smoothing=0.02)
            + F.cross_entropy(out["colour"][coloured], torch.tensor(paint, device=where)[coloured])
            + 0.5 * F.cross_entropy(out["background"][coloured], ground[coloured])
        )

    train("classifier", net, loss, steps=steps, lr=2e-3, ema=0.995, weight_decay=0.05)
    return net


@torch.no_grad()
def measure(net: SceneClassifier, count: int = 2000) -> dict[str, float]:
    """Accuracy of each head on held-out digits and photograph crops, one digit, no effect."""
    rng = np.random.default_rng(11)
    scenes: list[Scene] = [random_scene(rng, two=0, effect=0) for _ in range(count)]
    x = render(scenes, rng, held_out=True).to(device())
    out = {k: torch.cat([net(part)[k] for part in x.split(100)]) for k in ("digit", "colour", "background")}
    truth = {
        "digit": [s.digits[0] for s in scenes],
        "colour": [s.colours[0] for s in scenes],
        "background": [s.background for s in scenes],
    }
    return {k: float((out[k].argmax(1).cpu() == torch.tensor(truth[k])).double().mean()) for k in out}
