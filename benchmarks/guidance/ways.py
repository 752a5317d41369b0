"""The methods that are compared, each with one strength w that means about the same in all of them.

For SAG and FreeDoM w is theirs: a guided step moves the state by w s RMS(eps_c - eps_0). Universal Guidance's weight
and TFG's rho (with mu = 8 rho as published) carry the loss's scale, so they are given as w times a unit
(:class:`Scales`): the number at which their mean move over a run's DDIM steps is that of SAG at w = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

import backdrift as bd
from backdrift.guidance import Attempt, Guidance
from backdrift.guidance.attempt import plain
from backdrift.guidance.rules.tfg import weight
from backdrift.guidance.when import When
from backdrift.losses import Loss

UNGUIDED, SAG, FREEDOM, UNIVERSAL, TFG, DOODL = "unguided", "SAG", "FreeDoM", "UG", "TFG", "DOODL"
EVERYWHERE = (UNIVERSAL,)
"""Rules that guide every step; the others a part of the run (TFG, too: all steps would cost more than SAG)."""
ITERATIONS = 4
MU = 8.0  # TFG's published 2 over its rho of 0.25


class Scales(NamedTuple):
    """The weight of Universal Guidance and TFG's rho that w = 1 stands for."""

    universal: float = 1.0
    tfg: float = 1.0


@dataclass(frozen=True)
class Way:
    """One method at its settings.

    Attributes:
        rule: see above.
        w: strength; of DOODL its rate.
        attempts: at all guided steps together; 0 for one at each; with fewer than there are steps in the range, so many
            of them are guided, spread evenly. Of DOODL: optimisation steps.
        n: steps of the estimate.
        start, stop: the guided part of the run.
        subgrid: of the estimate.
    """

    rule: str
    w: float = 0.0
    attempts: int = 0
    n: int = 1
    start: float = 0.3
    stop: float = 0.7
    subgrid: str = "paper"

    @property
    def key(self) -> dict[str, Any]:
        """For the results file; what is as usual is left out."""
        usual = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if k == "rule" or v != usual[k]}

    def guided(self, total: int) -> list[int]:
        """The guided steps of a run."""
        when = When(0.0, 1.0) if self.rule in EVERYWHERE else When(self.start, self.stop)
        found = when.guided(total)
        few = self.attempts or len(found)
        return found if few >= len(found) else [found[k * len(found) // few] for k in range(few)]

    def repeats(self, total: int) -> list[int]:
        """How often each step of a run is taken: as evenly as can be, the first ones once more."""
        guided = self.guided(total)
        base, extra = divmod(self.attempts or len(guided), len(guided))
        taken = [1] * total
        for place, index in enumerate(guided):
            taken[index] = base + (place < extra)
        return taken

    def guidance(self, loss: Loss, total: int, seed: int, scales: Scales) -> Guidance:
        """The object that guides a run of ``total`` steps.

        Raises:
            ValueError: a rule that guides no run.
        """
        many = self.repeats(total)
        if self.rule == UNGUIDED:
            return Guidance(plain, loss, start=0.0, stop=1.0)
        shared: dict[str, Any] = {
            "steps": self.guided(total),
            "repeats": many,
            "seed": seed,
        }
        if self.rule == SAG:
            return bd.SymplecticAdjointGuidance(loss, self.n, strength=self.w, subgrid=self.subgrid, **shared)
        if self.rule == FREEDOM:
            return bd.guidance.FreeDoM(loss, self.w, **shared)
        if self.rule == UNIVERSAL:
            return bd.guidance.UniversalGuidance(loss, self.w * scales.universal, **shared)
        if self.rule == TFG:
            rho = self.w * scales.tfg
            return bd.guidance.TFG(loss, rho, MU * rho, iterations=ITERATIONS, **shared)
        raise ValueError(f"{self.rule} guides no run")


class Moves:
    """A rule that lets the sampler do as it would and notes how far the others would have moved it."""

    def __init__(self) -> None:
        self.sag: list[float] = []
        self.universal: list[float] = []
        self.tfg: list[float] = []

    def __call__(self, attempt: Attempt) -> Tensor:
        host, found = attempt.host, attempt.estimate(n=1)
        by_x0 = attempt.score(attempt.evaluation.x0)
        start, end = host.start, host.end
        unit = (start.alpha**2 + start.sigma**2) ** 0.5
        more = attempt.evaluation.difference("epsilon")
        size = attempt.evaluation.eps if more is None else attempt.evaluation.guidance_scale * more
        self.sag.append(_mean(attempt, size))
        pull = _mean(attempt, found.pull)
        level = start.sigma / unit
        slope = end.alpha * start.sigma / start.alpha - end.sigma
        self.universal.append(slope * level * pull)
        growth = weight("increase", host)
        kept = (start.alpha / unit) / (end.alpha / (end.alpha**2 + end.sigma**2) ** 0.5)
        self.tfg.append(growth * (pull / kept + MU * ITERATIONS * end.alpha * _mean(attempt, by_x0.pull)))
        attempt.note(loss=found.values, n=1)
        return attempt.take()

    def scales(self, guided: Sequence[int]) -> Scales:
        """From a run with every step watched: means over the steps that each would guide."""
        ours, tfg = (sum(moves[i] for i in guided) / len(guided) for moves in (self.sag, self.tfg))
        return Scales(ours * len(self.universal) / sum(self.universal), ours / tfg)


def _mean(attempt: Attempt, x: Tensor) -> float:
    return float(attempt.rms(x).mean())


@torch.no_grad()
def mean_scales(found: Sequence[Scales]) -> Scales:
    """The geometric mean."""
    logs = torch.tensor(found, dtype=torch.float64).log().mean(0).exp()
    return Scales(*logs.tolist())
