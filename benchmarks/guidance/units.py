"""Unit times of a guided run, measured side by side: each repeat takes every part once, in an order that turns."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from backdrift.guidance import Attempt
from backdrift.guidance.estimate import Calls, Estimator, Score

from ..measure import seconds
from .costs import Units
from .probe import at_step
from .setting import Case, Setting
from .tasks import Task

CPU = torch.device("cpu")


def measure(setting: Setting, task: Task, case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of every part at the middle of a run, and of whole FreeDoM and SAG attempts, to check the sum against."""

    def look(attempt: Attempt) -> dict[str, list[float]]:
        host, evaluation, estimator = attempt.host, attempt.evaluation, Estimator()
        other, x0 = host.x + 1e-3, evaluation.x0
        push = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))

        def free(clean: Tensor) -> Score:
            return Score(torch.zeros(len(clean)), push)

        def forward() -> None:
            host.step(other, host.evaluate(other))

        def guided(n: int) -> Callable[[], Any]:
            def work() -> None:
                forward()
                estimator.pulled(host, evaluation, n, attempt.score, Calls())

            return work

        parts: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "product": lambda: estimator.pulled(host, evaluation, 1, free, Calls()),
            "decode": lambda: attempt.score(x0),
            "attempt, n = 1": guided(1),
            "attempt, n = 4": guided(4),
        }
        found: dict[str, list[float]] = {name: [] for name in parts}
        names = list(parts)
        for work in parts.values():
            work()  # fills caches
        for repeat in range(repeats):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                with torch.no_grad():
                    found[name].append(round(seconds(parts[name], CPU), 5))
        return found

    return at_step(setting, case, task.loss(case.reference), setting.steps // 2, look)


def units(cell: dict[str, Any]) -> Units:
    """Medians."""
    found = {name: median(values) for name, values in cell["seconds"].items()}
    return Units(found["forward"], found["product"], found["decode"])
