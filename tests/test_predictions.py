"""Conversions between predictions: exact on x = alpha x0 + sigma eps, refused where they are not determined."""

from __future__ import annotations

import itertools

import pytest

from backdrift.errors import InputError
from backdrift.predictions import PREDICTIONS, conversion

X0, EPS = 1.3, -0.7
SCALES = [
    (0.8, 0.6),
    (0.999, 0.0447),
    (1.0, 3.0),
    (0.3, 0.7),
    (0.62, 0.49),
]  # VP, EDM, flow, and none of them


def values(alpha: float, sigma: float) -> dict[str, float]:
    return {
        "epsilon": EPS,
        "sample": X0,
        "v_prediction": alpha * EPS - sigma * X0,
        "flow_prediction": EPS - X0,
    }


@pytest.mark.parametrize(("source", "target"), itertools.product(PREDICTIONS, PREDICTIONS))
@pytest.mark.parametrize(("alpha", "sigma"), SCALES)
def test_every_conversion_is_exact(source: str, target: str, alpha: float, sigma: float) -> None:
    known = values(alpha, sigma)
    on_x, on_output = conversion(source, target, alpha, sigma, t=0.5)
    x = alpha * X0 + sigma * EPS
    assert on_x * x + on_output * known[source] == pytest.approx(known[target], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("target", ["epsilon", "sample"])
@pytest.mark.parametrize("source", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 0.0)])
def test_velocities_are_readable_at_both_ends(source: str, target: str, alpha: float, sigma: float) -> None:
    known = values(alpha, sigma)
    on_x, on_output = conversion(source, target, alpha, sigma, t=0.0)
    assert on_x * (alpha * X0 + sigma * EPS) + on_output * known[source] == pytest.approx(known[target])


@pytest.mark.parametrize(
    ("source", "target", "alpha", "sigma", "zero"),
    [
        ("epsilon", "sample", 0.0, 1.0, "alpha"),
        ("epsilon", "flow_prediction", 0.0, 1.0, "alpha"),
        ("epsilon", "v_prediction", 0.0, 1.0, "alpha"),
        ("sample", "epsilon", 1.0, 0.0, "sigma"),
        ("sample", "flow_prediction", 1.0, 0.0, "sigma"),
        ("sample", "v_prediction", 1.0, 0.0, "sigma"),
    ],
)
def test_singular_conversions_raise_with_the_time(
    source: str, target: str, alpha: float, sigma: float, zero: str
) -> None:
    with pytest.raises(InputError, match=f"t = 0.25, where {zero} = 0"):
        conversion(source, target, alpha, sigma, t=0.25)


def test_unknown_predictions_are_refused() -> None:
    with pytest.raises(InputError, match="v_prediction"):
        conversion("velocity", "sample", 0.8, 0.6, 0.5)
