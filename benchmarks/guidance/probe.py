"""Stops a pipeline's own run at a step and hands over what guidance works with there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backdrift.guidance import Attempt, Guidance
from backdrift.losses import Loss

from .setting import Case, Setting


class _Seen(Exception):
    """The run is not needed any further."""


def at_step(setting: Setting, case: Case, loss: Loss, index: int, look: Callable[[Attempt], Any]) -> Any:
    """``look(attempt)`` at step ``index`` of the case's unguided run, which ends there."""
    found: list[Any] = []

    def rule(attempt: Attempt) -> Any:
        found.append(look(attempt))
        raise _Seen

    try:
        setting.guide(case, Guidance(rule, loss, steps=[index]))
    except _Seen:
        return found[0]
    raise RuntimeError(f"step {index} was not reached")
