"""One cell of the table: samples of one method at one number of steps, held against the real digits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training.digits import FIRST, LAST, as_scenes, ink
from training.scenes import real_digits

import backdrift as bd
from backdrift.pipelines.assets import folder, load_classifier, load_digits_denoiser
from backdrift.solvers import Solver

from ..frechet import Moments, frechet, with_error
from .methods import Method

CHUNK = 1000
"""Samples that go through the network together. The last bits may depend on it."""
FINE_STEPS = 120


@cache
def _trunk() -> torch.nn.Module:
    net = load_classifier()
    return torch.nn.Sequential(net.features, net.trunk).to(memory_format=torch.channels_last)


@torch.no_grad()
def classifier_features(pictures: Tensor) -> Tensor:
    """What the shipped classifier's three heads read: ink (n, 1, 8, 8) in [0, 1] -> (n, 128)."""
    scenes = (as_scenes(part).contiguous(memory_format=torch.channels_last) for part in pictures.split(100))
    return torch.cat([_trunk()(part * 2 - 1) for part in scenes])


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "classifier": classifier_features,
    "pixels": lambda pictures: pictures.flatten(1),
}


def digest(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Problem:
    """The shipped pixel model, noise to start from, and the real digits.

    Args:
        samples: how many; the same noises for every method.
        seed: of the noises.
        fine_steps: steps of DPM-Solver-3 that stand for the exact flow.
    """

    samples: int = 10_000
    seed: int = 0
    fine_steps: int = FINE_STEPS

    @property
    def settings(self) -> dict[str, Any]:
        """All that the figures depend on, beside the machine and the code."""
        return {
            "samples": self.samples,
            "seed": self.seed,
            "chunk": CHUNK,
            "times": [FIRST, LAST],
            "fine": f"DPM-Solver-3, {self.fine_steps} steps, log-SNR",
            "model": digest(folder("digits") / "model.safetensors"),
            "classifier": digest(folder("classifier") / "model.safetensors"),
            "real digits": {"held in": len(real_digits()[0]), "held out": len(real_digits(True)[0])},
        }

    @cached_property
    def model(self) -> bd.Denoiser:
        return load_digits_denoiser()

    @cached_property
    def noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.samples, 1, 8, 8, generator=generator)

    @cached_property
    def real(self) -> dict[str, Moments]:
        """Of the held-in digits, which the model was trained on."""
        return {name: Moments.of(features(real_digits()[0])) for name, features in FEATURES.items()}

    @cached_property
    def _seen(self) -> dict[str, dict[str, float]]:
        return {}

    @cached_property
    def fine(self) -> Tensor:
        """The end states of the flow from each noise."""
        states, _ = self.run(bd.DPMSolver(3), "exponential", "logsnr", self.fine_steps)
        return states

    @torch.no_grad()
    def run(
        self, solver: Solver, form: str, rule: str, steps: int, count: int | None = None
    ) -> tuple[Tensor, int]:
        """End states (n, 1, 8, 8), and the network calls each of them took."""
        grid = bd.TimeGrid(rule, steps, start=FIRST, end=LAST)
        found = [
            bd.sample(self.model, part, solver=solver, form=form, grid=grid)
            for part in self.noise[:count].split(CHUNK)
        ]
        return torch.cat([solution.x0 for solution in found]), found[0].nfe

    def quality(self, pictures: Tensor) -> dict[str, float]:
        """Squared Fréchet distances of pictures from the held-in digits, each with its standard error."""
        # AB4 within its start is RK4, bit for bit: the same pictures are not looked at again.
        key = hashlib.sha256(pictures.numpy().tobytes()).hexdigest()
        if key not in self._seen:
            self._seen[key] = {}
            for name, features in FEATURES.items():
                value, error = with_error(self.real[name], features(pictures))
                self._seen[key] |= {name: value, f"{name} error": error}
        return dict(self._seen[key])

    def cell(self, method: Method, rule: str, target: int) -> dict[str, Any]:
        """The figures of one method on one grid with about ``target`` network calls.

        ``rms`` is the root mean square distance of the end states' pixels (in [-1, 1]) from the exact flow's, from
        the same noises: the solver's own error, without the model's and without chance.
        """
        steps = method.steps(target)
        states, calls = self.run(method.solver, method.form, rule, steps)
        return {
            "calls": calls,
            "steps": steps,
            **self.quality(ink(states)),
            "rms": float((states - self.fine).double().square().mean().sqrt()),
        }

    def floors(self) -> dict[str, Any]:
        """What no solver can go below, and how exact the stand-in for the exact flow is.

        The check solves the *original* form by RK4, a method that shares neither form nor solver with the stand-in.
        """
        held_out = real_digits(held_out=True)[0]
        count = min(1000, self.samples)
        other, calls = self.run(bd.RK4(), "original", "logsnr", 2 * self.fine_steps, count)
        return {
            "held-out digits": self.quality(held_out),
            "two halves of the held-in digits": {
                name: self._halves(features) for name, features in FEATURES.items()
            },
            "exact flow": self.quality(ink(self.fine)),
            "exact flow's check": {
                "calls": calls,
                "samples": count,
                "rms": float((other - self.fine[:count]).double().square().mean().sqrt()),
            },
        }

    @staticmethod
    def _halves(features: Callable[[Tensor], Tensor]) -> float:
        real = features(real_digits()[0])
        shuffled = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
        a, b = shuffled.tensor_split(2)
        return frechet(Moments.of(a), Moments.of(b))
