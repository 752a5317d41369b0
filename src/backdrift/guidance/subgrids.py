"""Where the estimate of the clean sample steps: n intervals from a host's time down to sigma = 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from ..errors import InputError
from ..schedules import Schedule

Subgrid = Literal["paper", "uniform", "logsnr"]
SUBGRIDS: tuple[str, ...] = get_args(Subgrid)


def check_subgrid(rule: str) -> Subgrid:
    """``rule``, if it is a sub-grid.

    Raises:
        InputError: it is not.
    """
    if rule not in SUBGRIDS:
        raise InputError(f"subgrid must be one of {', '.join(map(repr, SUBGRIDS))}; got {rule!r}")
    return rule  # type: ignore[return-value]


def subgrid(rule: Subgrid, n: int, times: Sequence[float], schedule: Schedule) -> list[float]:
    """The n + 1 falling nodes of an estimate; the last one is always the clean end, sigma = 0.

    * ``"paper"``: the first n nodes are those of the host's remaining ones that lie at ``linspace(0, left - 1, n)``,
      rounded down (as published); where fewer than n are left, all of them.
    * ``"uniform"``: equal steps in t.
    * ``"logsnr"``: n - 1 equal steps in lam = log(alpha/sigma) to the time of the host's last network call, and one to
      the clean end, where lam is infinite.

    The published code stops at its last timestep instead of sigma = 0, so what it calls n = 4 is four nodes and three
    steps; here n intervals make n network calls of a one-stage solver, and n = 1 is the one-step estimate exactly.

    Args:
        rule: see above.
        n: intervals, at least 1.
        times: the host's remaining nodes, falling, from the estimate's start to where the host ends.
        schedule: of the model.

    Returns:
        Fewer than n + 1 nodes where there is no room for n.

    Raises:
        InputError: ``"logsnr"`` from a time where alpha is 0.
    """
    start, calls = times[0], times[:-1] if len(times) > 1 else times
    if start == schedule.t_clean:
        raise InputError(f"an estimate from t = {start:g}, the clean end, has nothing to estimate")
    if n == 1 or (len(calls) == 1 and rule != "uniform"):
        nodes = [start]
    elif rule == "paper":
        at = torch.linspace(0, len(calls) - 1, n, dtype=torch.float64).long().tolist()
        nodes = [calls[i] for i in at] if n <= len(calls) else list(calls)
    elif rule == "uniform":
        end = schedule.t_min
        nodes = [start + k * (end - start) / n for k in range(n)]
    else:
        lams = schedule.lam([start, calls[-1]])
        if not bool(lams[0].isfinite()):
            raise InputError(
                f"alpha is 0 at t = {start:g}, infinitely far away for subgrid='logsnr': guide from a later step on, "
                "or use 'paper' or 'uniform'"
            )
        between = schedule.t_from_lam(torch.linspace(float(lams[0]), float(lams[1]), n, dtype=torch.float64))
        nodes = [start, *between[1:-1].tolist(), calls[-1]]
    nodes = [t for i, t in enumerate(nodes) if i == 0 or t < nodes[i - 1]]
    return [*(t for t in nodes if t > schedule.t_clean), schedule.t_clean]
