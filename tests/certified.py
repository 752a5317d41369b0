"""Certificates on the mixture, of right gradients and of wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import backdrift as bd
from backdrift.gradients import GradientMethod, Job
from backdrift.solvers import State
from backdrift.verification.rows import Row
from problems import SCHEDULES, MixtureNetwork, condition, start_state

GRID = bd.TimeGrid("logsnr", 2, start=0.6, end=0.05)
SCHEDULE = SCHEDULES["linear"]


def loss(x0: Tensor) -> Tensor:
    """One value per sample."""
    return (torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64) * x0 + 0.3 * x0**2).sum(1)


class Wrong(GradientMethod):
    """A test double: the right gradient, 5 % too long."""

    def __init__(self) -> None:
        self.inner = bd.Plain()

    def __repr__(self) -> str:
        return "Wrong()"

    def run(self, job: Job) -> Iterator[State]:
        states = list(self.inner.run(job))
        yield from states[:-1]
        yield _Scaled.apply(states[-1])


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.05 * grad


class ClaimsExact(bd.Exact):
    """A test double that is of a kind that claims the sampler's own gradient."""

    def run(self, job: Job) -> Iterator[State]:
        states = list(super().run(job))
        yield from states[:-1]
        yield _Scaled.apply(states[-1])


def mixture(**settings: Any) -> bd.Certificate:
    """A certificate of wide Gaussians, mixed."""
    network = MixtureNetwork(SCHEDULE, "epsilon", width=1.0).requires_grad_(False)
    model = bd.Denoiser(network, SCHEDULE)
    start = {"x_T": start_state(SCHEDULE, 0.6), "cond": condition()}
    return bd.verify(model, **{"loss": loss, "grid": GRID, "progress": False, **start, **settings})


def rows(certificate: bd.Certificate, name: str) -> list[Row]:
    return [row for row in certificate.rows if row.name == name]


def one(certificate: bd.Certificate, name: str, steps: int) -> Row:
    (row,) = [row for row in rows(certificate, name) if row.steps == steps]
    return row


def relative(found: Tensor, known: Tensor) -> float:
    return float((found - known).norm() / known.norm())
