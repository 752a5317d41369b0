"""The choices of steps, and `sample(through=...)` against loops written by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError, UnsupportedError
from backdrift.through import Chosen, Through
from backdrift.trace import clipped

N = 6
GRID = [0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.02]

# ---------------------------------------------------------------------------- the choices


def test_what_the_choices_come_to() -> None:
    assert bd.All().choose(3) == Chosen(3, (0, 1, 2), 0)
    assert bd.Last(2).choose(5) == Chosen(5, (3, 4), 3)
    assert bd.Last(5).choose(5) == Chosen(5, (0, 1, 2, 3, 4), 0)
    assert bd.Steps([-1, 0]).choose(4) == Chosen(4, (0, 3), 0)
    assert bd.Steps(range(-2, 0)).choose(4).steps == bd.Last(2).choose(4).steps


def test_random_steps_are_uniform_and_depend_on_seed_and_draw_alone() -> None:
    drawn = [bd.Random(2, seed=3).choose(5, i).steps for i in range(2000)]
    assert drawn == [bd.Random(2, seed=3).at(i).choose(5).steps for i in range(2000)]
    assert drawn[7:] == [bd.Random(2, seed=3, first=7).choose(5, i).steps for i in range(1993)]
    counts = Counter(drawn)
    assert len(counts) == math.comb(5, 2)
    expected = 2000 / 10
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < 27.9  # 99.9 % of chi-squared with 9 degrees of freedom
    other = [bd.Random(2, seed=4).choose(5, i).steps for i in range(2000)]
    assert sum(a == b for a, b in zip(drawn, other, strict=True)) < 300


@pytest.mark.parametrize(
    "through",
    [
        bd.All(),
        bd.All(clip_step=0.5),
        bd.Last(3),
        bd.Last(3, detach_input=True, discount=0.9),
        bd.Random(4, seed=7),
        bd.Random(1, input_discount=0.25, first=2),
        bd.Steps([0, 5, -1]),
        bd.Steps([2], clip_step=1e-3),
    ],
)
def test_text_and_choice_are_the_same(through: Through) -> None:
    assert Through.parse(through.spec) == through
    assert Through.parse(through) is through
    assert through.exact == (through == bd.All())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bd.Last(0), "1 or more"),
        (lambda: bd.Last(2.0), "whole number"),  # type: ignore[arg-type]
        (lambda: bd.Last(True), "whole number"),
        (lambda: bd.Random(2, seed=-1), "seed"),
        (lambda: bd.Steps([]), "no gradient at all"),
        (lambda: bd.Steps([1.0]), "whole numbers"),  # type: ignore[list-item]
        (lambda: bd.Steps("1,2"), "list of whole numbers"),  # type: ignore[arg-type]
        (lambda: bd.Steps([1], decay=0.5), "no option 'decay'"),
        (lambda: bd.All(discount=0.0), r"in \(0, 1\]"),
        (lambda: bd.All(discount=1.5), r"in \(0, 1\]"),
        (lambda: bd.All(input_discount=0), "detach_input=True"),
        (lambda: bd.All(detach_input=True, input_discount=0.5), "one of them"),
        (lambda: bd.All(clip_step=0), "positive"),
        (lambda: Through.parse("first:3"), "none of 'all'"),
        (lambda: Through.parse("last"), "none of 'all'"),
        (lambda: Through.parse("last:3,4"), "none of 'all'"),
        (lambda: Through.parse("last:3,discount=much"), "none of 'all'"),
        (lambda: Through.parse("last:3,decay=0.5"), "none of 'all'"),
        (lambda: Through.parse(3), "must be All"),
        (lambda: Through.parse(bd.Last), "without brackets"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


# ---------------------------------------------------------------------------- sample


class Wave(nn.Module):
    """A small network with weights, time and conditioning in it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(
            torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x @ self.mix + cond * t[:, None]) + 0.1 * x


def start() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[1.0, -0.4, 0.7], [-0.3, 0.8, -1.1]], dtype=torch.float64)
    return x, torch.tensor([[0.2, -0.1, 0.3], [0.0, 0.4, -0.2]], dtype=torch.float64)


def by_hand(
    network: Wave,
    x: Tensor,
    cond: Tensor,
    carrying: Any,
    *,
    heun: bool = False,
    cut: int = 0,
    detach_input: bool = False,
    discount: float = 1.0,
) -> Tensor:
    """Rectified flow dx/dt = u(x, t), stepped by Euler's or Heun's method."""

    def velocity(x: Tensor, t: float, step: int) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.float64)
        if step in carrying:
            return network(x.detach() if detach_input else x.view_as(x), times, cond)
        with torch.no_grad():
            return network(x, times, cond)

    for i, (a, b) in enumerate(itertools.pairwise(GRID)):
        if i == cut:
            x = x.detach() if cut else x
        with torch.set_grad_enabled(i >= cut):
            u = velocity(x, a, i)
            ahead = x + (b - a) * u
            x = x + (b - a) / 2 * (u + velocity(ahead, b, i)) if heun else ahead
        if discount != 1 and i + 1 < N and x.requires_grad:
            x = discount * x + (1 - discount) * x.detach()
    return x


def loss_of(x: Tensor) -> Tensor:
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() + x.square().sum()


CHOICES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "last": (bd.Last(2), False, {"carrying": [4, 5], "cut": 4}),
    "steps": (bd.Steps([0, 3]), True, {"carrying": [0, 3]}),
    "detached": (bd.Steps([1, 4], detach_input=True), True, {"carrying": [1, 4], "detach_input": True}),
    "random": (bd.Random(3, seed=2), True, {"carrying": bd.Random(3, seed=2).choose(N).steps}),
    "discounted": (bd.All(discount=0.5), True, {"carrying": range(N), "discount": 0.5}),
}


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_sample_equals_torch_code_by_hand(choice: str, heun: bool) -> None:
    through, by_noise, hand = CHOICES[choice]
    network, (x, cond) = Wave(), start()
    x.requires_grad_(by_noise)
    cond.requires_grad_()
    leaves = [network.mix, cond, *([x] if by_noise else [])]
    known = by_hand(network, x, cond, heun=heun, **hand)
    wanted = torch.autograd.grad(loss_of(known), leaves)
    full = torch.autograd.grad(loss_of(by_hand(network, x, cond, range(N), heun=heun)), leaves)
    assert not torch.allclose(full[0], wanted[0], rtol=1e-3)

    model = bd.Denoiser(network, bd.Flow(), "flow_prediction")
    solver = bd.Heun() if heun else bd.Euler()
    found = {}
    for gradient in (bd.Plain(), bd.Exact("min"), bd.Exact("max")):
        network.calls = 0
        solution = bd.sample(
            model, x, cond, solver=solver, grid=GRID, form="original", gradient=gradient, through=through
        )
        per_step = 2 if heun else 1
        assert network.calls == N * per_step == solution.nfe
        torch.testing.assert_close(solution.x0, known, rtol=1e-14, atol=1e-15)
        found[repr(gradient)] = torch.autograd.grad(loss_of(solution.x0), leaves)
        in_graph = len(list(hand["carrying"])) * per_step
        again = {"Plain()": 0, "Exact(memory='min')": in_graph - 1, "Exact(memory='max')": 0}[repr(gradient)]
        assert network.calls == N * per_step + again
        assert solution.trace is not None
        assert solution.trace.steps == tuple(hand["carrying"])
        for a, b in zip(found[repr(gradient)], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for gradients in found.values():  # the same bits, whatever is kept
        assert all(torch.equal(a, b) for a, b in zip(gradients, found["Plain()"], strict=True))


@pytest.mark.parametrize("solver", [bd.AdamsBashforth(3), bd.DPMSolverPP(), bd.RK4()])
def test_last_steps_are_those_of_a_run_that_starts_there_in_weights_and_conditioning(solver: Any) -> None:
    """One-step methods: the last K steps are a run from the state there. Multistep: exact and plain agree, and the
    gradient differs from the full one."""
    network, (x, cond) = Wave(), start()
    cond.requires_grad_()
    model = bd.Denoiser(network, bd.VP.linear())
    grid = bd.TimeGrid("logsnr", steps=N, start=0.9, end=0.05)
    leaves = [network.mix, cond]
    grads = {}
    for name, gradient, through in [
        ("plain", bd.Plain(), bd.Last(2)),
        ("exact", bd.Exact("min"), bd.Last(2)),
        ("steps", bd.Exact("min"), bd.Steps([4, 5])),
        ("all", bd.Exact("min"), bd.All()),
    ]:
        solution = bd.sample(
            model, x, cond, solver=solver, grid=grid, gradient=gradient, through=through, trajectory=True
        )
        grads[name] = torch.autograd.grad(loss_of(solution.x0), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads["plain"], grads["exact"], strict=True))
    # Without a gradient at the noise the cut takes nothing away that the weights have.
    assert all(torch.equal(a, b) for a, b in zip(grads["steps"], grads["exact"], strict=True))
    assert not torch.allclose(grads["all"][0], grads["exact"][0], rtol=1e-3)
    if isinstance(solver, bd.RK4):
        assert solution.trajectory is not None
        part = bd.sample(
            model,
            solution.trajectory[4].detach(),
            cond,
            solver=solver,
            grid=solution.times[4:].tolist(),
            gradient=bd.Exact("min"),
        )
        for a, b in zip(torch.autograd.grad(loss_of(part.x0), leaves), grads["exact"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_input_discount_lies_between_none_and_all() -> None:
    """The gradient is a polynomial in g with the known ends g = 0 (detached) and g = 1; one step by hand."""
    network, (x, cond) = Wave(), start()
    x.requires_grad_()
    model = bd.Denoiser(network, bd.Flow(), "flow_prediction")

    def gradient(**options: Any) -> Tensor:
        x0 = bd.sample(model, x, cond, grid=[0.9, 0.5], through=bd.All(**options)).x0
        return torch.autograd.grad(loss_of(x0), x)[0]

    ends = gradient(detach_input=True), gradient()
    torch.testing.assert_close(gradient(input_discount=0.3), ends[0] + 0.3 * (ends[1] - ends[0]))
    x0 = bd.sample(model, x, cond, grid=[0.9, 0.5]).x0.detach().requires_grad_()
    torch.testing.assert_close(ends[0], torch.autograd.grad(loss_of(x0), x0)[0])  # x' = x + h u: dx'/dx = 1


# ---------------------------------------------------------------------------- nothing in silence


def test_what_would_get_no_gradient_raises_before_the_run() -> None:
    network, (x, cond) = Wave(), start()
    model = bd.Denoiser(network, bd.VP.linear())
    grid = bd.TimeGrid("logsnr", steps=3, start=0.9, end=0.05)
    with pytest.raises(MissingGradientError, match=r"x_T requires grad.*Steps\(range\(2, 3\)\)"):
        bd.sample(model, x.clone().requires_grad_(), cond, grid=grid, through="last:1")
    noises = [torch.randn_like(x).requires_grad_() for _ in range(3)]
    with pytest.raises(MissingGradientError, match="the noise of step 0"):
        bd.sample(model, x, cond, grid=grid, solver=bd.Ancestral(), noise=noises, through="last:1")
    conds = bd.PerStep([cond.clone().requires_grad_() for _ in range(3)])
    with pytest.raises(MissingGradientError, match="cond of step 0 requires grad"):
        bd.sample(model, x, conds, grid=grid, through=bd.Steps([1, 2]))
    assert network.calls == 0
    shared = bd.PerStep([conds[1], conds[1], conds[2]])  # used in a chosen step, too
    loss_of(bd.sample(model, x, shared, grid=grid, through=bd.Steps([1, 2])).x0).backward()
    assert bool(conds[1].grad.any())
    assert bool(conds[2].grad.any())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient": bd.ContinuousAdjoint()}, "ContinuousAdjoint.*as a whole.*Exact"),
        ({"gradient": bd.SymplecticAdjoint()}, "SymplecticAdjoint.*as a whole.*Exact"),
        ({"gradient": bd.AdjointDEIS(2)}, "AdjointDEIS.*as a whole.*Exact"),
        ({"gradient": bd.Reversible(), "solver": bd.ReversibleHeun()}, "Reversible.*as a whole"),
        ({"solver": bd.ReversibleHeun()}, "ReversibleHeun.*pair of states"),
    ],
)
@pytest.mark.parametrize("through", [bd.Last(1), bd.All(clip_step=1.0), bd.All(discount=0.9)])
def test_methods_of_whole_runs_refuse_by_name(settings: dict[str, Any], words: str, through: Any) -> None:
    x, cond = start()
    model = bd.Denoiser(Wave(), bd.VP.linear())
    with pytest.raises(UnsupportedError, match=words):
        bd.sample(model, x, cond, grid=[0.9, 0.5, 0.1], through=through, **settings)


def test_times_with_a_gradient_and_transforms_are_refused() -> None:
    x, cond = start()
    model = bd.Denoiser(Wave(), bd.VP.linear())
    times = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedError, match="times that require grad"):
        bd.sample(model, x, cond, grid=times, through=bd.Last(1))

    def end(x: Tensor, through: Any) -> Tensor:
        return bd.sample(model, x, cond, grid=[0.9, 0.5, 0.1], gradient=bd.Plain(), through=through).x0.sum()

    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(end)(x, "steps:0")
    assert torch.func.grad(end)(x, "all").shape == x.shape


def test_all_changes_no_bit_and_batched_and_second_gradients_still_work() -> None:
    network, (x, cond) = Wave(), start()
    x.requires_grad_()
    model = bd.Denoiser(network, bd.VP.linear())
    solution = bd.sample(model, x, cond, grid=[0.9, 0.5, 0.1], gradient=bd.Plain())
    identity = torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    jacobian = torch.autograd.grad(solution.x0, x, identity, retain_graph=True, is_grads_batched=True)[0]
    rows = [torch.autograd.grad(solution.x0, x, row, retain_graph=True)[0] for row in identity]
    torch.testing.assert_close(jacobian, torch.stack(rows))
    (first,) = torch.autograd.grad(loss_of(solution.x0), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert bool(second.any())


# ---------------------------------------------------------------------------- the trace


def test_the_trace_of_a_linear_run_is_known() -> None:
    """dx/dt = g x by Euler: each step multiplies by 1 + g h, and so does the adjoint on its way back."""
    rate = 40.0
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    model = bd.Denoiser(lambda x, t, cond: -rate * x, bd.Flow(), "flow_prediction")
    solution = bd.sample(model, x, grid=GRID)
    (solution.x0.sum()).backward()
    steps = [1 + rate * (a - b) for a, b in itertools.pairwise(GRID)]
    trace = solution.trace
    assert trace is not None
    assert trace.growth == pytest.approx(steps, rel=1e-12)
    assert trace.latents[-1] == pytest.approx(6**0.5)
    assert trace.latents[0] == pytest.approx(math.prod(steps) * 6**0.5, rel=1e-12)
    widths = [a - b for a, b in itertools.pairwise(GRID)]
    assert trace.eps == pytest.approx(
        [h * a for h, a in zip(widths, trace.latents[1:], strict=True)], rel=1e-12
    )
    assert trace.exploding  # 7^5 · 6.2 is more than 1000
    short = bd.sample(model, x, grid=GRID, through=bd.All(clip_step=1.0))
    short.x0.sum().backward()
    assert short.trace is not None
    assert short.trace.clipped == tuple(range(1, N + 1))
    # Each of the two samples arrives with norm 1 in each step's end, and leaves its beginning grown by one step.
    assert short.trace.latents[:-1] == pytest.approx([2**0.5 * step for step in steps], rel=1e-12)


def test_no_trace_without_a_gradient() -> None:
    x, cond = start()
    model = bd.Denoiser(Wave(), bd.VP.linear())
    with torch.no_grad():
        assert bd.sample(model, x, cond, grid=[0.9, 0.5, 0.1], through=bd.Last(1)).trace is None
    assert bd.sample(model, x, cond, grid=[0.9, 0.5, 0.1], gradient=bd.ContinuousAdjoint()).trace is None


def test_clipping_scales_the_long_rows_only() -> None:
    grad = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("inf"), 1.0]])
    found, any_ = clipped(grad, 1.0)
    torch.testing.assert_close(found[0], torch.tensor([0.6, 0.8]))
    assert torch.equal(found[1:], grad[1:])
    assert bool(any_)
    half, _ = clipped(torch.full((1, 4), 60000.0, dtype=torch.float16), 1.0)  # the norm is beyond float16
    torch.testing.assert_close(half.float(), torch.full((1, 4), 0.5), rtol=1e-3, atol=0)
