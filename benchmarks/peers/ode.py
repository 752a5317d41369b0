"""torchdiffeq's ``odeint_adjoint`` at its best: every solver, both forms, three clocks, both ways of its adjoint.

* *stored*: all nodes are output times. Its adjoint then starts every interval at the forward pass's own state, and
  so does its multistep solver.
* *solved back*: the two ends are output times, the steps are given by ``grid_constructor``, and the states are solved
  backwards too.

The adaptive solver gets what helps it: it is told where the run ends (``step_t``; else it asks the network beyond), and
its backward tolerance leaves the shared tensors out (``"seminorm"``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .equation import Equation
from .method import Method, of_torch
from .work import Work

# name -> method and options. Its explicit Adams has constant coefficients, so it needs equal steps in its clock; with
# max_order=5 it is Adams–Bashforth of order 4 (it looks back over max_order - 1 slopes), the paper's.
FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("euler", {}),
    "rk4": ("rk4", {}),
    "explicit_adams, order 4": ("explicit_adams", {"max_order": 5}),
    "explicit_adams, default": ("explicit_adams", {}),
}
# clock, rule of the nodes, what a reader calls it
CLOCKED = (
    ("time", "uniform", "original form, uniform t"),
    ("time", "logsnr", "original form, log-SNR nodes"),
    ("rho", "logsnr", "exponential form, log-SNR nodes"),
    ("lam", "logsnr", "exponential form in log-SNR"),
)


def fixed(solver: str, clock: str, rule: str, *, stored: bool) -> Callable[[Work, float], Tensor]:
    """A run with a number of steps."""
    method, more = FIXED[solver]

    def run(work: Work, steps: float) -> Tensor:
        from torchdiffeq import odeint_adjoint

        equation = Equation(work, clock, work.nodes(int(steps), rule))
        nodes, options = equation.nodes, dict(more)
        if not stored:
            # It calls this for the way back too, with the ends the other way round.
            options["grid_constructor"] = lambda f, y, s: (nodes if s[0] < s[-1] else nodes.flip(0)).to(s)
        asked = nodes if stored else nodes[[0, -1]]
        y = odeint_adjoint(
            equation, equation.begin(), asked, method=method, options=options, adjoint_params=work.shared
        )
        return equation.finish(y[-1])

    return run


def adaptive(clock: str, solver: str = "dopri5") -> Callable[[Work, float], Tensor]:
    """A run with a tolerance."""

    def run(work: Work, tolerance: float) -> Tensor:
        from torchdiffeq import odeint_adjoint

        equation = Equation(work, clock, torch.tensor([work.start, work.end], dtype=torch.float64))
        ends = equation.nodes
        y = odeint_adjoint(
            equation,
            equation.begin(),
            ends,
            method=solver,
            rtol=tolerance,
            atol=tolerance,
            options={"step_t": ends[1:].clone()},
            adjoint_options={"step_t": ends[:1].clone(), "norm": "seminorm"},
            adjoint_params=work.shared,
        )
        return equation.finish(y[-1])

    return run


def methods() -> list[Method]:
    """All settings."""
    found = []
    for solver in FIXED:
        for clock, rule, shown in CLOCKED:
            uneven = (clock, rule) in (("time", "logsnr"), ("rho", "logsnr"))
            for stored in (True, False):
                if solver.startswith("explicit_adams") and uneven:
                    continue  # no order at all there
                way = "stored" if stored else "solved back"
                run = fixed(solver, clock, rule, stored=stored)
                sampler = {"euler": "Euler"}.get(solver) if clock == "rho" else None
                found.append(
                    of_torch(
                        "torchdiffeq", f"odeint_adjoint, {way}", f"{solver}, {shown}", run, sampler=sampler
                    )
                )  # fmt: skip
    for clock, shown in (
        ("time", "original form"),
        ("rho", "exponential form"),
        ("lam", "exponential form in log-SNR"),
    ):
        found.append(
            of_torch("torchdiffeq", "odeint_adjoint", f"dopri5, {shown}", adaptive(clock), knob="tolerance")
        )
    return found
