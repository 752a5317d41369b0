"""Reversible solvers: their authors' recursions, their orders, and pictures that come back from their noise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.conditioning import PerStep
from backdrift.errors import InputError, NonFiniteError
from backdrift.forms import Form, Node
from backdrift.solvers import Euler, Heun, Midpoint, Solver, Stepper
from problems import (
    SCHEDULES,
    GaussianNetwork,
    MixtureNetwork,
    condition,
    smooth_grid,
    start_state,
    toy_denoiser,
    toy_inputs,
)
from reversible_runs import SOLVERS
from side_by_side import known, run, slopes

SCHEDULE = SCHEDULES["linear"]


def mixture(dtype: torch.dtype = torch.float64) -> tuple[bd.Denoiser, Tensor, Tensor, Tensor]:
    """Model, noise, conditioning, and a clean picture between the mixture's centres."""
    network = MixtureNetwork(SCHEDULE).to(dtype)
    picture = (0.7 * network.means[:2] + 0.2).detach()
    return (
        bd.Denoiser(network, SCHEDULE),
        start_state(SCHEDULE, 1.0).to(dtype),
        condition().to(dtype),
        picture,
    )


def distance(found: Any, known: Any) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, known, strict=True))


def both_ways(name: str, dtype: torch.dtype, grid: bd.TimeGrid) -> tuple[float, float]:
    """How far a picture is from itself when it was encoded and decoded, and noise when it was decoded and encoded."""
    model, noise, cond, picture = mixture(dtype)
    how: dict[str, Any] = {"solver": SOLVERS[name], "grid": grid}
    with torch.no_grad():
        pair = bd.encode(model, picture, cond, **how)
        decoded = bd.sample(model, pair, cond, **how)
        sampled = bd.sample(model, noise, cond, **how)
        assert decoded.pair is not None
        assert sampled.pair is not None
        encoded = bd.encode(model, sampled.pair, cond, **how)
    assert torch.equal(decoded.x0, decoded.pair.first)
    return distance(decoded.pair, (picture, picture)), distance(encoded, (noise, noise))


@pytest.mark.parametrize(
    ("name", "rule"), [*((name, "logsnr") for name in SOLVERS), ("MF(Heun)", "uniform"), ("EDICT", "uniform")]
)
def test_a_picture_comes_back_from_its_pair_and_noise_from_its_picture(name: str, rule: str) -> None:
    """50 steps between rho = 152 and 0.01; both members of the pair are compared."""
    grid = bd.TimeGrid(rule, 50, start=1.0, end=float(SCHEDULE.t_from_rho(0.01)))
    there, back = both_ways(name, torch.float64, grid)
    assert there <= 1e-10
    assert back <= 1e-10
    there, back = both_ways(name, torch.float32, grid)
    # Reversible Heun's second mode grows where the flow contracts: measured 5e-3, and it is not the default.
    assert there <= (1e-2 if name == "ReversibleHeun" else 1e-3)
    assert back <= 1e-5  # measured: 5e-6


def test_the_default_coupling_loses_one_digit_at_any_number_of_steps() -> None:
    """zeta = 10^(-1/N); a fixed 0.9 serves 50 steps as well, and loses all of float32 in 200."""
    model, noise, cond, _ = mixture(torch.float32)
    grid = bd.TimeGrid("logsnr", 200, start=1.0, end=float(SCHEDULE.t_from_rho(0.01)))
    found = []
    for zeta in (None, 0.9):
        how: dict[str, Any] = {"solver": bd.McCallumFoster(Euler(), zeta), "grid": grid}
        with torch.no_grad():
            pair = bd.sample(model, noise, cond, **how).pair
            assert pair is not None
            found.append(distance(bd.encode(model, pair, cond, **how), (noise, noise)))
    assert found[0] < 1e-4
    assert found[1] > 1e-2


def test_mccallum_foster_is_its_authors_recursion() -> None:
    model, noise, cond, _ = mixture()
    grid = bd.TimeGrid("logsnr", 6, start=1.0, end=0.02)
    found = bd.sample(model, noise, cond, solver=bd.McCallumFoster(Midpoint(), 0.97), grid=grid)
    rho = SCHEDULE.rho(grid.nodes(SCHEDULE)).tolist()

    def slope(y: Tensor, r: float) -> Tensor:
        t = float(SCHEDULE.t_from_rho(r))
        return model(SCHEDULE.alpha(t) * y, t, cond)

    def psi(y: Tensor, r: float, h: float) -> Tensor:
        return h * slope(y + h / 2 * slope(y, r), r + h / 2)

    y = z = noise / SCHEDULE.alpha(1.0)
    for a, b in itertools.pairwise(rho):
        y = 0.97 * y + 0.03 * z + psi(z, a, b - a)
        z = z - psi(y, b, a - b)
    alpha = SCHEDULE.alpha(0.02)
    torch.testing.assert_close(tuple(found.pair or ()), (alpha * y, alpha * z), rtol=1e-9, atol=1e-9)


def test_reversible_heun_is_its_authors_recursion() -> None:
    model, noise, cond, _ = mixture()
    grid = bd.TimeGrid("logsnr", 6, start=1.0, end=0.02)
    found = bd.sample(model, noise, cond, solver=bd.ReversibleHeun(), grid=grid, form="original")
    form = Form("original", SCHEDULE, "epsilon", lambda x, t: model(x, t, cond))
    y = z = noise
    for a, b in itertools.pairwise(grid.nodes(SCHEDULE).tolist()):
        before = form.drift(z, a)
        z = 2 * y - z + (b - a) * before
        y = y + (b - a) / 2 * (before + form.drift(z, b))
    torch.testing.assert_close(tuple(found.pair or ()), (y, z), rtol=1e-11, atol=1e-11)
    assert found.nfe == 7


def test_edict_is_its_authors_two_ddim_chains() -> None:
    """In x, as published: affine DDIM steps at the step's first time, mixed with p, roles swapped every step."""
    model, noise, cond, _ = mixture()
    grid = bd.TimeGrid("uniform", 7, start=1.0, end=0.02)
    found = bd.sample(model, noise, cond, solver=bd.EDICT(0.9), grid=grid)
    chains = [noise, noise]
    for i, (t, s) in enumerate(itertools.pairwise(grid.nodes(SCHEDULE).tolist())):
        a, b = (SCHEDULE.alpha(u) for u in (t, s))
        weight = SCHEDULE.sigma(s) - SCHEDULE.sigma(t) * b / a
        one, two = i % 2, 1 - i % 2
        chains[one] = b / a * chains[one] + weight * model(chains[two], t, cond)
        # The published step asks for the second slope at the moved state, taken back to the first time's scale.
        chains[two] = b / a * chains[two] + weight * model(a / b * chains[one], t, cond)
        chains[one] = 0.9 * chains[one] + 0.1 * chains[two]
        chains[two] = 0.9 * chains[two] + 0.1 * chains[one]
    torch.testing.assert_close(tuple(found.pair or ()), tuple(chains), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "form", "steps"),
    [("MF(Euler)", "exponential", 40), ("MF(Midpoint)", "data", 16), ("MF(RK4)", "original", 12)],
)
def test_coupling_keeps_the_coupled_methods_order(name: str, form: str, steps: int) -> None:
    """On a mixture, for the state and the gradients by x_T, cond and weights. (The others: test_solver_orders.py.)"""
    coarse, fine = (run("linear", form, SOLVERS[name], n) for n in (steps, 2 * steps))
    for slope in slopes(coarse, fine, known("linear"))[1]:
        assert abs(slope - SOLVERS[name].order) <= 0.25


class Exponential(Solver, Stepper):
    """A one-step method that is no tableau: Euler's, written by hand."""

    order = 1

    def begin(self) -> Stepper:
        return self

    def evaluations(self, index: int) -> int:
        return 1

    @property
    def aside(self) -> Solver:
        return self

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        return form.scale(b.t) * (x / form.scale(a.t) + (b.s - a.s) * form.drift(x, a.t))


def test_any_one_step_method_can_be_coupled() -> None:
    model, noise, cond, picture = mixture()
    how: dict[str, Any] = {"grid": smooth_grid("linear", 20)}
    ours, known = (bd.McCallumFoster(base, 0.95) for base in (Exponential(), Euler()))
    with torch.no_grad():
        found, expected = (bd.sample(model, noise, cond, solver=s, **how).x0 for s in (ours, known))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        pair = bd.encode(model, picture, cond, solver=ours, **how)
        assert distance(bd.sample(model, pair, cond, solver=ours, **how).pair, (picture, picture)) < 1e-11


@pytest.mark.parametrize("form", ["original", "exponential", "data"])
@pytest.mark.parametrize("name", ["MF(Heun)", "ReversibleHeun", "EDICT"])
def test_flow_pictures_come_back_from_pure_noise_on_every_form(name: str, form: str) -> None:
    """From t = 0 to t = 1: where a form is infinite at an end, a step on another one is undone just the same."""
    network = GaussianNetwork(bd.Flow(), "flow_prediction")
    model = bd.Denoiser(network, bd.Flow(), "flow_prediction")
    picture, cond = start_state(bd.Flow(), 1.0), condition()
    how: dict[str, Any] = {"solver": SOLVERS[name], "grid": bd.TimeGrid("uniform", 16), "form": form}
    with torch.no_grad():
        pair = bd.encode(model, picture, cond, **how)
        solution = bd.sample(model, pair, cond, **how)
    assert distance(solution.pair, (picture, picture)) < 1e-11
    counts = {"MF(Heun)": 64, "EDICT": 32, "ReversibleHeun": 17 if form == "original" else 18}
    assert solution.nfe == counts[name]


@pytest.mark.parametrize("name", SOLVERS)
def test_encoding_approximates_the_exact_way_back_to_noise(name: str) -> None:
    """The flow of Gaussian data is known in closed form, in both directions."""
    network = GaussianNetwork(SCHEDULE, "epsilon")
    model, picture, cond = bd.Denoiser(network, SCHEDULE), start_state(SCHEDULE, 1.0), condition()
    errors = []
    with torch.no_grad():
        known = network.solution(picture, cond, 0.02, 1.0)
        for steps in (40, 80):
            pair = bd.encode(model, picture, cond, solver=SOLVERS[name], grid=smooth_grid("linear", steps))
            errors.append(float((pair.first - known).norm() / known.norm()))
    assert errors[1] < {1: 0.5, 2: 0.02, 4: 2e-5}[SOLVERS[name].order]
    assert errors[0] / errors[1] > 1.5 ** SOLVERS[name].order


def test_conditioning_per_step_is_undone_step_by_step() -> None:
    model, _, cond, picture = mixture()
    steps = PerStep([cond * i / 4 for i in range(8)])
    for name in ("MF(Heun)", "EDICT", "ReversibleHeun"):
        how: dict[str, Any] = {"solver": SOLVERS[name], "grid": smooth_grid("linear", 8)}
        with torch.no_grad():
            pair = bd.encode(model, picture, steps, **how)
            assert distance(bd.sample(model, pair, steps, **how).pair, (picture, picture)) < 1e-11, name
            other = bd.sample(model, pair, PerStep(steps[::-1]), **how)
            assert distance(other.pair, (picture, picture)) > 1e-2
    with pytest.raises(InputError, match="8 steps and the run has 5"):
        bd.encode(model, picture, steps, grid=smooth_grid("linear", 5))


def test_guided_pictures_come_back_and_one_member_alone_leads_elsewhere() -> None:
    x, cond = toy_inputs()
    _, uncond = toy_inputs()
    model = toy_denoiser(guidance_scale=4.0, uncond={**uncond, "prompt": -uncond["prompt"]})
    how: dict[str, Any] = {"solver": bd.McCallumFoster(), "grid": bd.TimeGrid("logsnr", 20, end=0.05)}
    with torch.no_grad():
        pair = bd.encode(model, x, cond, **how)
        assert distance(bd.sample(model, pair, cond, **how).pair, (x, x)) < 1e-10
        alone = bd.sample(model, pair.first, cond, **how).x0
    assert float((alone - x).norm() / x.norm()) > 1e-3


def test_gradients_flow_from_a_pair_and_through_encoding() -> None:
    """By finite differences in float64."""
    model, _, cond, picture = mixture()
    how: dict[str, Any] = {"solver": bd.EDICT(), "grid": smooth_grid("linear", 12)}
    weights = torch.tensor([[0.3, -1.0, 0.5], [1.0, 0.2, -0.7]], dtype=torch.float64)

    def value(x: Tensor, c: Tensor) -> Tensor:
        pair = bd.encode(model, x, c, **how)
        moved = bd.Pair(pair.first, 0.9 * pair.second)
        return (weights * bd.sample(model, moved, c, **how).x0).sum()

    x, c = picture.clone().requires_grad_(), cond.clone().requires_grad_()
    grads = torch.autograd.grad(value(x, c), [x, c])
    step = 1e-6
    for which, grad in enumerate(grads):
        for place in ((0, 1), (1, 2)):
            values = []
            for sign in (1, -1):
                point = [picture.clone(), cond.clone()]
                point[which][place] += sign * step
                with torch.no_grad():
                    values.append(float(value(*point)))
            assert float(grad[place]) == pytest.approx(
                (values[0] - values[1]) / (2 * step), rel=1e-6, abs=1e-7
            )


def test_the_trajectory_is_one_of_pairs() -> None:
    model, noise, cond, _ = mixture()
    solver, grid = bd.McCallumFoster(zeta=0.95), smooth_grid("linear", 8)
    solution = bd.sample(model, noise, cond, solver=solver, grid=grid, trajectory=True)
    assert solution.pairs is not None
    assert solution.trajectory is not None
    assert all(a is b.first for a, b in zip(solution.trajectory, solution.pairs, strict=True))
    times = grid.nodes(SCHEDULE)
    rest = bd.sample(model, solution.pairs[3], cond, solver=solver, grid=times[3:])
    torch.testing.assert_close(rest.x0, solution.x0, rtol=1e-13, atol=1e-13)
    plain = bd.sample(model, noise, cond, solver=Heun(), grid=grid, trajectory=True)
    assert plain.pairs is None
    assert plain.pair is None


def test_half_precision_pictures_are_encoded_in_float32() -> None:
    model, _, cond, picture = mixture(torch.float32)
    pair = bd.encode(model, picture.bfloat16(), cond, grid=smooth_grid("linear", 4))
    assert pair.first.dtype == pair.second.dtype == torch.float32


def test_what_cannot_be_undone_is_refused_by_name() -> None:
    model, noise, cond, picture = mixture()
    pair = bd.Pair(noise, noise)
    with pytest.raises(InputError, match=r"AdamsBashforth\(4\), a multistep method"):
        bd.McCallumFoster(bd.AdamsBashforth(4))
    with pytest.raises(InputError, match="no solver"):
        bd.McCallumFoster("heun")  # type: ignore[arg-type]
    for zeta in (0.0, 1.5, float("nan"), True):
        with pytest.raises(InputError, match="above 0 and at most 1"):
            bd.McCallumFoster(zeta=zeta)
    with pytest.raises(InputError, match="p must be a number"):
        bd.EDICT(-0.1)
    with pytest.raises(InputError, match=r"Heun\(\) cannot be undone"):
        bd.encode(model, picture, cond, solver=Heun())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Euler\(\) steps from one tensor"):
        bd.sample(model, pair, cond)
    with pytest.raises(InputError, match="alike in shape"):
        bd.sample(model, bd.Pair(noise, noise[:1]), cond, solver=bd.EDICT())
    with pytest.raises(InputError, match="x_T must be a floating tensor"):
        bd.sample(model, (noise, noise), cond, solver=bd.EDICT())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="x0 must be a floating tensor"):
        bd.encode(model, picture.long(), cond)
    with pytest.raises(InputError, match="fitted"):
        bd.McCallumFoster().begin().step(Form("data", SCHEDULE, "epsilon"), noise, Node(1, 0.1), Node(0.5, 1))


def test_a_state_that_is_not_finite_names_the_step_of_the_encoding() -> None:
    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return x / 0 if 0.5 < float(t[0]) < 0.7 else x

    model = bd.Denoiser(network, bd.Flow(), "flow_prediction")
    with pytest.raises(NonFiniteError, match=r"step 3 of 4, from t = 0\.4 to 0\.6"):
        bd.encode(model, torch.ones(1, 2), solver=bd.McCallumFoster(), grid=[0.8, 0.6, 0.4, 0.2, 0.0])
