"""Guided sampling: against independent few-line loops, closed forms and counts, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError
from backdrift.guidance import Adaptive, Constant, Guidance, Relative
from backdrift.guidance.attempt import plain
from backdrift.guidance.streams import Streams
from backdrift.guidance.subgrids import subgrid
from backdrift.guidance.travel import renoised
from backdrift.guidance.when import When
from backdrift.host import Level
from backdrift.schedules import EDM, VP, Flow
from pictured import SCHEDULES, bright, denoiser, start, times_at

RHOS = [8.0, 5.0, 3.2, 2.1, 1.4, 0.9, 0.55, 0.3, 0.15, 0.06]
STEPS = len(RHOS)


def level(schedule: Any, t: float) -> tuple[float, float]:
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def guided_run(guidance: Any, x: Tensor, name: str = "vp", scale: float = 2.0, **kwargs: Any) -> Any:
    schedule, prediction = SCHEDULES[name]
    model, _ = denoiser(schedule, prediction, scale)
    times = times_at(schedule, RHOS)
    cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    first = x * math.hypot(*level(schedule, times[0]))
    return bd.sample(
        model, first, cond, grid=bd.TimeGrid(times), form="exponential", guidance=guidance, **kwargs
    )


# -- the whole algorithm, against independent loops ------------------------------------------------


def freedom(x: Tensor, guided: range, repeats: int, w: float, s: float, seeds: list[int]) -> Tensor:
    """FreeDoM's algorithm on DDIM, written from its paper: plain torch, plain autograd."""
    schedule = VP.linear()
    model, network = denoiser(schedule, "epsilon", s)
    times = times_at(schedule, RHOS)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
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
    ns = [entry.n for entry in guidance.trace.entries]
    assert ns[1] >= 3
    assert ns[-1] == 1
    assert ns[1:] == sorted(ns[1:], reverse=True)


def test_adaptive_follows_eulers_law() -> None:
    """Estimates that err by C/n: the least n at which n and n + 1 steps agree to the tolerance."""
    constant, truth = 0.9, torch.ones(1, 4, dtype=torch.float64)
    adaptive = Adaptive(0.05, 50)
    adaptive.learn(3, truth + constant / 3, truth + constant / 4)
    wanted = next(n for n in range(1, 50) if constant / (n * (n + 1)) / (1 + constant / 4) <= 0.05)
    assert adaptive.choose(50) == wanted
    assert adaptive.choose(2) == 2


# -- what is refused -------------------------------------------------------------------------------


def detached(images: Tensor) -> Tensor:
    return images.detach().sum((1, 2, 3))


def one_number(images: Tensor) -> Tensor:
    return images.sum()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: bd.SymplecticAdjointGuidance(bright, 5, start=0.3, stop=0.9),
            "n = 5 is more than the 4 steps",
        ),
        (lambda: bd.SymplecticAdjointGuidance(bright, 1, steps=[3, 10]), "step 10 is out of range"),
        (lambda: bd.SymplecticAdjointGuidance(bright, 1, steps=[True] * 3), "mask has 3 values"),
        (lambda: bd.SymplecticAdjointGuidance(bright, 1, 0.31, 0.39), "no step of 10 lies between"),
        (lambda: bd.SymplecticAdjointGuidance(bright, 1, repeats=[1, 2]), "repeats has 2 numbers"),
        (lambda: bd.SymplecticAdjointGuidance(bright, [1, 2]), "n has 2 numbers"),
        (lambda: bd.SymplecticAdjointGuidance(one_number), "one value per sample"),
        (lambda: bd.SymplecticAdjointGuidance(detached), "does not depend on the picture"),
        (lambda: bd.SymplecticAdjointGuidance(bright, seed=[1, 2, 3], repeats=2), "3 seeds for 2 samples"),
    ],
)
def test_bad_input_is_refused_before_any_sampling(make: Any, words: str) -> None:
    model, network = denoiser()
    guidance = make()
    with pytest.raises(InputError, match=words):
        bd.sample(model, start(2), grid=bd.TimeGrid(times_at(VP.linear(), RHOS)), guidance=guidance)
    assert network.calls == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, "n is a whole number"),
        ({"n": "many"}, "n is a whole number"),
        ({"strength": 0}, "a strength is a positive number"),
        ({"strength": -0.2}, "maximize=True"),
        ({"start": 0.7, "stop": 0.3}, "start < stop"),
        ({"repeats": 0}, "repeats are whole numbers"),
        ({"subgrid": "karras"}, "subgrid must be one of"),
        ({"solver": bd.AdamsBashforth(2)}, "no partner"),
        ({"solver": bd.EDICT()}, "explicit solver"),
        ({"seed": -1}, "seed is a whole number"),
        ({"decode": 3}, "decode must be callable"),
        ({"backward": -1}, "backward is a whole number"),
        ({"backward_rate": 0.0}, "backward_rate must be positive"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bd.SymplecticAdjointGuidance(bright, **settings)


def test_what_would_get_no_gradient_is_refused() -> None:
    model, network = denoiser()
    x = start(2).requires_grad_()
    guidance = bd.SymplecticAdjointGuidance(bright, 1)
    with pytest.raises(MissingGradientError, match="x_T requires grad"):
        bd.sample(model, x, guidance=guidance)
    with pytest.raises(InputError, match="leave out gradient="):
        bd.sample(model, start(2), guidance=guidance, gradient=bd.Exact())
    assert network.calls == 0
    with torch.no_grad():
        assert bd.sample(model, x, guidance=guidance).x0.isfinite().all()


def test_states_that_are_no_pictures_want_a_decoder() -> None:
    network = torch.nn.Identity()
    model = bd.Denoiser(lambda x, t, c: network(x), VP.linear())
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="give the guidance decode="):
        bd.sample(model, x, guidance=bd.SymplecticAdjointGuidance(bright, 1))
    decoded = bd.SymplecticAdjointGuidance(bright, 1, decode=lambda x0: x0[:, :3] + x0[:, 3:])
    by_loss = bd.SymplecticAdjointGuidance(lambda z: bright(z), 1, decode=lambda x0: x0[:, :3] + x0[:, 3:])
    assert torch.equal(*(bd.sample(model, x, guidance=g).x0 for g in (decoded, by_loss)))
    assert not torch.equal(bd.sample(model, x, guidance=decoded).x0, bd.sample(model, x).x0)


def test_a_video_is_scored_frame_by_frame() -> None:
    """Clean samples decoded to (B, F, 3, H, W): the loss is the mean over the frames, each with its sample's prompt."""
    x, seen = start(2), []

    def of_frames(images: Tensor, prompts: Any) -> Tensor:
        seen.append((len(images), prompts))
        return bright(images)

    def video(x0: Tensor) -> Tensor:
        return torch.stack([x0, 0.5 * x0, x0.flip(-1)], 1)

    options: dict[str, Any] = {"prompts": ["one", "two"], "strip": True}
    framed = bd.SymplecticAdjointGuidance(of_frames, 2, decode=video, **options)
    by_hand = bd.SymplecticAdjointGuidance(
        lambda z: (bright(z) + bright(0.5 * z) + bright(z.flip(-1))) / 3, 2
    )
    torch.testing.assert_close(guided_run(framed, x).x0, guided_run(by_hand, x).x0, rtol=1e-12, atol=1e-13)
    assert seen[-1] == (6, ["one"] * 3 + ["two"] * 3)
    assert framed.trace.strip(1).shape == (4, 3, 2, 2)


# -- pieces ----------------------------------------------------------------------------------------


def test_subgrids() -> None:
    schedule = VP.discrete(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
    times = [float(t) for t in range(990, -1, -10)] + [-1.0]  # a sampler's 100 calls, and the clean end
    assert subgrid("paper", 4, times[30:], schedule) == [690.0, 460.0, 230.0, 0.0, -1.0]
    assert subgrid("paper", 1, times[30:], schedule) == [690.0, -1.0]
    assert subgrid("paper", 4, times[97:], schedule) == [20.0, 10.0, 0.0, -1.0]
    assert subgrid("uniform", 4, times[19:], schedule) == [800.0, 600.0, 400.0, 200.0, -1.0]
    lams = schedule.lam(subgrid("logsnr", 4, times[30:-1], schedule)[:-1])
    assert lams.diff().tolist() == pytest.approx([float(lams[-1] - lams[0]) / 3] * 3)
    assert subgrid("uniform", 3, [0.0, -1.0], schedule) == [0.0, -1.0]
    with pytest.raises(InputError, match="alpha is 0"):
        subgrid("logsnr", 3, [1.0, 0.5, 0.25, 0.0], Flow())


def test_when() -> None:
    assert When(0.3, 0.7).guided(100) == list(range(30, 70))  # the paper's 70 to 31, counted down
    assert When(steps=(5, 2)).guided(8) == [2, 5]
    assert When(steps=(False, True, True)).guided(3) == [1, 2]
    assert When(0.5, 1.0, repeats=3).attempts(4) == [1, 1, 3, 3]
    assert When(0.5, 1.0, repeats=(2, 1, 1, 3)).attempts(4) == [2, 1, 1, 3]


def test_strengths_by_hand() -> None:
    from backdrift.host import Evaluation

    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    more = torch.tensor([[0.6, 0.8], [1.0, 1.0]], dtype=torch.float64)
    evaluation = Evaluation(z, 2 * z, "epsilon", Level(0.8, 0.6), 0.5, more, 7.5)
    pull = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    rms_more, rms_pull = [math.sqrt(0.5), 1.0], [1.0, math.sqrt(2)]
    wanted = [0.2 * 7.5 * m / p for m, p in zip(rms_more, rms_pull, strict=True)]
    assert Relative(0.2)(evaluation, pull).flatten().tolist() == pytest.approx(wanted)
    eps = [2 * math.sqrt(12.5), 2 * math.sqrt(2.0)]
    wanted = [0.1 * e / p for e, p in zip(eps, rms_pull, strict=True)]
    assert Relative(0.1, "epsilon")(evaluation, pull).flatten().tolist() == pytest.approx(wanted)
    x0 = (z - 0.6 * 2 * z) / 0.8
    velocity = (2 * z - x0).pow(2).mean(1).sqrt().tolist()
    wanted = [0.1 * v / p for v, p in zip(velocity, rms_pull, strict=True)]
    assert Relative(0.1, "velocity")(evaluation, pull).flatten().tolist() == pytest.approx(wanted)
    assert Constant(3.0)(evaluation, pull).flatten().tolist() == [3.0, 3.0]


def test_the_trace_tells_what_was_done() -> None:
    seen: list[Any] = []
    guidance = bd.SymplecticAdjointGuidance(bright, 2, repeats=2, callback=seen.append, strip=True)
    guided_run(guidance, start(2))
    trace = guidance.trace
    assert seen == trace.entries
    assert [(e.index, e.attempt) for e in trace.entries] == [(i, k) for i in range(3, 7) for k in range(2)]
    assert len(trace.loss) == 4
    assert trace.entries[0].t == pytest.approx(times_at(VP.linear(), RHOS)[3])
    assert all(len(e.loss) == len(e.strength) == len(e.pull) == 2 for e in trace.entries)
    assert trace.strip().shape == (4, 3, 2, 2)
    assert trace.as_dict()["calls_forward"] == 6 + 8 * 2


def test_memory_does_not_grow_with_n() -> None:
    """Bytes of activations alive at once in a guided step, counted at the network's own layers."""
    from live_bytes import LiveBytes

    peaks = []
    for n in (1, 8):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 256, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(256, 256, 1),
            torch.nn.GELU(), torch.nn.Conv2d(256, 3, 3, padding=1),
        ).requires_grad_(False)  # fmt: skip
        model = bd.Denoiser(lambda x, t, c, network=network: network(x), VP.linear())
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        guidance = bd.SymplecticAdjointGuidance(
            lambda z: z.pow(2).mean((1, 2, 3)), n, steps=[1], subgrid="uniform"
        )
        bd.sample(model, x, grid=bd.TimeGrid("uniform", 10), guidance=guidance)  # warm
        with LiveBytes() as live:
            bd.sample(model, x, grid=bd.TimeGrid("uniform", 10), guidance=guidance)
        peaks.append(live.peak)
    assert peaks[1] <= 1.05 * peaks[0]
