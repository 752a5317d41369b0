"""Guided sampling: against independent few-line loops, closed forms and counts, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError
from backdrift.guidance import Adaptive, Constant, Guidance
from backdrift.guidance.attempt import plain
from backdrift.guidance.streams import Streams, stream
from backdrift.guidance.subgrids import subgrid
from backdrift.guidance.travel import renoised
from backdrift.host import Level
from backdrift.schedules import EDM, VP, Flow
from guided_runs import RHOS, STEPS, guided_run, level
from pictured import bright, denoiser, start, times_at

# -- the whole algorithm, against independent loops ------------------------------------------------


def freedom(x: Tensor, guided: range, repeats: int, w: float, s: float, seeds: list[int]) -> Tensor:
    """FreeDoM's algorithm on DDIM, written from its paper: plain torch, plain autograd."""
    schedule = VP.linear()
    model, network = denoiser(schedule, "epsilon", s)
    times = times_at(schedule, RHOS)
    generators = [stream(seed) for seed in seeds]
    for i in range(STEPS):
        (a, sg), (a2, sg2) = level(schedule, times[i]), level(schedule, times[i + 1])
        for k in range(repeats if i in guided else 1):
            if k:
                beta = (a / a2) ** 2
                xi = torch.stack([torch.randn(3, 2, 2, generator=g, dtype=torch.float64) for g in generators])
                x = math.sqrt(beta) * following + math.sqrt(1 - beta) * xi  # noqa: F821
            leaf = x.detach().requires_grad_()
            t = torch.full((len(x),), times[i], dtype=torch.float64)
            null = network(leaf, t, model.uncond)
            more = network(leaf, t, torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)) - null
            eps = null + s * more
            x0 = (leaf - sg * eps) / a
            following = (a2 * x0 + sg2 * eps).detach()
            if i in guided:
                (g,) = torch.autograd.grad(bright(x0).sum(), leaf)
                rms = lambda z: z.detach().pow(2).mean((1, 2, 3), keepdim=True).sqrt()  # noqa: E731
                following = following - w * s * rms(more) / rms(g) * g
        x = following
    return x


@pytest.mark.parametrize("repeats", [1, 3])
def test_one_step_is_freedom(repeats: int) -> None:
    x = start(2)
    guidance = bd.SymplecticAdjointGuidance(bright, 1, 0.3, 0.7, 0.2, repeats=repeats, seed=[5, 9])
    found = guided_run(guidance, x).x0
    unit = math.hypot(*level(VP.linear(), times_at(VP.linear(), RHOS)[0]))
    wanted = freedom(x * unit, range(3, 7), repeats, 0.2, 2.0, [5, 9])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (found - guided_run(None, x).x0).abs().max() > 1e-2  # and it does something


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("rule", ["paper", "uniform", "logsnr"])
def test_n_steps_are_plain_autograd_through_n_ddim_steps(n: int, rule: Any) -> None:
    """One guided step, its pull computed by hand."""
    schedule, x = VP.linear(), start(2)
    guidance = bd.SymplecticAdjointGuidance(bright, n, steps=[2], strength=Constant(0.7), subgrid=rule)
    found = guided_run(guidance, x, trajectory=True).trajectory
    free = guided_run(None, x, trajectory=True).trajectory
    torch.testing.assert_close(found[2], free[2], rtol=0, atol=0)
    times = times_at(schedule, RHOS)
    model, _ = denoiser(schedule, "epsilon", 2.0)
    leaf = free[2].detach().requires_grad_()
    nodes = subgrid(rule, n, times[2:], schedule)
    assert len(nodes) == n + 1
    assert nodes[-1] == 0.0
    y = leaf
    for t, u in itertools.pairwise(nodes):
        eps = model(y, t, torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64))
        (a, sg), (a2, sg2) = level(schedule, t), level(schedule, u)
        y = a2 * (y - sg * eps) / a + sg2 * eps
    (g,) = torch.autograd.grad(bright(y).sum(), leaf)
    unit_start, unit_end = (math.hypot(*level(schedule, t)) for t in times[2:4])
    torch.testing.assert_close(free[3] - found[3], unit_end * 0.7 * g * unit_start, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["edm", "flow"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_guidance_is_the_same_in_all_coordinates(name: str, repeats: int) -> None:
    """The same network on a variance-exploding schedule or as a flow: the same guided picture, time travel too."""
    x = start(2)
    make = lambda: bd.SymplecticAdjointGuidance(bright, 3, strength=0.3, repeats=repeats, seed=4)  # noqa: E731
    reference, found = guided_run(make(), x).x0, guided_run(make(), x, name).x0
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow_prediction"])
def test_guidance_is_the_same_for_all_predictions(prediction: str) -> None:
    x, found = start(2), []
    for kind in ("epsilon", prediction):
        model, _ = denoiser(VP.linear(), kind, 2.0)
        guidance = bd.SymplecticAdjointGuidance(bright, 2, strength=0.3, subgrid="uniform")
        cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
        found.append(bd.sample(model, x, cond, grid=bd.TimeGrid("uniform", 8), guidance=guidance).x0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_members_of_a_batch_do_not_affect_each_other() -> None:
    x = start(3)
    together = bd.SymplecticAdjointGuidance(bright, 3, repeats=2, seed=[3, 1, 4])
    whole = guided_run(together, x).x0
    for i, seed in enumerate([3, 1, 4]):
        alone = guided_run(bd.SymplecticAdjointGuidance(bright, 3, repeats=2, seed=[seed]), x[i : i + 1]).x0
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-12, atol=1e-13)


def test_the_same_seed_gives_the_same_bits_and_another_another() -> None:
    x = start(2)
    runs = [
        guided_run(bd.SymplecticAdjointGuidance(bright, 2, repeats=2, seed=seed), x).x0 for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_used_object_is_as_good_as_new() -> None:
    guidance = bd.SymplecticAdjointGuidance(bright, "adaptive", repeats=2)
    first, second = (guided_run(guidance, start(2)).x0 for _ in range(2))
    assert torch.equal(first, second)
    assert len(guidance.trace.entries) == 8


@pytest.mark.parametrize("gradient", [bd.Exact("min"), bd.Plain(), bd.SymplecticAdjoint("stored")])
@pytest.mark.parametrize("solver", [bd.Euler(), bd.Heun(), bd.RK4()])
def test_exact_methods_agree(gradient: Any, solver: Any) -> None:
    x = start(2)
    default = bd.SymplecticAdjointGuidance(bright, 2, solver=solver, subgrid="uniform")
    other = bd.SymplecticAdjointGuidance(bright, 2, solver=solver, subgrid="uniform", gradient=gradient)
    torch.testing.assert_close(guided_run(other, x).x0, guided_run(default, x).x0, rtol=1e-11, atol=1e-12)


def test_the_loss_falls_or_rises() -> None:
    x = start(4)
    free = bright(guided_run(None, x).x0)
    down = bright(guided_run(bd.SymplecticAdjointGuidance(bright, 4, strength=0.1), x).x0)
    up = bright(guided_run(bd.SymplecticAdjointGuidance(bright, 4, strength=0.1, maximize=True), x).x0)
    assert (down < free).all()
    assert (up > free).all()


def test_several_losses_add_up() -> None:
    x = start(2)
    dark = lambda images: images.pow(2).sum((1, 2, 3))  # noqa: E731
    both = [(0.5, bright), (2.0, dark)]
    listed = guided_run(bd.SymplecticAdjointGuidance(both, 2), x).x0
    by_hand = guided_run(bd.SymplecticAdjointGuidance(lambda z: 0.5 * bright(z) + 2 * dark(z), 2), x).x0
    torch.testing.assert_close(listed, by_hand, rtol=1e-12, atol=1e-13)


def test_conditioning_per_step_holds_in_its_steps() -> None:
    """Entries alike: the same as one; and an entry of a later step does not reach an estimate's first step."""
    x, cond = start(2), torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    model, _ = denoiser(VP.linear(), "epsilon", 2.0)
    times = times_at(VP.linear(), RHOS)

    def run(c: Any, n: int) -> Tensor:
        guidance = bd.SymplecticAdjointGuidance(bright, n, steps=[2], strength=Constant(0.5), subgrid="paper")
        solution = bd.sample(model, x, c, grid=bd.TimeGrid(times), guidance=guidance, trajectory=True)
        return solution.trajectory[3]

    for n in (1, 4):
        assert torch.equal(run(cond, n), run(bd.PerStep([cond] * STEPS), n))
    other = bd.PerStep([*[cond] * 5, *[cond + 1] * 5])
    assert torch.equal(run(other, 1), run(cond, 1))
    assert not torch.equal(run(other, 4), run(cond, 4))


def test_backward_guidance_is_an_option() -> None:
    """One guided step, by hand: x0 moved down the loss twice, DDIM from there, then the pull."""
    schedule, x = VP.linear(), start(2)
    options: dict[str, Any] = {"steps": [2], "strength": Constant(0.7), "backward": 2, "backward_rate": 0.05}
    found = guided_run(bd.SymplecticAdjointGuidance(bright, 1, **options), x, trajectory=True).trajectory
    times = times_at(schedule, RHOS)
    model, _ = denoiser(schedule, "epsilon", 2.0)
    (a, sg), (a2, sg2) = level(schedule, times[2]), level(schedule, times[3])
    leaf = found[2].detach().requires_grad_()
    x0 = (leaf - sg * model(leaf, times[2], torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64))) / a
    (g,) = torch.autograd.grad(bright(x0).sum(), leaf, retain_graph=True)
    moved = x0.detach()
    for _ in range(2):
        z = moved.requires_grad_()
        moved = (z - 0.05 * torch.autograd.grad(bright(z).sum(), z)[0]).detach()
    stepped = a2 * moved + sg2 * (leaf - a * moved) / sg
    torch.testing.assert_close(found[3], (stepped - 0.7 * g).detach(), rtol=1e-12, atol=1e-12)


# -- samplers with a memory ------------------------------------------------------------------------


def test_a_repeated_step_leaves_the_history_as_it_was() -> None:
    """DPM-Solver++(2M) with every step taken twice, against a loop of its own."""
    schedule, x = VP.linear(), start(2)
    times = times_at(schedule, RHOS)
    model, _ = denoiser(schedule, "epsilon", 1.0)
    travelling = Guidance(plain, bright, steps=[0], repeats=[2] * STEPS, seed=[1, 2])
    found = bd.sample(model, x, solver=bd.DPMSolverPP(), grid=bd.TimeGrid(times), guidance=travelling).x0

    noise, before, y = Streams([1, 2]), None, x
    for i in range(STEPS):
        (a, sg), (a2, sg2) = level(schedule, times[i]), level(schedule, times[i + 1])
        lam = math.log(a / sg)
        for k in range(2):
            if k:
                r = a / a2
                y = r * following + math.sqrt(sg**2 - (r * sg2) ** 2) * noise.like(x)  # noqa: F821
            x0 = model.denoised(y, times[i])
            used = x0
            if before is not None and sg2 > 0:
                ratio = (math.log(a2 / sg2) - lam) / (lam - before[0])
                used = x0 + ratio / 2 * (x0 - before[1])
            h = math.inf if sg2 == 0 else math.log(a2 / sg2) - lam
            following = sg2 / sg * y + a2 * (1 - math.exp(-h)) * used
        before, y = (lam, x0), following
    torch.testing.assert_close(found, y, rtol=1e-11, atol=1e-11)


def test_plain_steps_are_the_samplers_own() -> None:
    x = start(2)
    for solver in (bd.Euler(), bd.Heun(), bd.AdamsBashforth(3), bd.DPMSolverPP()):
        model, _ = denoiser(VP.linear(), "epsilon", 1.0)
        grid = bd.TimeGrid(times_at(VP.linear(), RHOS)[:-1])
        own = bd.sample(model, x, solver=solver, grid=grid).x0
        held = bd.sample(model, x, solver=solver, grid=grid, guidance=Guidance(plain, bright, steps=[0])).x0
        assert torch.equal(own, held)


@pytest.mark.parametrize("schedule", [VP.linear(), VP.cosine(), EDM(), Flow()])
def test_time_travel_preserves_the_marginal(schedule: Any) -> None:
    """Of data N(m, v) the state at s, sent back to t, is N(alpha_t m, alpha_t² v + sigma_t²): by its two numbers."""
    for s, t in ((0.2, 0.5), (0.0, 0.9), (0.5, min(schedule.t_max, 80.0))):
        at, to = Level(*level(schedule, s)), Level(*level(schedule, t))
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        r, spread = renoised(one, at, to, zero).item(), renoised(zero, at, to, one).item()
        assert r * at.alpha == pytest.approx(to.alpha, abs=1e-14)
        assert (r * at.sigma) ** 2 + spread**2 == pytest.approx(to.sigma**2, rel=1e-12)
    if isinstance(schedule, Flow):
        fresh = torch.randn(2, 3, dtype=torch.float64)
        assert torch.equal(renoised(torch.ones_like(fresh), at, to, fresh), fresh)
    with pytest.raises(InputError, match="noisier"):
        renoised(one, to, at, zero)


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "stages"), [(bd.Euler(), 1), (bd.Heun(), 2), (bd.RK4(), 4)])
@pytest.mark.parametrize("n", [1, 3])
def test_the_estimate_shares_the_samplers_call(solver: Any, stages: int, n: int) -> None:
    model, network = denoiser(VP.linear(), "epsilon", 2.0)
    cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    guidance = bd.SymplecticAdjointGuidance(bright, n, steps=[4], solver=solver, subgrid="uniform")
    solution = bd.sample(
        model, start(2), cond, grid=bd.TimeGrid(times_at(VP.linear(), RHOS)), guidance=guidance
    )
    (entry,) = guidance.trace.entries
    assert (entry.calls.forward, entry.calls.redone, entry.calls.vjps) == (n * stages,) * 3
    assert network.calls == STEPS - 1 + 2 * n * stages
    assert solution.nfe == solution.stats.calls_forward == STEPS - 1 + n * stages
    assert solution.stats.vjps == n * stages
    assert entry.decodes == 1


def test_halves_that_cannot_share_a_batch_are_two_calls() -> None:
    model, network = denoiser(VP.linear(), "epsilon", 2.0)
    model.uncond = None  # and a tensor: two nests that do not match
    cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    grid = bd.TimeGrid(times_at(VP.linear(), RHOS))
    guidance = bd.SymplecticAdjointGuidance(bright, 2, steps=[4])
    found = bd.sample(model, start(2), cond, grid=grid, guidance=guidance).x0
    assert guidance.trace.entries[0].calls.forward == 4
    assert network.calls == 2 * (STEPS - 1) + 8
    paired, _ = denoiser(VP.linear(), "epsilon", 2.0)
    paired.uncond = torch.zeros_like(cond)
    again = bd.sample(
        paired, start(2), cond, grid=grid, guidance=bd.SymplecticAdjointGuidance(bright, 2, steps=[4])
    )
    torch.testing.assert_close(found, again.x0, rtol=1e-12, atol=1e-12)


# -- adaptive n ------------------------------------------------------------------------------------


def test_adaptive_estimates_are_long_early_and_one_step_at_the_end() -> None:
    model, _ = denoiser(VP.linear(), "epsilon", 2.0)
    cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    grid = bd.TimeGrid("logsnr", 24, start=0.6, end=0.01, clean_end=True)
    guidance = bd.SymplecticAdjointGuidance(
        bright, Adaptive(0.01, 6), start=0.0, stop=1.0, strength=0.02, subgrid="uniform"
    )
    bd.sample(model, start(2), cond, grid=grid, guidance=guidance)
    taken = [entry.n if isinstance(entry.n, list) else [entry.n] * 2 for entry in guidance.trace.entries]
    for ns in zip(*taken, strict=True):  # each sample's
        assert ns[1] >= 3
        assert ns[-1] == 1
        assert list(ns[1:]) == sorted(ns[1:], reverse=True)


def test_adaptive_follows_eulers_law() -> None:
    """Estimates that err by C/n: the least n at which n and n + 1 steps agree to the tolerance."""
    constant, truth = 0.9, torch.ones(1, 4, dtype=torch.float64)
    adaptive = Adaptive(0.05, 50)
    adaptive.learn(3, truth + constant / 3, truth + constant / 4)
    wanted = next(n for n in range(1, 50) if constant / (n * (n + 1)) / (1 + constant / 4) <= 0.05)
    assert adaptive.choose(50) == [wanted]
    assert adaptive.choose(2) == [2]
