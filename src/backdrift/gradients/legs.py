"""The way back as a row of legs: on each either a solver of its own runs, or one step of the run is differentiated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..denoiser import Denoiser
from ..errors import InputError
from ..forms import Form
from ..grids import TimeGrid
from ..integrate import Plan
from ..solvers import AdaptiveDormandPrince, Solver


@dataclass(frozen=True)
class Leg:
    """Part of the way back.

    Attributes:
        first, last: the run's intervals ``first`` to ``last - 1``.
        times: the leg's own nodes, rising; none where the step of the (one) interval is differentiated itself.
    """

    first: int
    last: int
    times: tuple[float, ...]


def usable(form: Form, model: Denoiser, t: float) -> bool:
    """Whether the form's drift can be evaluated at ``t``."""
    try:
        model.check_time(t)
        return form.regular(t) and all(map(math.isfinite, form.coefficients(t)))
    except InputError:
        return False


def legs_of(
    plan: Plan, model: Denoiser, form: Form, solver: Solver, own: Sequence[float] | None, stops: bool
) -> list[Leg]:
    """The legs, in the order of the way back.

    Args:
        form: the way back's.
        solver: the way back's.
        own: its own nodes, falling, with the run's ends; None for the run's nodes (an adaptive solver's: its ends).
        stops: whether a leg must end at every node of the run.
    """
    good = [usable(form, model, t) for t in plan.times]
    legs: list[Leg] = []
    first = None
    for i, (start, end) in enumerate(itertools.pairwise(plan.times)):
        if not (good[i] and good[i + 1] and solver.spans(form.node(end), form.node(start))):
            legs.append(Leg(i, i + 1, ()))
            first = None
        elif first is None or stops:
            first = i
            legs.append(Leg(i, i + 1, (end, start)))
        else:
            legs[-1] = Leg(first, i + 1, (end, plan.times[first]))
    inner = own if own is not None else () if isinstance(solver, AdaptiveDormandPrince) else plan.times
    return [_with_nodes(leg, inner) for leg in reversed(legs)]


def _with_nodes(leg: Leg, nodes: Sequence[float]) -> Leg:
    if not leg.times:
        return leg
    low, high = leg.times
    # A node of its own that is one of the run's but for rounding is that one.
    slack = 1e-10 * (high - low)
    between = sorted(t for t in nodes if low + slack < t < high - slack)
    return Leg(leg.first, leg.last, (low, *between, high))


def own_nodes(grid: TimeGrid | None, plan: Plan) -> list[float] | None:
    """The falling nodes of a way back's own grid; ends that it leaves open are the run's.

    Raises:
        InputError: its ends are not the run's.
    """
    if grid is None:
        return None
    start, end = plan.times[0], plan.times[-1]
    if grid.rule != "explicit":
        grid = TimeGrid(
            grid.rule,
            grid.steps,
            start=start if grid.start is None else grid.start,
            end=end if grid.end is None and not grid.clean_end else grid.end,
            clean_end=grid.clean_end,
            exponent=grid.exponent,
        )
    times = grid.nodes(plan.schedule).tolist()
    slack = 1e-10 * (start - end)
    if abs(times[0] - start) > slack or abs(times[-1] - end) > slack:
        raise InputError(
            f"the way back leads from the run's end, t = {end:g}, to its start, t = {start:g}; its grid goes from "
            f"{times[-1]:g} to {times[0]:g}: leave its ends open, or give the same ones"
        )
    return times
