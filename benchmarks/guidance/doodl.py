"""DOODL (Wallace et al., ICCV 2023): the noise itself is optimised, through a whole reversible run.

As its authors' code does it: EDICT with p = 0.93 over 50 steps; the loss of both members of the last pair, summed;
minus half its gradient by the pair at the noise, averaged over the two (tied), each element clipped to 1e-3; SGD with
momentum 0.9; a perturbation of 1e-4 N(0, I); and each noise scaled back to the norm it began with. Their rate is 1, for
50 optimisation steps; with few, a rate of 1 cannot move the noise by more than a thousandth a step, so it is searched
for here and multiplies the clipped gradient. The multi-crop of their losses is left out, as for the other methods.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import backdrift as bd
from backdrift.guidance.estimate import Calls
from backdrift.losses import Loss
from backdrift.solvers import Pair

CLIPPED, PERTURBATION, MOMENTUM = 1e-3, 1e-4, 0.9
P = 0.93


@dataclass
class Optimised:
    """What came out.

    Attributes:
        images: (B, 3, H, W), not clamped.
        losses: (steps, B), before each optimisation step, of the pair's mean.
        calls, decodes: counted.
    """

    images: Tensor
    losses: list[list[float]] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    decodes: int = 0


@dataclass(frozen=True)
class Doodl:
    """The optimiser of the noise.

    Args:
        model, cond: from :func:`backdrift.as_denoiser`.
        grid: of the reversible run.
        decode: clean latents -> pictures in [0, 1], differentiable.
        loss: pictures -> (B,).
        rate: multiplies the clipped gradient.
        steps: of optimisation.
        seed: of the perturbations.
    """

    model: bd.Denoiser
    cond: Any
    grid: bd.TimeGrid
    decode: Callable[[Tensor], Tensor]
    loss: Loss
    rate: float = 1.0
    steps: int = 50
    seed: int = 0

    def __call__(self, noise: Tensor) -> Optimised:
        """The pictures of the optimised noise."""
        found, generator = Optimised(noise), torch.Generator().manual_seed(self.seed)
        x, momentum = noise.clone(), torch.zeros_like(noise)
        size = _norms(noise)
        for _ in range(self.steps):
            gradient = self._gradient(x, found).clamp(-CLIPPED, CLIPPED)
            momentum = MOMENTUM * momentum + gradient
            perturbation = PERTURBATION * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x - self.rate * momentum + perturbation
            x = x * size / _norms(x)
        with torch.no_grad():
            solution = self._run(x)
            found.calls.forward += solution.stats.calls_forward
            found.images = self.decode(solution.x0)
        return found

    def _gradient(self, x: Tensor, found: Optimised) -> Tensor:
        """Half the gradient of both members' summed losses by the pair, averaged over the two; (B, …)."""
        pair = Pair(*(x.clone().requires_grad_() for _ in range(2)))
        solution = self._run(pair)
        assert solution.pair is not None
        total, pulls, values = [*solution.pair], [], []
        for member in total:  # one decoder's graph at a time
            leaf = member.detach().requires_grad_()
            value = self.loss(self.decode(leaf))
            pulls.append(torch.autograd.grad(value.sum(), leaf)[0])
            values.append(value.detach())
        first, second = torch.autograd.grad(total, [*pair], pulls)
        stats = solution.stats
        found.calls.forward += stats.calls_forward
        found.calls.redone += stats.calls_redone
        found.calls.vjps += stats.vjps
        found.decodes += 2
        found.losses.append([float(v) for v in sum(values) / 2])
        return 0.5 * (first + second) / 2

    def _run(self, x: Tensor | Pair) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # float32 states drift; far below what is clipped away
            return bd.sample(
                self.model,
                x,
                self.cond,
                solver=bd.EDICT(P),
                grid=self.grid,
                gradient=bd.Reversible(1e300),
            )


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
