"""Conditioning per step and as a function of time: every step gets its own gradient, the same as plain autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.conditioning import PerStep
from backdrift.errors import InputError, MissingGradientError
from backdrift.gradients import Exact, GradientMethod, Plain
from backdrift.grids import TimeGrid
from backdrift.sampling import sample
from backdrift.solvers import AdamsBashforth, Euler, Heun, Solver
from problems import ToyNetwork, toy_denoiser, toy_inputs

GRID = TimeGrid("uniform", steps=4, start=1.0, end=0.05)


def variants(count: int, sign: float = 1.0) -> list[dict[str, Any]]:
    """Conditionings that differ, each with a tensor of its own that requires grad."""
    _, cond = toy_inputs()
    return [
        {**cond, "prompt": (cond["prompt"] * (1 + 0.1 * sign * i)).requires_grad_()} for i in range(count)
    ]


def gradients(
    gradient: GradientMethod, solver: Solver, cond: Any, leaves: list[Tensor], **model: Any
) -> list[Tensor]:
    x, _ = toy_inputs()
    network = ToyNetwork()
    x0 = sample(toy_denoiser(network, **model), x, cond, solver=solver, grid=GRID, gradient=gradient).x0
    return list(torch.autograd.grad((x0**2).sum(), [*leaves, *network.parameters()]))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("solver", [Euler(), Heun(), AdamsBashforth(2)])
def test_each_steps_conditioning_gets_its_own_gradient(solver: Solver, guided: bool) -> None:
    steps, nothing = variants(4), variants(4, -1.0)
    leaves = [c["prompt"] for c in [*steps, *(nothing if guided else [])]]
    model = {"guidance_scale": 3.0, "uncond": PerStep(nothing)} if guided else {}
    plain = gradients(Plain(), solver, PerStep(steps), leaves, **model)
    exact = gradients(Exact("min"), solver, PerStep(steps), leaves, **model)
    assert all(torch.equal(a, b) for a, b in zip(plain, exact, strict=True))
    # With equal values they add up to the gradient of the one conditioning that all steps share.
    same = [{**steps[0], "prompt": steps[0]["prompt"].detach().clone().requires_grad_()} for _ in range(4)]
    each = gradients(Plain(), solver, PerStep(same), [c["prompt"] for c in same])[:4]
    (shared, *_) = gradients(Plain(), solver, steps[0], [steps[0]["prompt"]])
    torch.testing.assert_close(sum(each), shared, rtol=1e-12, atol=1e-14)


def test_a_step_uses_its_own_conditioning_at_its_end_too() -> None:
    """Heun's second stage lies on a node; the conditioning there is the step's that asks."""
    seen: list[tuple[float, float]] = []

    def network(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append((round(float(t[0]), 6), float(cond)))
        return -x

    x, _ = toy_inputs()
    steps = [torch.tensor(float(i)) for i in range(3)]
    sample(toy_denoiser(network), x, PerStep(steps), solver=Heun(), grid=[1.0, 0.7, 0.4, 0.1])
    assert seen == [(1.0, 0.0), (0.7, 0.0), (0.7, 1.0), (0.4, 1.0), (0.4, 2.0), (0.1, 2.0)]


@pytest.mark.parametrize("guided", [False, True])
def test_a_function_of_time_is_asked_at_every_evaluation(guided: bool) -> None:
    def run(gradient: GradientMethod) -> list[Tensor]:
        _, cond = toy_inputs()
        base, nothing = cond["prompt"].clone().requires_grad_(), variants(1)[0]

        def moving(t: float) -> dict[str, Any]:
            return {**cond, "prompt": base * (1 + t)}

        model = {"guidance_scale": 3.0, "uncond": nothing} if guided else {}
        leaves = [base, nothing["prompt"]] if guided else [base]
        return gradients(gradient, Heun(), moving, leaves, **model)

    assert all(torch.equal(a, b) for a, b in zip(run(Plain()), run(Exact("min")), strict=True))


def test_the_rows_of_a_table_are_one_gradient_per_step() -> None:
    """A function of time that picks from one tensor: row i's gradient is entry i's of the same run per step."""
    steps = variants(4)
    each = gradients(Exact("min"), Euler(), PerStep(steps), [c["prompt"] for c in steps])[:4]
    table = torch.stack([c["prompt"].detach() for c in steps]).requires_grad_()
    times = GRID.nodes(toy_denoiser().schedule).tolist()
    (rows, *_) = gradients(
        Exact("min"), Euler(), lambda t: {**steps[0], "prompt": table[times.index(t)]}, [table]
    )
    torch.testing.assert_close(rows, torch.stack(each), rtol=1e-13, atol=0)


def test_what_a_function_of_time_computed_before_raises_by_name() -> None:
    base = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    embedding = base * 2
    _, cond = toy_inputs()
    with pytest.raises(MissingGradientError, match="'embedding'"):
        gradients(Exact("min"), Euler(), lambda t: {**cond, "prompt": embedding * t}, [base])


def test_conditioning_that_does_not_fit_is_refused() -> None:
    steps = variants(3)
    with pytest.raises(InputError, match="3 steps and the run has 4"):
        gradients(Plain(), Euler(), PerStep(steps), [])
    with pytest.raises(InputError, match="different numbers of steps"):
        toy_denoiser(guidance_scale=2.0, uncond=PerStep(variants(4))).conditions(PerStep(steps), batch=2)
    with pytest.raises(InputError, match="at least one"):
        PerStep([])
    with pytest.raises(InputError, match="no function of time"):
        PerStep([lambda t: None])
    x, _ = toy_inputs()
    with pytest.raises(InputError, match="belongs to none"):
        toy_denoiser()(x, 0.5, PerStep(steps))
