"""The continuous-time pixel model of the real 8×8 digits, and how good it is."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import backdrift as bd
from backdrift.pipelines.assets import load_classifier
from backdrift.pipelines.digits import DigitsNetwork

from .loop import device, train
from .scenes import COLOURS, FLAT, SIZE, real_digits, soft_mask

FIRST, LAST = 1.0, 1e-3
"""The times it is trained on."""
STEPS = 10_000


def build() -> DigitsNetwork:
    """An untrained network."""
    torch.manual_seed(0)
    return DigitsNetwork()


def states(pictures: Tensor) -> Tensor:
    """Ink in [0, 1] as clean states in [-1, 1]."""
    return pictures * 2 - 1


def ink(clean: Tensor) -> Tensor:
    """Clean states as pictures: ink, clamped to [0, 1]."""
    return ((clean + 1) / 2).clamp(0, 1)


def drawn_times(rng: np.random.Generator, count: int) -> Tensor:
    """Half evenly in t, half evenly in log(alpha/sigma): (count,) float64. One from each of equal slices.

    Neither a uniform nor a log-SNR grid asks mostly where the network has seen little.
    """
    schedule = bd.VP.linear()
    low, high = (float(schedule.lam(t)) for t in (FIRST, LAST))
    w = torch.from_numpy((np.arange(count) + rng.random(count)) / count)
    lam = schedule.t_from_lam(low + (high - low) * w[1::2]).clamp(LAST, FIRST)
    return torch.cat([LAST + (FIRST - LAST) * w[::2], lam])


def noised(clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The states at times ``t`` (n,), and the v that the network should say there."""
    schedule = bd.VP.linear()
    alpha, sigma = (scale(t).to(clean)[:, None, None, None] for scale in (schedule.alpha, schedule.sigma))
    return alpha * clean + sigma * noise, alpha * noise - sigma * clean


def train_digits(steps: int = STEPS, batch: int = 256) -> DigitsNetwork:
    """Squared error on the velocity v; half of the pictures come without their digit's name."""
    network, where = build(), device()
    pictures, digits = real_digits()
    clean, named = states(pictures).to(where), F.one_hot(digits, 10).float().to(where)

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        pick = torch.from_numpy(rng.integers(len(clean), size=batch))
        told = torch.from_numpy(rng.random((batch, 1)) < 0.5).to(where)
        t = drawn_times(rng, batch)
        noise = torch.randn(batch, 1, 8, 8, generator=generator).to(where)
        x, v = noised(clean[pick], noise, t)
        # The network is small, and differences between solvers are looked for far below bfloat16's three digits.
        with torch.autocast(where.type, enabled=False):
            return F.mse_loss(network(x, t.float().to(where), named[pick] * told), v)

    train("digits", network, loss, steps=steps, lr=2e-3, ema=0.999, save_every=1000)
    return network


@torch.no_grad()
def velocity_error(network: DigitsNetwork, *, held_out: bool, rounds: int = 20) -> float:
    """Mean squared error on v without a digit's name, at times drawn as in training."""
    clean = states(real_digits(held_out)[0])
    errors = []
    for i in range(rounds):
        rng, generator = np.random.default_rng((31, i)), torch.Generator().manual_seed(i)
        t = drawn_times(rng, len(clean))[torch.from_numpy(rng.permutation(len(clean)))]
        x, v = noised(clean, torch.randn(clean.shape, generator=generator), t)
        errors.append(F.mse_loss(network(x, t.float()), v))
    return float(torch.stack(errors).mean())


@torch.no_grad()
def drawn(model: bd.Denoiser, count: int, cond: Tensor | None = None, seed: int = 0) -> Tensor:
    """Pictures (count, 1, 8, 8) in [0, 1] from a fine grid."""
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    grid = bd.TimeGrid("logsnr", 40, start=FIRST, end=LAST)
    return ink(bd.sample(model, noise, cond, solver=bd.DPMSolver(3), grid=grid).x0)


def as_scenes(pictures: Tensor) -> Tensor:
    """Ink (n, 1, 8, 8) in [0, 1] as the classifier knows digits: (n, 3, 64, 64) in [0, 1], black on white.

    The size, and the sharpened edges, are those of ``training/scenes.py``.
    """
    big = F.interpolate(F.pad(pictures, (2, 2, 2, 2)), size=78, mode="bicubic", align_corners=False)
    edge = (78 - SIZE) // 2
    mask = soft_mask(big[..., edge : edge + SIZE, edge : edge + SIZE])
    paint, ground = (torch.tensor(c).view(3, 1, 1) for c in (COLOURS["black"], FLAT["white"]))
    return ground * (1 - mask) + paint * mask


@torch.no_grad()
def read(pictures: Tensor) -> Tensor:
    """Which digit the shipped classifier reads in each picture (n, 1, 8, 8)."""
    net = _classifier()
    return torch.cat([net(as_scenes(part))["digit"].argmax(1) for part in pictures.split(200)])


@functools.cache
def _classifier() -> torch.nn.Module:
    return load_classifier()


def _nearest(pictures: Tensor, real: Tensor) -> float:
    """Median distance to the nearest real picture, in ink."""
    return float(torch.cdist(pictures.flatten(1), real.flatten(1)).amin(1).median())


def measure(model: bd.Denoiser, count: int = 1000) -> dict[str, str]:
    """The figures of the card."""
    network = model.network
    assert isinstance(network, DigitsNetwork)
    (seen, _), (held, answers) = real_digits(), real_digits(held_out=True)
    wanted = torch.arange(count) % 10
    named = drawn(model, count, F.one_hot(wanted, 10).float())
    free = drawn(model, count, seed=1)
    return {
        "squared error on v: held-in digits": f"{velocity_error(network, held_out=False):.4f}",
        "squared error on v: held-out digits": f"{velocity_error(network, held_out=True):.4f}",
        "the classifier reads the digit asked for, of 1,000": f"{(read(named) == wanted).double().mean():.1%}",
        "the classifier reads held-out real digits right": f"{(read(held) == answers).double().mean():.1%}",
        "median distance to the nearest held-in digit: 1,000 samples": f"{_nearest(free, seen):.3f}",
        "median distance to the nearest held-in digit: held-out digits": f"{_nearest(held, seen):.3f}",
    }
