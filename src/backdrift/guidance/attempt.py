"""One attempt at one step: what a rule of guidance works with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from ..errors import NonFiniteError
from ..host import Evaluation, Host
from .estimate import Estimate, Estimator
from .scoring import Score, Scoring
from .strengths import rms
from .trace import Entry


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
        host = self.host
        found = self.scoring.score(x0, host.decode, host.prompts, ranged=host.ranged)
        self._pictures = found.pictures
        self._check_finite("the loss", found.values)
        self._check_finite("the loss's gradient", found.pull)
        return found

    def estimate(self, x: Tensor | None = None, n: int = 1) -> Estimate:
        """The n-step estimate from ``x`` (the attempt's state), the loss there, and its pull on ``x``."""
        return self.pulled(n, self.score, x)

    def pulled(self, n: int, score: Callable[[Tensor], Score], x: Tensor | None = None) -> Estimate:
        """The same, scored by ``score``."""
        evaluation = self.evaluation if x is None else self.look(x)
        found = self.estimator.pulled(self.host, evaluation, n, score, self.entry.calls)
        self._check_finite("the loss's gradient through the network", found.pull)
        return found

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
        n: int | list[int] | None = None,
    ) -> None:
        """For the trace: the loss (B,), strengths, the pull (B, …), steps of the estimate, each sample's or all's."""
        entry = self.entry
        entry.loss = _numbers(loss)
        entry.strength = [] if strength is None else _numbers(strength)
        entry.pull = [] if pull is None else _numbers(rms(pull))
        entry.n = n
        if self.scoring.preview and self._pictures is not None:
            seen = self._pictures
            entry.see(seen[:, seen.shape[1] // 2] if seen.ndim == 5 else seen, self.scoring.preview)

    def _check_finite(self, what: str, values: Tensor) -> None:
        sound = values.reshape(len(values), -1).isfinite().all(1).tolist()
        bad = [i for i, fine in enumerate(sound) if not fine]
        if bad:
            which = (
                f" of sample {', '.join(map(str, bad))} (of {len(values)}, from 0)" if len(values) > 1 else ""
            )
            raise NonFiniteError(
                f"{what}{which} is NaN or infinite in step {self.host.index + 1} of {self.host.total}, attempt "
                f"{self.entry.attempt + 1}; the loss is {self.scoring.loss.spec!r}"
            )


Rule = Callable[[Attempt], Tensor]
"""A rule of guidance: the state after the step."""


def plain(attempt: Attempt) -> Tensor:
    """The rule that does not guide."""
    return attempt.take()


def _numbers(x: Tensor) -> list[float]:
    return [float(v) for v in x.detach().flatten().tolist()]
