"""The certificate over other things than the noise, in other precisions, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError
from backdrift.gradients import GradientMethod
from certified import GRID, SCHEDULE, Wrong, loss, mixture, one, relative, rows
from problems import MixtureNetwork, condition, start_state


def test_over_the_conditioning() -> None:
    made = mixture(
        methods=["exact:min", "continuous"], over="cond", solver="heun", steps=[4, 8], reference_steps=64
    )
    exact = one(made, "exact:min", 8)
    assert exact.verdict == "exact"
    assert exact.differences is not None
    assert exact.differences < 1e-8
    assert exact.growth is None  # the adjoint is not what was asked for
    adjoint = one(made, "continuous", 8)
    assert adjoint.own is not None
    assert 1e-4 < adjoint.own.relative < 1e-2
    assert adjoint.verdict == "within"


class Shifted(MixtureNetwork):
    """With a second parameter, and a third that the network does not use."""

    def __init__(self) -> None:
        super().__init__(SCHEDULE, "epsilon", width=1.0)
        self.tilt = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64))
        self.idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return super().forward(x, t, cond + self.tilt)


@pytest.mark.parametrize(
    ("over", "named"),
    [("means", ["means"]), ("weights", ["means", "tilt", "idle"]), (["ti*", "means"], ["means", "tilt"])],
    ids=str,
)
def test_over_weights(over: Any, named: list[str]) -> None:
    """Exact methods, an adjoint's error computed by hand, and finite differences of the weights alone."""
    network = Shifted()
    chosen = [network.get_parameter(name) for name in named]
    before = [p.detach().clone() for p in network.parameters()]
    model, x, c = bd.Denoiser(network, SCHEDULE), start_state(SCHEDULE, 0.6), condition()
    methods = {"exact": bd.Exact("min"), "symplectic": bd.SymplecticAdjoint(), "continuous": bd.ContinuousAdjoint(),
               "wrong": Wrong()}  # fmt: skip
    made = bd.verify(
        model, x_T=x, cond=c, loss=loss, over=over, methods=methods, solver="heun", steps=[4, 8], grid=GRID,
        reference_steps=32, progress=False,
    )  # fmt: skip

    def by_hand(method: GradientMethod) -> Tensor:
        grid = bd.TimeGrid("logsnr", 8, start=0.6, end=0.05)
        x0 = bd.sample(model, x, c, solver=bd.Heun(), grid=grid, gradient=method).x0
        found = torch.autograd.grad(loss(x0).sum(), chosen, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    for name in ("exact", "symplectic"):
        row = one(made, name, 8)
        assert row.verdict == "exact"
        assert row.differences is not None
        assert row.differences < 1e-7
    adjoint = one(made, "continuous", 8)
    assert adjoint.own is not None
    assert adjoint.own.relative == pytest.approx(
        relative(by_hand(bd.ContinuousAdjoint()), by_hand(bd.Plain())), rel=1e-9
    )
    wrong = one(made, "wrong", 8).differences
    assert wrong is not None
    assert 0.01 < wrong < 0.0501
    settings = made.record["settings"]
    assert (settings["over"], settings["weights"], settings["directions"]) == (over, len(named), 3)
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_float32_rounding_is_measured_and_not_called_an_error() -> None:
    class Narrow(MixtureNetwork):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return super().forward(x, t.to(x.dtype), cond).to(x.dtype)

    network = Narrow(SCHEDULE, "epsilon", width=1.0).requires_grad_(False).float()
    made = bd.verify(
        bd.Denoiser(network, SCHEDULE), loss=lambda x0: x0.square().sum(1), x_T=start_state(SCHEDULE, 0.6).float(),
        cond=condition().float(), grid=GRID, methods=["exact:min", "symplectic", "reversible"], steps=[4, 12],
        reference_steps=16, progress=False,
    )  # fmt: skip
    (reference,) = [
        r for r in made.record["references"] if r["solver"] == "Euler()" and r["rounding"] is not None
    ]
    assert 1e-9 < reference["rounding"] < 1e-5
    assert reference["differences"] < 1e-7
    assert [row.verdict for row in made.rows if row.verdict != "yardstick"] == ["exact"] * 6
    assert made.record["dtype"] == "float32"


def test_what_autograd_does_not_see_is_found_by_finite_differences() -> None:
    class Detached(MixtureNetwork):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return 0.9 * super().forward(x, t, cond) + 0.1 * super().forward(x.detach(), t, cond)

    network = Detached(SCHEDULE, "epsilon", width=1.0).requires_grad_(False)
    made = bd.verify(
        bd.Denoiser(network, SCHEDULE), loss=loss, x_T=start_state(SCHEDULE, 0.6), cond=condition(), grid=GRID,
        methods=["exact:min"], steps=[4, 8], reference_steps=16, progress=False,
    )  # fmt: skip
    row = one(made, "exact:min", 8)
    assert row.own is not None
    assert row.own.relative == 0
    assert row.verdict == "failed"
    assert "finite differences" in row.reason
    assert made.recommendation.row is None or made.recommendation.row.steps != 8


def test_methods_that_do_not_apply_are_refused_by_row() -> None:
    made = mixture(
        methods=["symplectic", "reversible", "exact:max"], solver="ab2", steps=[4, 8], reference_steps=16
    )
    assert {row.verdict for row in rows(made, "symplectic")} == {"refused"}
    assert "Runge–Kutta" in one(made, "symplectic", 8).reason
    assert made.recommendation.row is not None
    assert made.recommendation.row.name == "exact:max"
    assert "symplectic refused" in str(made)
    assert {row.verdict for row in rows(made, "reversible")} == {"refused"}
    assert "one-step" in one(made, "reversible", 8).reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "heum"}, "Did you mean 'heun'"),
        ({"solver": bd.Ancestral()}, "adds noise"),
        ({"solver": bd.AdaptiveDormandPrince()}, "its own steps"),
        ({"methods": ["exakt"]}, "Did you mean 'exact'"),
        ({"methods": [bd.Exact]}, "with brackets"),
        ({"methods": []}, "at least one"),
        ({"methods": ["exact", "exact"]}, "once"),
        ({"steps": 1}, "at least 2"),
        ({"steps": [4, 4]}, "twice"),
        ({"tolerance": 0}, "positive"),
        ({"target": "both"}, "target is"),
        ({"over": "unet"}, "over is"),
        ({"over": "weights"}, "none"),
        ({"over": ["noise", "means"]}, "over is one of"),
        ({"over": []}, "over is one of"),
        ({"directions": -1}, "whole number"),
        ({"grid": bd.TimeGrid([0.6, 0.3, 0.05])}, "give a rule"),
        ({"grid": "evenly"}, "rule of a TimeGrid"),
        ({"prompt": "a"}, "belongs to a pipeline"),
        ({"x_T": None}, "needs x_T"),
        ({"loss": None}, "function of the sample"),
        ({"cond": lambda t: condition(), "over": "cond"}, "function of time"),
        ({"memory": "a lot"}, "memory"),
    ],
)
def test_what_cannot_be_used_is_refused(settings: dict[str, Any], message: str) -> None:
    network = MixtureNetwork(SCHEDULE).requires_grad_(False)
    given = {"x_T": start_state(SCHEDULE, 0.6), "cond": condition(), "loss": loss, "grid": GRID, **settings}
    with pytest.raises(ValueError, match=message):
        bd.verify(bd.Denoiser(network, SCHEDULE), progress=False, **given)


def test_losses_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(InputError, match="one per sample"):
        mixture(loss=lambda x0: x0)
    with pytest.raises(MissingGradientError, match="does not depend"):
        mixture(loss=lambda x0: x0.detach().sum(1))
