"""Finite differences of rounded functions, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.pipelines.checkup.differences import Leaves, judged, moved, rms, rounding_of, slope


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def point(dtype: torch.dtype = torch.float64) -> Leaves:
    x = torch.randn(3, 5, generator=draw(1), dtype=torch.float64)
    return {"x": x.to(dtype), "y": (3 * x[0] + 1).to(dtype)}


def smooth(at: Leaves) -> Tensor:
    x, y = at["x"], at["y"]
    return (x * x * x).sum() / 10 + (x[0] * y).sum() + torch.sin(y).sum()


def gradients(at: Leaves) -> Leaves:
    leaves = {k: v.clone().requires_grad_() for k, v in at.items()}
    return dict(zip(leaves, torch.autograd.grad(smooth(leaves), list(leaves.values())), strict=True))


def test_a_right_gradient_of_a_smooth_function() -> None:
    at = point()
    found = slope(lambda x: float(smooth(x)), at, gradients(at), draw(2), 1e-15)
    assert abs(found.error) < 1e-6 * found.scale
    assert found.uncertainty < 1e-3 * found.scale
    assert abs(found.error) <= found.uncertainty
    assert found.scale == pytest.approx(
        math.sqrt(sum(float((g * rms(at[k])).square().sum()) for k, g in gradients(at).items()))
    )


@pytest.mark.parametrize("factor", [0.9, 1.05])
def test_a_wrong_gradient_errs_by_what_is_missing(factor: float) -> None:
    at = point()
    true, wrong = gradients(at), {k: factor * g for k, g in gradients(at).items()}
    right = slope(lambda x: float(smooth(x)), at, true, draw(2), 1e-15)
    found = slope(lambda x: float(smooth(x)), at, wrong, draw(2), 1e-15)
    assert found.error == pytest.approx((1 - factor) * right.predicted, rel=1e-4)
    assert found.predicted == pytest.approx(factor * right.predicted)
    error, tolerance = judged([found], 1e-6)
    assert error > tolerance
    assert judged([found, right], 1e-6)[0] < 1e-6 < judged([found, found, right], 1e-6)[0]  # the middle one


def test_rounding_is_measured_and_stands_in_the_tolerance() -> None:
    """Noise of a known size on a smooth function."""
    at, noise, size = point(), draw(7), 1e-4

    def noisy(x: Leaves) -> float:
        return float(smooth(x)) + size * float(torch.randn((), generator=noise, dtype=torch.float64))

    measured = [rounding_of(noisy, at, draw(i)) for i in range(200)]
    assert math.sqrt(sum(m * m for m in measured) / len(measured)) == pytest.approx(size, rel=0.15)
    assert rounding_of(lambda x: float(smooth(x)), at, draw(0)) < 1e-12
    apart = [slope(noisy, at, gradients(at), draw(i), size) for i in range(100)]
    assert sum(abs(s.error) <= s.uncertainty for s in apart) >= 97
    assert max(s.uncertainty for s in apart) < 0.1 * apart[0].scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_the_precision_makes_of_a_step_is_no_error(dtype: torch.dtype) -> None:
    """A float64 function at half-precision places: only the places are rounded."""
    at = point(dtype)

    def value(x: Leaves) -> float:
        return float(smooth({k: v.double() for k, v in x.items()}))

    true: Any = {k: g.double() for k, g in gradients({k: v.double() for k, v in at.items()}).items()}
    found = slope(value, at, true, draw(3), 1e-12)
    assert abs(found.error) < 2e-2 * found.scale
    way = {k: torch.ones_like(x, dtype=torch.float64) for k, x in at.items()}
    assert all(x.dtype == dtype for x in moved(at, way, 0.1).values())


def test_kinks_make_it_unsure_not_wrong() -> None:
    """A right gradient of a function full of kinks is not called wrong; one that is 30 % off mostly is."""
    weights = torch.randn(40, 20, generator=draw(5), dtype=torch.float64)
    at = {"x": torch.randn(20, generator=draw(6), dtype=torch.float64)}

    def value(x: Leaves) -> float:
        return float((weights @ x["x"]).relu().sum())

    true = {"x": weights.T @ (weights @ at["x"] > 0).double()}
    found = [slope(value, at, true, draw(i), 1e-14) for i in range(50)]
    assert sum(abs(s.error) <= s.uncertainty + 1e-3 * s.scale for s in found) >= 48
    wrong = [slope(value, at, {"x": 0.7 * true["x"]}, draw(i), 1e-14) for i in range(50)]
    assert sum(abs(s.error) > s.uncertainty + 1e-3 * s.scale for s in wrong) >= 35
