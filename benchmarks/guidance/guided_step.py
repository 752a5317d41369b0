"""Time, memory and exactness of one guided step against n, by the method that finds the gradient.

At a step of the pipeline's own run, the pull of the style loss on the state is found through an n-step estimate by
plain autograd, by the vanilla continuous adjoint (the adjoint equation solved backwards with Euler's steps beside
the state, which is solved back too: Chen et al. 2018; in x over t, and on the exponential form), and by the
symplectic adjoint.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import backdrift as bd
from backdrift.gradients import GradientMethod
from backdrift.guidance import Attempt
from backdrift.guidance.estimate import Calls, Estimator

from ..measure import peak_bytes, seconds
from .probe import at_step
from .setting import Case, Setting
from .tasks import STYLE

CPU = torch.device("cpu")
METHODS: dict[str, Callable[[], GradientMethod]] = {
    "plain autograd": bd.Plain,
    "vanilla adjoint, original form": lambda: bd.ContinuousAdjoint(bd.Euler(), "original", "recompute"),
    "vanilla adjoint, exponential form": lambda: bd.ContinuousAdjoint(bd.Euler(), "exponential", "recompute"),
    "symplectic adjoint": bd.SymplecticAdjoint,
}
STEPS = (1, 2, 3, 4, 5, 6, 8, 10)


def measure(setting: Setting, case: Case, index: int, repeats: int) -> list[dict[str, Any]]:
    """For each method and n: median seconds, peak bytes of live tensors, network calls, and the gradient's error.

    The error is relative to plain autograd's gradient of the same steps, which is exact, in the norm; ``cosine`` is
    that between the two; both are means over the batch.
    """
    loss = STYLE.loss(case.reference)

    def look(attempt: Attempt) -> list[dict[str, Any]]:
        host, evaluation = attempt.host, attempt.evaluation

        def pulled(name: str, n: int, calls: Calls) -> Tensor:
            estimator = Estimator(gradient=METHODS[name]())
            return estimator.pulled(host, evaluation, n, attempt.score, calls).pull

        cells: list[dict[str, Any]] = []
        for n in STEPS:
            known = pulled("plain autograd", n, Calls())
            for name in METHODS:
                calls = Calls()
                found = pulled(name, n, calls)
                cells.append(
                    {
                        "method": name,
                        "n": n,
                        "calls": [calls.forward, calls.redone, calls.vjps],
                        "error": _mean((found - known).flatten(1).norm(dim=1) / known.flatten(1).norm(dim=1)),
                        "cosine": _mean(torch.cosine_similarity(found.flatten(1), known.flatten(1))),
                        "peak bytes": peak_bytes(lambda m=name, k=n: pulled(m, k, Calls()), CPU),
                        "seconds": [],
                    }
                )
        for repeat in range(repeats):
            turn = (7 * repeat) % len(cells)
            for cell in cells[turn:] + cells[:turn]:
                took = seconds(lambda c=cell: pulled(c["method"], c["n"], Calls()), CPU)
                cell["seconds"].append(took)
        for cell in cells:
            cell["seconds"] = [round(s, 4) for s in cell["seconds"]]
            print(f"step: {cell['method']}, n = {cell['n']}: {median(cell['seconds'] or [0]):.3f} s, "
                  f"{cell['peak bytes'] / 1e6:.1f} MB, error {cell['error']:.2g}", flush=True)  # fmt: skip
        return cells

    return at_step(setting, case, loss, index, look)


def _mean(values: Tensor) -> float:
    return float(f"{float(values.double().mean()):.6g}")
