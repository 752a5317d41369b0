"""The symplectic adjoint: plain autograd's gradient to rounding, by the method's own partner, for every tableau."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.forms import FORMS
from backdrift.gradients import GradientMethod, Plain, SymplecticAdjoint
from backdrift.gradients.numbers import live_stages
from backdrift.grids import TimeGrid
from backdrift.sampling import Solution, sample
from backdrift.schedules import VP, Flow
from backdrift.solvers import (
    RK4,
    AdamsBashforth,
    BogackiShampine,
    DormandPrince,
    DPMSolver,
    DPMSolverPP,
    Euler,
    ExplicitRungeKutta,
    Heun,
    McCallumFoster,
    Midpoint,
    Ralston,
    Solver,
    Tableau,
    ThreeEighths,
)
from problems import (
    SCHEDULES,
    GaussianNetwork,
    MixtureNetwork,
    ToyNetwork,
    condition,
    scaled_linear_table,
    start_state,
    toy_denoiser,
    toy_inputs,
)

GRID = TimeGrid("uniform", steps=3, start=1.0, end=0.05)
# "First same as last": the last stage is the next step's first; its weight is 0. And a weight of 0 amid live stages.
BOGACKI_SHAMPINE_PAIR = ExplicitRungeKutta(
    Tableau(
        ((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (2 / 9, 1 / 3, 4 / 9, 0.0),
        (0.0, 1 / 2, 3 / 4, 1.0),
    ),
    3,
)
SOLVERS = {
    "euler": Euler(),
    "heun": Heun(),
    "midpoint": Midpoint(),  # b_1 = 0
    "ralston": Ralston(),
    "bogacki-shampine": BogackiShampine(),
    "its pair": BOGACKI_SHAMPINE_PAIR,  # b_4 = 0
    "rk4": RK4(),
    "3/8": ThreeEighths(),
    "dormand-prince": DormandPrince(),  # b_2 = 0
    "dpm-solver-3": DPMSolver(3),  # a tableau of its own for each step
}


def toy_run(
    gradient: GradientMethod, solver: Solver, form: str | None = None, **model: Any
) -> tuple[Solution, list[Tensor]]:
    network = ToyNetwork()
    x, cond = toy_inputs()
    leaves = [x, cond["prompt"], cond["more"][0]]
    for leaf in leaves:
        leaf.requires_grad_()
    solution = sample(
        toy_denoiser(network, **model), x, cond, solver=solver, grid=GRID, form=form, gradient=gradient
    )
    return solution, list(torch.autograd.grad((solution.x0**2).sum(), [*leaves, *network.parameters()]))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_plain_autograd_to_rounding(name: str, form: str) -> None:
    solver = SOLVERS[name]
    if form not in solver.forms:
        pytest.skip("the solver is not made for this form")
    _, plain = toy_run(Plain(), solver, form)
    live = {"its pair": 3}.get(name, solver.evaluations(0))
    for gradient in (SymplecticAdjoint(), SymplecticAdjoint("stored")):
        solution, found = toy_run(gradient, solver, form)
        assert distance(found, plain) < 2e-14
        # The redone evaluation is the one that is differentiated; a stage without influence is left out.
        assert solution.nfe == solution.stats.calls_forward == 3 * solver.evaluations(0)
        assert solution.stats.calls_redone == solution.stats.vjps == 3 * live


@pytest.mark.parametrize("shape_differs", [False, True])
def test_guidance_in_one_call_and_in_two(shape_differs: bool) -> None:
    _, uncond = toy_inputs()
    if shape_differs:
        uncond = {**uncond, "note": "another string"}
    settings = {"guidance_scale": 3.0, "uncond": uncond}
    _, plain = toy_run(Plain(), Heun(), **settings)
    solution, found = toy_run(SymplecticAdjoint(), Heun(), **settings)
    assert distance(found, plain) < 1e-14
    assert solution.stats.calls_redone == 6 * (1 + shape_differs)


def test_live_stages() -> None:
    assert live_stages(BOGACKI_SHAMPINE_PAIR.tableau) == [0, 1, 2]
    assert live_stages(Midpoint().tableau) == [0, 1]
    unused = Tableau(((), (0.5,), (0.0, 0.5)), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5))
    assert live_stages(unused) == [0]


def gaussian_run(gradient: GradientMethod, schedule: Any, prediction: str, **settings: Any) -> list[Tensor]:
    network = GaussianNetwork(schedule, prediction)
    x, c = start_state(schedule, 1.0).requires_grad_(), condition().requires_grad_()
    x0 = sample(Denoiser(network, schedule, prediction), x, c, gradient=gradient, **settings).x0
    return list(torch.autograd.grad((x0**3).sum(), [x, c, network.mean]))


@pytest.mark.parametrize("form", FORMS)
def test_singular_ends_and_the_clean_end(form: str) -> None:
    """Flow from t = 1 to t = 0, where two of the forms step aside; a trained table to t = -1, where it ends."""
    cases: list[tuple[Any, str, TimeGrid, Solver]] = [
        (Flow(), "flow_prediction", TimeGrid("uniform", 4), Midpoint()),
        (VP.cosine(), "v_prediction", TimeGrid("uniform", 4, start=1.0, end=0.1), Midpoint()),
    ]
    if form == "exponential":
        table = VP.discrete(scaled_linear_table())
        cases.append((table, "epsilon", TimeGrid("uniform", 4, end=20.0, clean_end=True), Euler()))
    for schedule, prediction, grid, solver in cases:
        settings = {"solver": solver, "grid": grid, "form": form}
        plain = gaussian_run(Plain(), schedule, prediction, **settings)
        for gradient in (SymplecticAdjoint(), SymplecticAdjoint("stored")):
            assert distance(gaussian_run(gradient, schedule, prediction, **settings), plain) < 1e-13


def test_symplectic_euler_is_its_recursion() -> None:
    """SAG, Eq. 8: the product of step i is taken at the state that the forward step started from."""
    schedule = SCHEDULES["linear"]
    network = MixtureNetwork(schedule)
    grid = TimeGrid("logsnr", steps=5, start=1.0, end=0.02)
    x, c = start_state(schedule, 1.0).requires_grad_(), condition()
    solution = sample(
        Denoiser(network, schedule),
        x,
        c,
        grid=grid,
        form="exponential",
        gradient=SymplecticAdjoint(),
        trajectory=True,
    )
    assert solution.trajectory is not None
    (found,) = torch.autograd.grad(solution.x0.sin().sum(), x)
    times, states = solution.times, solution.trajectory
    p = states[-1].detach().cos() * schedule.alpha(times[-1])
    for i, (start, end) in reversed(list(enumerate(itertools.pairwise(times)))):
        y = (states[i].detach() / schedule.alpha(start)).requires_grad_()
        eps = network(schedule.alpha(start) * y, start.expand(2), c)
        p = p + (schedule.rho(end) - schedule.rho(start)) * torch.autograd.grad(eps, y, p)[0]
    torch.testing.assert_close(found, p / schedule.alpha(times[0]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("solver", [Midpoint(), RK4()])
def test_the_product_with_every_variation_is_conserved(solver: Solver) -> None:
    """a_i · δx_i is the same at every node, for variations δ of the discrete run: what makes the method exact."""
    schedule = SCHEDULES["linear"]
    network = MixtureNetwork(schedule)
    grid = TimeGrid("logsnr", steps=5, start=1.0, end=0.02)
    x, c = start_state(schedule, 1.0), condition()

    def states(x: Tensor, gradient: GradientMethod) -> tuple[Tensor, ...]:
        model = Denoiser(network, schedule)
        found = sample(
            model,
            x,
            c,
            solver=solver,
            grid=grid,
            form="data",
            gradient=gradient,
            trajectory=True,
            check_finite=False,
        )
        assert found.trajectory is not None
        return found.trajectory

    direction = torch.tensor([[0.3, -1.0, 0.5], [1.0, 0.2, -0.4]], dtype=torch.float64)
    _, varied = torch.func.jvp(lambda x: states(x, Plain()), (x,), (direction,))
    path = states(x.requires_grad_(), SymplecticAdjoint())
    adjoints = torch.autograd.grad(path[-1].sin().sum(), path)
    products = torch.stack([(a * d).sum() for a, d in zip(adjoints, varied, strict=True)])
    torch.testing.assert_close(products, products[-1].expand(6), rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", [AdamsBashforth(4), DPMSolverPP(), McCallumFoster()])
def test_methods_without_a_partner_are_refused_by_name(solver: Solver) -> None:
    with pytest.raises(InputError, match=r"Runge–Kutta.*Exact\(\)") as caught:
        toy_run(SymplecticAdjoint(), solver)
    assert repr(solver).split("(")[0] in str(caught.value)
    with pytest.raises(InputError, match="'recompute' or 'stored'"):
        SymplecticAdjoint("both")  # type: ignore[arg-type]
