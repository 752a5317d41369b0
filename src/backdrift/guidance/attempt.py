"""One attempt at one step: what a rule of guidance works with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..host import Evaluation, Host
from ..losses import Loss
from .estimate import Estimate, Estimator, Score
from .strengths import rms
from .trace import Entry


class Scoring(NamedTuple):
    """How clean samples are scored.

    Attributes:
        loss: pictures and prompts -> (B,).
        maximize: whether it is to rise.
        decode: clean samples -> pictures, in place of the host's own.
        preview: the longest side of the pictures kept for the trace; 0 for none.
        prompts: for the loss, one per sample or one for all, where the host knows none.
    """

    loss: Loss
    maximize: bool = False
    decode: Callable[[Tensor], Tensor] | None = None
    preview: int = 0
    prompts: list[str] | None = None

    def values(self, pictures: Tensor, prompts: list[str] | None) -> Tensor:
        """The loss (B,) of pictures (B, 3, H, W), or of videos (B, F, 3, H, W) as the mean over their frames.

        Args:
            prompts: the host's.
        """
        prompts = prompts or self.prompts
        count = len(pictures)
        if prompts is not None:  # a rehearsal has fewer pictures, or more
            prompts = prompts[:count] if len(prompts) > 1 else prompts * count
        if pictures.ndim != 5:
            return self.loss(pictures, prompts)
        frames = pictures.shape[1]
        each = None if prompts is None else [p for p in prompts for _ in range(frames)]
        return self.loss(pictures.flatten(0, 1), each).view(count, frames).mean(1)


@dataclass
class Attempt:
    """One attempt at one step of a host.

    Attributes:
        host: the step.
        x: the state at its beginning, (B, …): ``host.x``, or what time travel made of it.
        estimator: how clean samples are estimated.
        scoring: how they are scored.
        noise: draws standard normal numbers like a tensor, each sample's from a stream of its own.
        entry: what the trace notes.
    """

    host: Host
    x: Tensor
    estimator: Estimator
    scoring: Scoring
    noise: Callable[[Tensor], Tensor]
    entry: Entry
    _pictures: Tensor | None = field(default=None, init=False)

    @cached_property
    def evaluation(self) -> Evaluation:
        """What the network says at ``x``, without a graph; the sampler's own call, so made once."""
        found = self.host.evaluate(self.x)
        self.entry.t = found.t
        return found

    def score(self, x0: Tensor) -> Score:
        """The loss of clean samples (B, …) and its gradient by them, each sample's own; one decoding."""
        self.entry.decodes += 1
        with torch.enable_grad():
            leaf = x0.detach().requires_grad_()
            pictures = (self.scoring.decode or self.host.decode)(leaf)
            values = self.scoring.values(pictures, self.host.prompts)
            if not values.requires_grad:
                raise InputError(
                    f"the loss {self.scoring.loss.spec!r} does not depend on the picture in a way that gradients can "
                    "follow: it detaches, rounds, or runs under no_grad"
                )
            (pull,) = torch.autograd.grad(values.sum(), leaf)
        self._pictures = pictures.detach()
        values = values.detach()
        for quantity, value in (("the loss", values), ("the loss's gradient", pull)):
            if not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"{quantity} of {self.scoring.loss.spec!r} is NaN or infinite in step {self.host.index + 1} of "
                    f"{self.host.total}, attempt {self.entry.attempt + 1}"
                )
        return Score(values, -pull if self.scoring.maximize else pull)

    def estimate(self, x: Tensor | None = None, n: int = 1) -> Estimate:
        """The n-step estimate from ``x`` (the attempt's state), the loss there, and its pull on ``x``."""
        evaluation = self.evaluation if x is None else self.look(x)
        return self.estimator.pulled(self.host, evaluation, n, self.score, self.entry.calls)

    def clean(self, n: int) -> Tensor:
        """The n-step estimate alone, without a loss."""
        return self.estimator.clean(self.host, self.evaluation, n, self.entry.calls)

    def look(self, x: Tensor) -> Evaluation:
        """What the network says at another state of the step's beginning; one network call."""
        return self.host.evaluate(x)

    def take(self, evaluation: Evaluation | None = None) -> Tensor:
        """The sampler's own step from ``x``, as if the network had said ``evaluation``."""
        return self.host.step(self.x, self.evaluation if evaluation is None else evaluation)

    def pushed(self, following: Tensor, by: Tensor) -> Tensor:
        """The state after the step, moved by ``-by``, which is given in unit coordinates."""
        return following - (math.hypot(*self.host.end) * by).to(following.dtype)

    def randn(self) -> Tensor:
        """Standard normal numbers like ``x``."""
        return self.noise(self.x)

    @staticmethod
    def rms(x: Tensor) -> Tensor:
        """Root mean square of each sample, (B, 1, …)."""
        return rms(x)

    def note(
        self,
        *,
        loss: Tensor,
        strength: Tensor | None = None,
        pull: Tensor | None = None,
        n: int | None = None,
    ) -> None:
        """For the trace: the loss (B,), strengths, the pull (B, …), steps of the estimate."""
        entry = self.entry
        entry.loss = _numbers(loss)
        entry.strength = [] if strength is None else _numbers(strength)
        entry.pull = [] if pull is None else _numbers(rms(pull))
        entry.n = n
        if self.scoring.preview and self._pictures is not None:
            seen = self._pictures
            entry.see(seen[:, seen.shape[1] // 2] if seen.ndim == 5 else seen, self.scoring.preview)


Rule = Callable[[Attempt], Tensor]
"""A rule of guidance: the state after the step."""


def plain(attempt: Attempt) -> Tensor:
    """The rule that does not guide."""
    return attempt.take()


def _numbers(x: Tensor) -> list[float]:
    return [float(v) for v in x.detach().flatten().tolist()]
