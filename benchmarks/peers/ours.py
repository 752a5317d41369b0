"""backdrift's methods, and plain and checkpointed autograd through the same steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

import backdrift as bd
from backdrift.gradients import GradientMethod
from backdrift.solvers import ReversibleSolver, Solver

from .method import Method, of_torch
from .work import Work

# Solvers of the same flow, by what a reader calls them. On the exponential form Euler is DDIM.
SOLVERS: dict[str, Solver] = {
    "Euler": bd.Euler(),
    "Heun": bd.Heun(),
    "Bogacki–Shampine": bd.BogackiShampine(),
    "RK4": bd.RK4(),
    "3/8 rule": bd.ThreeEighths(),  # what torchdiffeq calls rk4
    "Dormand–Prince": bd.DormandPrince(),
    "AB4": bd.AdamsBashforth(4),
    "DEIS-3": bd.DEIS(3),
    "DEIS-3 in log-SNR": bd.DEIS(3, "lam"),
    "DEIS-4 in log-SNR": bd.DEIS(4, "lam"),
    "DPM-Solver-3": bd.DPMSolver(3),
    "DPM-Solver++(2M)": bd.DPMSolverPP(),
}
COUPLED: dict[str, ReversibleSolver] = {
    "McCallum–Foster RK4": bd.McCallumFoster(bd.RK4()),
    "reversible Heun": bd.ReversibleHeun(),
    "EDICT": bd.EDICT(),
}


def run(
    solver: Solver, gradient: GradientMethod, *, form: str | None = None, rule: str = "logsnr"
) -> Callable[[Work, float], Tensor]:
    """A run with a number of steps (for an adaptive solver: none)."""

    def found(work: Work, steps: float) -> Tensor:
        grid = work.nodes(int(steps), rule)
        chosen = form or solver.default_form or "exponential"
        return bd.sample(
            work.denoiser(), work.x_T, work.cond, solver=solver, grid=grid, form=chosen, gradient=gradient
        ).x0

    return found


def adaptive(gradient: Callable[[Solver], GradientMethod], form: str) -> Callable[[Work, float], Tensor]:
    """A run with a tolerance."""

    def found(work: Work, tolerance: float) -> Tensor:
        solver = bd.AdaptiveDormandPrince(tolerance, tolerance)
        return bd.sample(
            work.denoiser(),
            work.x_T,
            work.cond,
            solver=solver,
            grid=[work.start, work.end],
            form=form,
            gradient=gradient(solver),
        ).x0

    return found


def checkpointed(
    solver: Solver, form: str | None = None, rule: str = "logsnr"
) -> Callable[[Work, float], Tensor]:
    """Plain autograd, each network call under non-reentrant torch.utils.checkpoint."""

    def found(work: Work, steps: float) -> Tensor:
        def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return checkpoint(work.network, x, t, cond, use_reentrant=False)

        return bd.sample(
            work.denoiser(network),
            work.x_T,
            work.cond,
            solver=solver,
            grid=work.nodes(int(steps), rule),
            form=form or solver.default_form or "exponential",
            gradient=bd.Plain(),
        ).x0

    return found


def exact_to_the_steps() -> list[Method]:
    """Those whose gradient is that of the steps taken."""
    found = []
    for name, solver in SOLVERS.items():
        found.append(of_torch("backdrift", 'Exact("max")', name, run(solver, bd.Exact("max")), sampler=name))
    for name in ("Bogacki–Shampine", "RK4", "3/8 rule", "Dormand–Prince", "AB4"):
        for rule, shown in (("uniform", "uniform t"), ("logsnr", "log-SNR nodes")):
            method = run(SOLVERS[name], bd.Exact("max"), form="original", rule=rule)
            found.append(of_torch("backdrift", 'Exact("max")', f"{name}, original form, {shown}", method))
    for name in ("RK4", "3/8 rule", "AB4"):
        shown = f"{name}, original form, uniform t"
        for package, label, gradient in (
            ("backdrift", 'Exact("min")', bd.Exact("min")),
            ("autograd", "plain", bd.Plain()),
        ):
            method = run(SOLVERS[name], gradient, form="original", rule="uniform")
            found.append(of_torch(package, label, shown, method))
        found.append(
            of_torch(
                "autograd", "checkpoint per call", shown, checkpointed(SOLVERS[name], "original", "uniform")
            )
        )
    method = run(SOLVERS["3/8 rule"], bd.SymplecticAdjoint(), form="original", rule="uniform")
    found.append(of_torch("backdrift", "SymplecticAdjoint", "3/8 rule, original form, uniform t", method))
    for name in ("Euler", "RK4", "AB4"):
        solver = SOLVERS[name]
        found.append(of_torch("autograd", "plain", name, run(solver, bd.Plain()), sampler=name))
        found.append(of_torch("autograd", "checkpoint per call", name, checkpointed(solver), sampler=name))
        found.append(of_torch("backdrift", 'Exact("min")', name, run(solver, bd.Exact("min")), sampler=name))
    for name in ("Euler", "Heun", "RK4", "Dormand–Prince"):
        method = run(SOLVERS[name], bd.SymplecticAdjoint())
        found.append(of_torch("backdrift", "SymplecticAdjoint", name, method, sampler=name))
    for name, coupled in COUPLED.items():
        found.append(of_torch("autograd", "plain", name, run(coupled, bd.Plain()), sampler=name))
        found.append(of_torch("backdrift", "Reversible", name, run(coupled, bd.Reversible()), sampler=name))
    for form in ("exponential", "original"):
        found.append(
            of_torch(
                "backdrift", 'Exact("max")', f"adaptive Dormand–Prince, {form}",
                adaptive(lambda _: bd.Exact("max"), form), knob="tolerance",
            )
        )  # fmt: skip
    return found


def of_the_flow() -> list[Method]:
    """Those whose gradient approaches the true flow's."""
    found = []
    pairs: list[tuple[str, Solver, Solver, str, str]] = [
        ("Euler", bd.Euler(), bd.Euler(), "exponential", "logsnr"),
        ("Heun", bd.Heun(), bd.Heun(), "exponential", "logsnr"),
        ("RK4", bd.RK4(), bd.RK4(), "exponential", "logsnr"),
        ("AB4, back by RK4", bd.AdamsBashforth(4), bd.RK4(), "exponential", "logsnr"),
        ("AB4, back by Heun", bd.AdamsBashforth(4), bd.Heun(), "exponential", "logsnr"),
        ("AB4, back by AB4", bd.AdamsBashforth(4), bd.AdamsBashforth(4), "exponential", "logsnr"),
        ("DPM-Solver-3, back by AB3", bd.DPMSolver(3), bd.AdamsBashforth(3), "exponential", "logsnr"),
        ("RK4, original form, log-SNR nodes", bd.RK4(), bd.RK4(), "original", "logsnr"),
        ("AB4 back by RK4, original form, uniform t", bd.AdamsBashforth(4), bd.RK4(), "original", "uniform"),
        (
            "Dormand–Prince, original form, uniform t",
            bd.DormandPrince(),
            bd.DormandPrince(),
            "original",
            "uniform",
        ),
        ("RK4, original form, uniform t", bd.RK4(), bd.RK4(), "original", "uniform"),
        ("3/8 rule, original form, uniform t", bd.ThreeEighths(), bd.ThreeEighths(), "original", "uniform"),
        ("AB4, original form, uniform t", bd.AdamsBashforth(4), bd.AdamsBashforth(4), "original", "uniform"),
        ("RK4, data form", bd.RK4(), bd.RK4(), "data", "logsnr"),
    ]
    for name, forward, back, form, rule in pairs:
        method = bd.ContinuousAdjoint(back, form)
        sampler = name if name in SOLVERS else None
        found.append(
            of_torch(
                "backdrift", "ContinuousAdjoint", name, run(forward, method, form=form, rule=rule), sampler=sampler
            )
        )  # fmt: skip
    recomputed = bd.ContinuousAdjoint(bd.RK4(), trajectory="recompute")
    found.append(
        of_torch(
            "backdrift", "ContinuousAdjoint, states recomputed", "RK4", run(bd.RK4(), recomputed), sampler="RK4"
        )
    )  # fmt: skip
    for name, solver in (("3/8 rule", bd.ThreeEighths()), ("AB4", bd.AdamsBashforth(4))):
        method = run(
            solver, bd.ContinuousAdjoint(solver, trajectory="recompute"), form="original", rule="uniform"
        )
        shown = f"{name}, original form, uniform t"
        found.append(of_torch("backdrift", "ContinuousAdjoint, states recomputed", shown, method))
    for form in ("exponential", "original"):
        found.append(
            of_torch(
                "backdrift", "ContinuousAdjoint", f"adaptive Dormand–Prince, {form}",
                adaptive(bd.ContinuousAdjoint, form), knob="tolerance",
            )
        )  # fmt: skip
    recompute = adaptive(lambda solver: bd.ContinuousAdjoint(solver, trajectory="recompute"), "original")
    found.append(
        of_torch(
            "backdrift", "ContinuousAdjoint, states recomputed", "adaptive Dormand–Prince, original",
            recompute, knob="tolerance",
        )
    )  # fmt: skip
    for order, variant in ((1, "M"), (2, "M"), (2, "S")):
        label = f"AdjointDEIS-{order}{variant if order == 2 else ''}"
        deis = bd.AdjointDEIS(order, variant)  # type: ignore[arg-type]
        for name in ("Euler", "AB4"):
            found.append(of_torch("backdrift", label, name, run(SOLVERS[name], deis), sampler=name))
    return found
