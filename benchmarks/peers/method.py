"""What a method is to the benchmark: a name, a knob that trades accuracy for cost, and the work prepared to be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .work import Work

Gradients = dict[str, Tensor]


class Counts(NamedTuple):
    """What one gradient took: see :mod:`benchmarks.peers.work` for the rule."""

    calls: int
    products: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.calls + self.products


class Job(NamedTuple):
    """A method ready for one work and one setting.

    Attributes:
        differentiate: does the work once and leaves its result behind. Only this is timed.
        gradients: what it left.
        counts: of the run before (of one like it).
        counted: does the same where counting would disturb the time; None where it does not.
        peak_bytes: of one run where that is known without measuring (compiled programs); else None.
    """

    differentiate: Callable[[], None]
    gradients: Callable[[], Gradients]
    counts: Callable[[], Counts]
    counted: Callable[[], None] | None = None
    peak_bytes: Callable[[], int] | None = None


@dataclass(frozen=True)
class Method:
    """One way to have the gradient.

    Attributes:
        package: whose it is: ``"backdrift"``, or a peer.
        name: the gradient method.
        setting: solver, clock and nodes.
        prepare: makes the job from a work and the knob's value.
        knob: ``"steps"``, or ``"tolerance"``.
        sampler: the solver whose steps on log-SNR nodes of the exponential form it takes, if it does: plain autograd
            through them is what an exact method must equal.
    """

    package: str
    name: str
    setting: str
    prepare: Callable[[Work, float], Job]
    knob: str = "steps"
    sampler: str | None = None

    @property
    def key(self) -> str:
        """What it is called in results."""
        return f"{self.package} | {self.name} | {self.setting}"


def of_torch(
    package: str,
    name: str,
    setting: str,
    run: Callable[[Work, float], Tensor],
    *,
    knob: str = "steps",
    sampler: str | None = None,
) -> Method:
    """A method in PyTorch, from ``run(work, knob)``, which gives the finished state with its graph."""

    def prepare(work: Work, value: float) -> Job:
        def differentiate() -> None:
            work.clear()
            work.loss(run(work, value)).backward()

        counts = lambda: Counts(work.network.calls, work.network.products)  # noqa: E731
        return Job(differentiate, work.gradients, counts)

    return Method(package, name, setting, prepare, knob, sampler)
