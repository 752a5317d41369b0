"""What a gradient method is: a way to carry out one run so that a loss on its states can be differentiated.

There are two kinds, and a method is one of them by what it defines.

* **Call by call** (``Plain``, ``Exact``): :meth:`GradientMethod.begin` gives the evaluation ``call(x, t)``, and the
  time loop, :meth:`~backdrift.integrate.Plan.states`, is the plan's own. The gradient is that of the steps as computed.
* **Whole run** (continuous, symplectic, reversible adjoints): :meth:`GradientMethod.run` is given the :class:`Job`
  and yields the states itself; its backward pass is a sweep of its own over the intervals.

:meth:`GradientMethod.run` is what ``sample`` calls; the default one makes a whole run out of ``begin``. A whole-run
method yields the plan's states one by one, in order, one per interval. With ``job.trajectory`` each is handed to the
user, so each must be on the path to the next, with its gradient; without it only the last needs a graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UnsupportedError
from ..integrate import Plan
from ..solvers import Pair, State
from ..stats import RunStats
from ..trace import Watch
from .truncated import states as truncated

if TYPE_CHECKING:
    from .taken import Taken


@dataclass(frozen=True)
class Job:
    """One run to be carried out.

    Attributes:
        plan: solver, form and grid.
        model: the denoiser.
        x: the state at the first node (B, …); its batch and device are the run's.
        cond: the conditioning (:mod:`backdrift.conditioning`).
        stats: counts are added here, also by later backward passes.
        trajectory: whether the states at all nodes are handed to the user, who may differentiate by each.
        check_finite: whether a backward pass looks for NaN and infinity.
        pair: the state where the run starts, for a reversible solver; ``x`` is its first member.
        watch: which steps carry the gradient, and what measures it on its way; None for all, and no measure. Methods
            that act on whole runs are given None.
        taken: the forward pass, where :meth:`GradientMethod.settled` has made it.
    """

    plan: Plan
    model: Denoiser
    x: Tensor
    cond: Any
    stats: RunStats
    trajectory: bool = False
    check_finite: bool = True
    pair: Pair | None = None
    watch: Watch | None = None
    taken: Taken | None = None


def search(job: Job) -> tuple[Job, list[Tensor]]:
    """The job on the steps that its adaptive solver accepts, and the states found with them, without a graph."""
    before = job.model.nfe
    found = job.plan.settled(job.x, lambda x, t: job.model.output(x, t, job.cond))
    job.stats.calls_forward += job.model.nfe - before
    return replace(job, plan=found.plan), found.states


class Evaluator(ABC):
    """The evaluations of one run, made call by call.

    Attributes:
        interval: the interval being stepped; set by the run.
    """

    interval: int = 0

    @abstractmethod
    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The network's guided output at the state ``x`` (B, …) and time ``t``, of x's shape."""


class GradientMethod:
    """How the gradient of a run is had. Define :meth:`begin` or :meth:`run` (see the module's text).

    Attributes:
        takes_pairs: whether the method can start from a reversible solver's pair of two different states.
        by_times: whether it gives the gradient by the grid's times (``plan.graph``).
        transforms: whether it works inside ``torch.func`` transforms.
    """

    takes_pairs: bool = False
    by_times: bool = False
    transforms: bool = False

    @property
    def by_calls(self) -> bool:
        """Whether it acts call by call, so that some steps can be left out of the gradient."""
        return type(self).run is GradientMethod.run

    def settled(self, job: Job) -> Job:
        """The job of an adaptive solver on the steps that it accepts, which are looked for without a graph.

        A method that takes that search for its forward pass hands it to its run as ``job.taken``.
        """
        return search(job)[0]

    def begin(self, model: Denoiser, x: Tensor, cond: Any, evaluations: int, stats: RunStats) -> Evaluator:
        """The evaluation ``call(x, t)`` to use throughout one run of the plan's own time loop.

        Args:
            model: the denoiser.
            x: the run's first state; its batch and device are the run's.
            cond: the conditioning.
            evaluations: how many evaluations the run will make.
            stats: counts are added here, also by later backward passes.

        Raises:
            UnsupportedError: the method acts on whole runs.
        """
        raise UnsupportedError(
            f"{self!r} acts on a whole run, not call by call: use it as sample(gradient=...)"
        )

    def run(self, job: Job) -> Iterator[State]:
        """The states at the nodes after the first, one by one, each with the graph its gradient needs.

        A method that takes pairs yields a reversible solver's pairs; another one yields their first members.

        Raises:
            InputError: the method cannot be used with the job's solver or form.
        """
        plan, watch = job.plan, job.watch
        made = plan.evaluations if watch is None else plan.evaluations_in(watch.chosen.steps)
        call = self.begin(job.model, job.x, job.cond, made, job.stats)
        if watch is not None:
            yield from truncated(job, call, watch)
            return

        def enter(interval: int) -> None:
            call.interval = interval

        if job.pair is not None:
            yield from plan.pairs(job.pair, call, enter)
            return
        states = plan.states(job.x, call)
        for index in range(len(plan.intervals)):
            enter(index)
            yield next(states)
