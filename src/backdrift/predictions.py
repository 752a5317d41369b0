"""What a network predicts, and how one prediction turns into another.

With x = alpha x0 + sigma eps each of the four is an affine function of any other and x:

* ``"epsilon"``: eps
* ``"sample"``: x0
* ``"v_prediction"``: v = alpha eps - sigma x0
* ``"flow_prediction"``: u = eps - x0 (dx/dt of rectified flow)

so a conversion is two float64 numbers, ``target = on_x * x + on_output * output``. A conversion is made only where
its numbers are finite: v and u give eps and x0 everywhere; x0 gives the others where sigma > 0; eps where alpha > 0.
"""

from __future__ import annotations

from .errors import InputError

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def check_prediction(prediction: str) -> str:
    """``prediction``, if it is one of :data:`PREDICTIONS`.

    Raises:
        InputError: it is not.
    """
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    return prediction


def conversion(prediction: str, target: str, alpha: float, sigma: float, t: float) -> tuple[float, float]:
    """The numbers (on_x, on_output) that turn a network's output into ``target``.

    Args:
        prediction: what the output is, one of :data:`PREDICTIONS`.
        target: what is wanted, one of :data:`PREDICTIONS`.
        alpha, sigma: the schedule's scales at the output's time.
        t: that time, for the message.

    Raises:
        InputError: the output does not determine the target at this time (a division by 0).
    """
    check_prediction(prediction)
    check_prediction(target)
    if prediction == target:
        return 0.0, 1.0
    if prediction == "epsilon" and alpha == 0:
        _refuse(prediction, target, "alpha", t)
    if prediction == "sample" and sigma == 0:
        _refuse(prediction, target, "sigma", t)
    (ex, eo), (sx, so) = _both(prediction, alpha, sigma)
    if target == "epsilon":
        return ex, eo
    if target == "sample":
        return sx, so
    if target == "v_prediction":
        return alpha * ex - sigma * sx, alpha * eo - sigma * so
    return ex - sx, eo - so


def _both(prediction: str, alpha: float, sigma: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """eps and x0, each as (on_x, on_output)."""
    if prediction == "epsilon":
        return (0.0, 1.0), (1 / alpha, -sigma / alpha)
    if prediction == "sample":
        return (1 / sigma, -alpha / sigma), (0.0, 1.0)
    if prediction == "v_prediction":
        # The denominator is 1 for variance-preserving schedules only.
        total = alpha**2 + sigma**2
        return (sigma / total, alpha / total), (alpha / total, -sigma / total)
    total = alpha + sigma
    return (1 / total, alpha / total), (1 / total, -sigma / total)


def _refuse(prediction: str, target: str, zero: str, t: float) -> None:
    raise InputError(
        f"a network that predicts {prediction!r} says nothing about {target!r} at t = {t:g}, where {zero} = 0: "
        f"start or end the grid elsewhere, or use a form that needs no {target!r} there"
    )
