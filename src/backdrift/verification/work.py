"""The measuring itself: every method, solver and number of steps, one row after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..budget import available_bytes
from ..errors import BackdriftError, NonFiniteError
from ..gradients import Exact, GradientMethod, Plain
from ..integrate import Plan
from .differences import Slopes, finite_differences
from .flow import FlowGradient
from .menu import Entry
from .problem import Problem
from .pull import Difference, Pulled, adjoint_norms, peak_bytes, pull
from .rows import Row
from .sampler import Sampler


@dataclass
class Sampled:
    """The references of one sampler.

    Attributes:
        sampler: the sampler.
        plan: its plan on the model.
        yardstick: its own gradient, by plain autograd where that fits in memory.
        plain: whether it does.
        slopes: finite differences; None where none were made.
        rounding: relative difference of the yardstick to the same in float64.
        checked: mismatch of the float64 gradient with the finite differences.
    """

    sampler: Sampler
    plan: Plan
    yardstick: Pulled
    plain: bool
    slopes: Slopes | None = None
    rounding: float | None = None
    checked: float | None = None


@dataclass
class Work:
    """What is measured, and what came out so far.

    Attributes:
        problem: what is differentiated.
        samplers: of each solver its samplers, the fewest steps first; the last is the one asked about.
        entries: the methods.
        directions: of finite differences.
        seed: of their directions.
        rows: the results.
        notes: what could not be measured, and why.
        sampled: the references by solver and steps.
    """

    problem: Problem
    samplers: list[list[Sampler]]
    entries: list[Entry]
    directions: int
    seed: int
    rows: list[Row] = field(default_factory=list)
    pulled: list[Pulled | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sampled: dict[tuple[str, int], Sampled] = field(default_factory=dict)
    _held: float | None = None

    @property
    def parts(self) -> int:
        """How many things :meth:`steps` will announce."""
        couples = any(entry.couples for entry in self.entries)
        counts = sum(len(group) for group in self.samplers)
        return counts * (len(self.entries) + 1 + couples) + (1 + couples) * len(self.samplers)

    def steps(self) -> Iterator[str]:
        """Measure; yields what is being done."""
        for group in self.samplers:
            for sampler in group:
                asked = sampler is group[-1]
                yield from self._references(sampler, asked)
                for entry in self.entries:
                    yield f"{entry.name}, {sampler.name}"
                    try:
                        own = Sampler(entry.solver(sampler.solver), sampler.form, sampler.grid)
                        if own.key not in self.sampled:
                            yield from self._references(own, asked)
                    except (
                        BackdriftError
                    ) as error:  # the solver has no reversible coupling, or that does not run here
                        row = self._row(entry, self.sampled[sampler.key], asked)
                        row.verdict = "failed" if isinstance(error, NonFiniteError) else "refused"
                        row.reason = str(error)
                        continue
                    self._measure(entry, own, asked)

    def _references(self, sampler: Sampler, asked: bool) -> Iterator[str]:
        yield f"plain autograd, {sampler.name}"
        plan = sampler.plan(self.problem.model)
        plain = self._plain_fits(sampler, plan)
        method = Plain() if plain else Exact("min")
        yardstick = pull(self.problem, sampler, method)
        found = Sampled(sampler, plan, yardstick, plain)
        self.sampled[sampler.key] = found
        row = self._row(Entry("plain" if plain else "exact:min", method, "exact"), found, asked)
        row.verdict = "yardstick"
        if asked and self.directions:
            yield f"finite differences, {sampler.name}"
            self._differences(found)
        self._fill(row, found, yardstick, method, asked)

    def _plain_fits(self, sampler: Sampler, plan: Plan) -> bool:
        """Whether all calls' activations fit in the memory that is free."""
        if self._held is None:
            # This run is thrown away: it tells what an evaluation holds, and takes what is slow only the first time.
            stats = pull(self.problem, sampler, Exact("min")).stats
            self._held = stats.peak_bytes * stats.calls_forward / plan.evaluations
        needed = self._held * plan.evaluations
        if needed <= available_bytes(self.problem.device):
            return True
        self.notes.append(
            f"On {sampler.name} plain autograd would hold about {needed / 2**30:.1f} GiB, which are not free: the "
            "yardstick is Exact(memory='min'), and only finite differences judge that."
        )
        return False

    def _differences(self, found: Sampled) -> None:
        """Finite differences in float64, the float64 gradient, and what rounding makes of it."""
        try:
            wide = self.problem.double()
            found.slopes = finite_differences(wide, found.sampler, self.directions, self.seed + 1)
            exact = (
                found.yardstick.gradient
                if wide is self.problem
                else pull(wide, found.sampler, Exact()).gradient
            )
        except (BackdriftError, RuntimeError, TypeError) as error:
            self.notes.append(
                f"no finite differences on {found.sampler.name}: the run in float64 failed "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            )
            found.slopes = None
            return
        found.checked = found.slopes.mismatch(exact)
        if wide is not self.problem:
            found.rounding = Difference.of(found.yardstick.gradient, exact).relative

    def _row(self, entry: Entry, found: Sampled, asked: bool) -> Row:
        plan = found.plan
        row = Row(
            entry.name, repr(entry.method), entry.claim, repr(found.sampler.solver), plan.form,
            found.sampler.steps, asked,
        )  # fmt: skip
        self.rows.append(row)
        self.pulled.append(None)
        return row

    def _measure(self, entry: Entry, sampler: Sampler, asked: bool) -> None:
        found = self.sampled[sampler.key]
        row = self._row(entry, found, asked)
        try:
            pulled = pull(self.problem, sampler, entry.method)
            self._fill(row, found, pulled, entry.method, asked)
        except NonFiniteError as error:
            row.verdict, row.reason = "failed", str(error)
        except BackdriftError as error:
            row.verdict, row.reason = "refused", str(error)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            row.verdict, row.reason = "failed", "out of memory"

    def _fill(self, row: Row, found: Sampled, pulled: Pulled, method: GradientMethod, asked: bool) -> None:
        self.pulled[-1] = pulled
        stats = pulled.stats
        row.loss, row.seconds, row.drift = pulled.value, pulled.seconds, stats.drift
        row.calls_forward, row.calls_redone, row.vjps = stats.calls_forward, stats.calls_redone, pulled.vjps
        row.own = Difference.of(pulled.gradient, found.yardstick.gradient)
        row.growth = pulled.growth ** (1 / row.steps) if self.problem.over == "noise" else None
        if found.slopes is not None:
            row.differences = found.slopes.mismatch(pulled.gradient)
        row.peak_bytes, row.run_bytes = peak_bytes(self.problem, found.sampler, method)
        if asked and (row.claim != "exact" or row.verdict == "yardstick"):
            # Exact methods have the yardstick's.
            row.norms = adjoint_norms(self.problem, found.sampler, method, pulled)
        if row.norms:
            pairs = zip(row.norms, row.norms[1:], strict=False)
            row.largest_growth = max((noisy / clean for noisy, clean in pairs if clean > 0), default=None)
        if stats.fell_back:
            row.notes.append(f"rebuilt states drifted by {stats.drift:.2g}, so stored ones were used")


def with_flow(rows: Sequence[Row], pulled: Sequence[Pulled | None], flow: FlowGradient) -> None:
    """Fill in the errors to the flow's gradient."""
    for row, one in zip(rows, pulled, strict=True):
        if one is not None:
            row.flow = Difference.of(one.gradient, flow.gradient)
            row.flow_uncertainty = flow.uncertainty
