"""What guidance did: one entry for each attempt at a guided step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..pictures import to_levels
from .estimate import Calls


@dataclass
class Entry:
    """One attempt at a guided step.

    Attributes:
        index: the step, from 0.
        attempt: from 0; more than one where the step is taken again (time travel).
        t: the time in the model's schedule.
        n: steps of the estimate, one number or (B,) where they differ; None for rules without one.
        loss: (B,), of the estimate's picture, as the loss gives it (also where it is maximised).
        strength: (B,), the numbers by which the pull was multiplied.
        pull: (B,), root mean square of the pull, in unit coordinates.
        calls: network calls of the attempt: the sampler's own and the estimates'.
        decodes: pictures' decodings (each with one loss and one gradient).
        preview: (B, 3, H, W) uint8, the estimate's pictures, clamped; where a strip is asked for.
        seconds: wall time.
    """

    index: int
    attempt: int
    t: float = 0.0
    n: int | list[int] | None = None
    loss: list[float] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)
    pull: list[float] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    decodes: int = 0
    preview: Tensor | None = None
    seconds: float = 0.0

    def see(self, pictures: Tensor, size: int) -> None:
        """Keep pictures (B, 3, H, W), made no larger than ``size``."""
        small = pictures.detach().float()
        longest = max(small.shape[-2:])
        if longest > size:
            small = torch.nn.functional.interpolate(
                small, scale_factor=size / longest, mode="bilinear", antialias=True
            )
        self.preview = to_levels(small)

    def as_dict(self) -> dict[str, Any]:
        """The entry as plain numbers, without the picture."""
        return {
            "index": self.index,
            "attempt": self.attempt,
            "t": self.t,
            "n": self.n,
            "loss": self.loss,
            "strength": self.strength,
            "pull": self.pull,
            "calls_forward": self.calls.forward,
            "calls_redone": self.calls.redone,
            "vjps": self.calls.vjps,
            "decodes": self.decodes,
            "seconds": self.seconds,
        }


@dataclass
class GuidanceTrace:
    """What guidance did in one run.

    Attributes:
        entries: one for each attempt at a guided step, in order.
        total: steps of the run.
        plain_calls: network calls in steps and attempts without guidance.
    """

    total: int = 0
    entries: list[Entry] = field(default_factory=list)
    plain_calls: int = 0

    @property
    def calls(self) -> Calls:
        """Network calls of the whole run."""
        return Calls(
            self.plain_calls + sum(e.calls.forward for e in self.entries),
            sum(e.calls.redone for e in self.entries),
            sum(e.calls.vjps for e in self.entries),
        )

    @property
    def decodes(self) -> int:
        """Decodings of estimates."""
        return sum(e.decodes for e in self.entries)

    @property
    def loss(self) -> list[list[float]]:
        """For each guided step the losses (B,) of its last attempt."""
        return [e.loss for e in self.last_attempts]

    @property
    def last_attempts(self) -> list[Entry]:
        """The entries that led on."""
        return list({e.index: e for e in self.entries}.values())

    def strip(self, sample: int = 0) -> Tensor | None:
        """The estimates of one sample along the guided steps, (K, 3, H, W) uint8; None if none were kept."""
        kept = [e.preview[sample] for e in self.last_attempts if e.preview is not None]
        return torch.stack(kept) if kept else None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for a record."""
        calls = self.calls
        return {
            "total": self.total,
            "calls_forward": calls.forward,
            "calls_redone": calls.redone,
            "vjps": calls.vjps,
            "decodes": self.decodes,
            "entries": [e.as_dict() for e in self.entries],
        }
