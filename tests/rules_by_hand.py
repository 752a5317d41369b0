"""The rules of guidance as their papers write them, by arithmetic of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from analytic_host import picture, run
from backdrift.guidance import Guidance, presets
from backdrift.guidance.streams import stream
from problems import SCHEDULES, MixtureNetwork

SCALE = 2.5
COND = torch.tensor([[0.2, -0.1, 0.3], [0.0, 0.4, -0.2], [-0.3, 0.1, 0.2]], dtype=torch.float64)
START = torch.tensor([[0.9, -0.4, 0.7], [-0.3, 0.8, -1.1], [0.2, 1.3, 0.1]], dtype=torch.float64)
TARGET = torch.tensor([0.8, 0.3, 0.6], dtype=torch.float64).view(1, 3, 1, 1)
SEEDS = [3, 14, 15]


def loss(pictures: Tensor) -> Tensor:
    """Never negative, curved, coupling the three numbers."""
    off = (pictures - TARGET).flatten(1)
    return 4 * off.square().sum(1) + off.prod(1).sin().square() + off.sum(1).square()


@dataclass
class Case:
    """A setting: schedule, prediction, whether the host's alpha is 1, and the run's times."""

    schedule: str
    prediction: str
    exploding: bool
    times: tuple[float, ...]

    def how(self, rows: slice) -> dict[str, Any]:
        network = MixtureNetwork(SCHEDULES[self.schedule], self.prediction).requires_grad_(False)
        return {
            "network": network,
            "schedule": SCHEDULES[self.schedule],
            "prediction": self.prediction,
            "cond": COND[rows],
            "uncond": torch.zeros_like(COND[rows]),
            "guidance_scale": SCALE,
            "exploding": self.exploding,
        }


VP_TIMES, FLOW_TIMES = (0.8, 0.6, 0.35, 0.15, 0.0), (0.9, 0.7, 0.4, 0.1, 0.0)
CASES = {
    "vp-epsilon": Case("linear", "epsilon", False, VP_TIMES),
    "vp-v": Case("linear", "v_prediction", False, VP_TIMES),
    "vp-x0-exploding": Case("linear", "sample", True, VP_TIMES),
    "vp-epsilon-exploding": Case("linear", "epsilon", True, VP_TIMES),
    "flow": Case("flow", "flow_prediction", False, FLOW_TIMES),
    "edm-x0": Case("edm", "sample", False, (6.0, 2.0, 0.8, 0.2, 0.0)),
}
any_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Hand:
    """One sample's network and levels in the papers' notation: a[i] is the alpha-bar of node i."""

    def __init__(self, case: Case, row: int) -> None:
        schedule = SCHEDULES[case.schedule]
        pairs = [(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in case.times]
        self.size = [math.hypot(*pair) for pair in pairs]
        self.a = [(alpha / size) ** 2 for (alpha, _), size in zip(pairs, self.size, strict=True)]
        self.network = MixtureNetwork(schedule, "epsilon").requires_grad_(False)
        self.times, self.cond = case.times, COND[row : row + 1]
        self.generator = stream(SEEDS[row])

    def halves(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        z, t = self.size[i] * x, torch.full((1,), self.times[i], dtype=torch.float64)
        return self.network(z, t, torch.zeros_like(self.cond)), self.network(z, t, self.cond)

    def eps(self, x: Tensor, i: int) -> Tensor:
        without, with_it = self.halves(x, i)
        return without + SCALE * (with_it - without)

    def x0(self, x: Tensor, i: int) -> Tensor:
        return (x - (1 - self.a[i]) ** 0.5 * self.eps(x, i)) / self.a[i] ** 0.5

    def ddim(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        x0 = (x - (1 - self.a[i]) ** 0.5 * eps) / self.a[i] ** 0.5
        return self.a[i + 1] ** 0.5 * x0 + (1 - self.a[i + 1]) ** 0.5 * eps

    def noise(self) -> Tensor:
        return torch.randn(3, generator=self.generator, dtype=torch.float64)[None]

    def back(self, x_prev: Tensor, i: int) -> Tensor:
        ratio = self.a[i] / self.a[i + 1]
        return ratio**0.5 * x_prev + (1 - ratio) ** 0.5 * self.noise()


def energy(x0: Tensor) -> Tensor:
    return loss(picture(x0)).sum()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


Step = Callable[[Hand, Tensor, int], Tensor]


def by_hand(case: Case, step: Step, repeats: int = 1) -> Tensor:
    """The guided runs' last states, one sample after the other, with a paper's time travel around its step."""
    ends = []
    for row in range(3):
        hand, x = Hand(case, row), START[row : row + 1]
        for i in range(len(case.times) - 1):
            for again in range(repeats):
                if again:
                    x = hand.back(x_prev, i)  # noqa: F821
                x_prev = step(hand, x, i).detach()
            x = x_prev
        ends.append(x)
    return torch.cat(ends)


def freedom(hand: Hand, x: Tensor, i: int) -> Tensor:
    without, with_it = hand.halves(x, i)
    g = gradient(lambda x: energy(hand.x0(x, i)), x)
    rho = 0.2 * SCALE * rms(with_it - without) / rms(g)
    return hand.ddim(x, hand.eps(x, i), i) - rho * g


def dps(hand: Hand, x: Tensor, i: int, zeta: float = 0.4) -> Tensor:
    norm = gradient(lambda x: energy(hand.x0(x, i)).sqrt(), x)
    return hand.ddim(x, hand.eps(x, i), i) - 2 * zeta * norm


def lgd(
    hand: Hand, x: Tensor, i: int, strength: float = 0.3, samples: int = 5, spread: float = 1.0
) -> Tensor:
    s = ((1 - hand.a[i]) / hand.a[i]) ** 0.5
    draws = [spread * s / (1 + s**2) ** 0.5 * hand.noise() for _ in range(samples)]

    def likelihood(x: Tensor) -> Tensor:
        x0 = hand.x0(x, i)
        return torch.stack([torch.exp(-energy(x0 + d)) for d in draws]).mean().log()

    return hand.ddim(x, hand.eps(x, i), i) + strength * gradient(likelihood, x)


def universal(
    hand: Hand, x: Tensor, i: int, weight: float = 0.7, backward: int = 3, rate: float = 0.05
) -> Tensor:
    eps, x0 = hand.eps(x, i), hand.x0(x, i)
    eps_hat = eps + weight * (1 - hand.a[i]) ** 0.5 * gradient(lambda x: energy(hand.x0(x, i)), x)
    delta = torch.zeros_like(x)
    for _ in range(backward):
        delta = delta - rate * gradient(lambda d: energy(x0 + d), delta)
    eps_hat = eps_hat - (hand.a[i] / (1 - hand.a[i])) ** 0.5 * delta
    return hand.ddim(x, eps_hat, i)


def mpgd(hand: Hand, x: Tensor, i: int, strength: float, kept: bool) -> Tensor:
    without, with_it = hand.halves(x, i)
    x0 = hand.x0(x, i)
    g = gradient(energy, x0)
    moved = x0 - strength * SCALE * rms(with_it - without) / rms(g) * g
    eps = hand.eps(x, i) if kept else (x - hand.a[i] ** 0.5 * moved) / (1 - hand.a[i]) ** 0.5
    return hand.a[i + 1] ** 0.5 * moved + (1 - hand.a[i + 1]) ** 0.5 * eps


def tfg(
    hand: Hand, x: Tensor, i: int, *, growth: str, rho: float = 0.2, mu: float = 0.3, samples: int = 3
) -> Tensor:
    ratios = torch.tensor([p / q for p, q in zip(hand.a[:-1], hand.a[1:], strict=True)], dtype=torch.float64)
    weights = {"increase": ratios, "decrease": 1 - ratios, "constant": torch.ones_like(ratios)}[growth]
    w = float(weights[i] / weights.mean())
    draws = [0.6 * (1 - hand.a[i]) ** 0.5 * hand.noise() for _ in range(samples)]

    def log_f(x0: Tensor) -> Tensor:
        return torch.logsumexp(torch.stack([-energy(x0 + d) for d in draws]), 0) - math.log(samples)

    delta_t = rho * w * gradient(lambda x: log_f(hand.x0(x, i)), x)
    x0, delta_0 = hand.x0(x, i), torch.zeros_like(x)
    for _ in range(4):
        delta_0 = delta_0 + mu * w * gradient(log_f, x0 + delta_0)
    following = hand.ddim(x, hand.eps(x, i), i)
    return following + delta_t / float(ratios[i]) ** 0.5 + hand.a[i + 1] ** 0.5 * delta_0


def guided(case: Case, guidance: Guidance, rows: slice = slice(None)) -> Tensor:
    """The guided run's last state."""
    return run(guidance, START[rows], case.times, **case.how(rows))[-1]


ALL = {"start": 0.0, "stop": 1.0, "seed": SEEDS}
RULES: dict[str, tuple[Callable[..., Guidance], Step]] = {
    "freedom": (lambda **k: presets.FreeDoM(loss, **k), freedom),
    "dps": (lambda **k: presets.DPS(loss, 0.4, **k), dps),
    "lgd": (lambda **k: presets.LGD(loss, 0.3, samples=5, **k), lgd),
    "universal": (lambda **k: presets.UniversalGuidance(loss, 0.7, 3, 0.05, **k), universal),
    "universal-forward": (
        lambda **k: presets.UniversalGuidance(loss, 0.7, **k),
        lambda *a: universal(*a, backward=0),
    ),
    "universal-backward": (
        lambda **k: presets.UniversalGuidance(loss, 0.0, 3, 0.05, **k),
        lambda *a: universal(*a, weight=0.0),
    ),
    "mpgd-kept": (
        lambda **k: presets.MPGD(loss, 0.3, "kept", **k),
        lambda *a: mpgd(*a, strength=0.3, kept=True),
    ),
    "mpgd-recomputed": (
        lambda **k: presets.MPGD(loss, 1.5, "recomputed", **k),
        lambda *a: mpgd(*a, strength=1.5, kept=False),
    ),
    "tfg-increase": (
        lambda **k: presets.TFG(loss, 0.2, 0.3, 0.6, samples=3, **k),
        lambda *a: tfg(*a, growth="increase"),
    ),
    "tfg-decrease": (
        lambda **k: presets.TFG(
            loss, 0.2, 0.3, 0.6, samples=3, rho_schedule="decrease", mu_schedule="decrease", **k
        ),
        lambda *a: tfg(*a, growth="decrease"),
    ),
    "tfg-constant": (
        lambda **k: presets.TFG(
            loss, 0.2, 0.3, 0.6, samples=3, rho_schedule="constant", mu_schedule="constant", **k
        ),
        lambda *a: tfg(*a, growth="constant"),
    ),
}
any_rule = pytest.mark.parametrize("rule", RULES)
