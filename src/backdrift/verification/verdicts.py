"""What a row shows, by stated limits.

``exact``
    no further from the sampler's own gradient than rounding explains.
``within``
    no further from the target that was asked for than the tolerance.
``off``
    further than that. An adjoint of the flow at few steps is.
``failed``
    not what the method claims: it is not finite; or it claims the sampler's own gradient, and is further from it than
    rounding explains or disagrees with finite differences; or it is none of this package's methods, and is further from
    the sampler's gradient than the tolerance and no nearer at more steps (everything that tends to the flow's
    gradient comes nearer).
``refused``
    the method does not work on this run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..gradients import GradientMethod, Reversible
from .rows import Row, Target

#: Finite differences of a loss with kinks are not exact themselves; beyond this they disagree.
DIFFERENCES = 1e-2
#: The error at the most steps must be this much smaller than at the fewest, to count as coming nearer.
NEARER = 0.8


def rounding_limit(dtype: torch.dtype, measured: float | None) -> float:
    """The largest relative error that counts as rounding.

    Ten times what float32 and float64 were measured to differ by, and at least eps^0.6 of the dtype: 7e-5 in
    float32, 4e-10 in float64.
    """
    floor = torch.finfo(dtype).eps ** 0.6
    return floor if measured is None or not math.isfinite(measured) else max(floor, 10 * measured)


def judge(row: Row, method: GradientMethod, rounding: float, target: Target, tolerance: float) -> None:
    """Set the verdict of a row that was measured, and the reason if it failed."""
    if row.verdict in ("refused", "failed", "yardstick"):
        return
    own, error = row.error("sampler"), row.error(target)
    limit = max(rounding, method.tolerance) if isinstance(method, Reversible) else rounding
    if own is None or not math.isfinite(own) or not math.isfinite(row.loss or 0.0):
        row.verdict, row.reason = "failed", "the gradient is not finite"
    elif row.claim == "exact" and own > limit:
        row.verdict = "failed"
        row.reason = (
            f"it claims the sampler's own gradient and is {own:.2g} off, where rounding explains {limit:.1g}"
        )
    elif (
        row.claim == "exact"
        and row.differences is not None
        and not row.differences <= max(DIFFERENCES, limit)
    ):
        row.verdict = "failed"
        row.reason = (
            f"it disagrees with finite differences by {row.differences:.2g}: the loss has kinks or jumps there, or "
            "something in the network or the loss is hidden from autograd (detach, rounding, argmax)"
        )
    elif own <= limit:
        row.verdict = "exact"
    else:
        row.verdict = "within" if error is not None and error <= tolerance else "off"


def judge_series(rows: Sequence[Row], tolerance: float) -> None:
    """Set to failed what is no method of the package and comes no nearer with more steps.

    Args:
        rows: of one method and solver.
    """
    measured = sorted((row for row in rows if row.own is not None), key=lambda row: row.steps)
    if len(measured) < 2 or measured[0].claim != "none":
        return
    first, last = measured[0].error("sampler"), measured[-1].error("sampler")
    assert first is not None
    assert last is not None
    if last > tolerance and last > NEARER * first:
        for row in measured:
            if row.verdict != "exact":
                row.verdict = "failed"
                row.reason = (
                    f"it is {last:.2g} off the sampler's own gradient at {measured[-1].steps} steps and {first:.2g} at "
                    f"{measured[0].steps}: it does not come nearer, so it tends to neither gradient"
                )
