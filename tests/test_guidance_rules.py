"""The rules that Symplectic Adjoint Guidance generalises, each beside its paper's algorithm written out by hand.

The hand-written ones know nothing of the package: plain torch and plain autograd on one sample in unit coordinates
(the papers'), with their own DDIM step and noise, on a mixture of Gaussians whose eps is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from analytic_host import AnalyticHost, picture, run
from backdrift.errors import InputError
from backdrift.guidance import Constant, Guidance, presets
from backdrift.guidance.rules import DPSRule, LGDRule, MPGDRule, TFGRule, UniversalRule
from backdrift.guidance.symplectic import Pull
from problems import SCHEDULES, GaussianNetwork, MixtureNetwork

SCALE = 2.5
COND = torch.tensor([[0.2, -0.1, 0.3], [0.0, 0.4, -0.2], [-0.3, 0.1, 0.2]], dtype=torch.float64)
START = torch.tensor([[0.9, -0.4, 0.7], [-0.3, 0.8, -1.1], [0.2, 1.3, 0.1]], dtype=torch.float64)
TARGET = torch.tensor([0.8, 0.3, 0.6], dtype=torch.float64).view(1, 3, 1, 1)
SEEDS = [3, 14, 15]


def loss(pictures: Tensor) -> Tensor:
    """Never negative, curved, coupling the three numbers."""
    off = (pictures - TARGET).flatten(1)
    return 4 * off.square().sum(1) + off.prod(1).sin().square() + off.sum(1).square()


@dataclass
class Case:
    """A setting: schedule, prediction, whether the host's alpha is 1, and the run's times."""

    schedule: str
    prediction: str
    exploding: bool
    times: tuple[float, ...]

    def how(self, rows: slice) -> dict[str, Any]:
        network = MixtureNetwork(SCHEDULES[self.schedule], self.prediction).requires_grad_(False)
        return {
            "network": network,
            "schedule": SCHEDULES[self.schedule],
            "prediction": self.prediction,
            "cond": COND[rows],
            "uncond": torch.zeros_like(COND[rows]),
            "guidance_scale": SCALE,
            "exploding": self.exploding,
        }


VP_TIMES, FLOW_TIMES = (0.8, 0.6, 0.35, 0.15, 0.0), (0.9, 0.7, 0.4, 0.1, 0.0)
CASES = {
    "vp-epsilon": Case("linear", "epsilon", False, VP_TIMES),
    "vp-v": Case("linear", "v_prediction", False, VP_TIMES),
    "vp-x0-exploding": Case("linear", "sample", True, VP_TIMES),
    "vp-epsilon-exploding": Case("linear", "epsilon", True, VP_TIMES),
    "flow": Case("flow", "flow_prediction", False, FLOW_TIMES),
    "edm-x0": Case("edm", "sample", False, (6.0, 2.0, 0.8, 0.2, 0.0)),
}
any_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# --- by hand ----------------------------------------------------------------------------------------------


class Hand:
    """One sample's network and levels in the papers' notation: a[i] is the alpha-bar of node i."""

    def __init__(self, case: Case, row: int) -> None:
        schedule = SCHEDULES[case.schedule]
        pairs = [(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in case.times]
        self.size = [math.hypot(*pair) for pair in pairs]
        self.a = [(alpha / size) ** 2 for (alpha, _), size in zip(pairs, self.size, strict=True)]
        self.network = MixtureNetwork(schedule, "epsilon").requires_grad_(False)
        self.times, self.cond = case.times, COND[row : row + 1]
        self.generator = torch.Generator().manual_seed(SEEDS[row])

    def halves(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        z, t = self.size[i] * x, torch.full((1,), self.times[i], dtype=torch.float64)
        return self.network(z, t, torch.zeros_like(self.cond)), self.network(z, t, self.cond)

    def eps(self, x: Tensor, i: int) -> Tensor:
        without, with_it = self.halves(x, i)
        return without + SCALE * (with_it - without)

    def x0(self, x: Tensor, i: int) -> Tensor:
        return (x - (1 - self.a[i]) ** 0.5 * self.eps(x, i)) / self.a[i] ** 0.5

    def ddim(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        x0 = (x - (1 - self.a[i]) ** 0.5 * eps) / self.a[i] ** 0.5
        return self.a[i + 1] ** 0.5 * x0 + (1 - self.a[i + 1]) ** 0.5 * eps

    def noise(self) -> Tensor:
        return torch.randn(3, generator=self.generator, dtype=torch.float64)[None]

    def back(self, x_prev: Tensor, i: int) -> Tensor:
        ratio = self.a[i] / self.a[i + 1]
        return ratio**0.5 * x_prev + (1 - ratio) ** 0.5 * self.noise()


def energy(x0: Tensor) -> Tensor:
    return loss(picture(x0)).sum()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


Step = Callable[[Hand, Tensor, int], Tensor]


def by_hand(case: Case, step: Step, repeats: int = 1) -> Tensor:
    """The guided runs' last states, one sample after the other, with a paper's time travel around its step."""
    ends = []
    for row in range(3):
        hand, x = Hand(case, row), START[row : row + 1]
        for i in range(len(case.times) - 1):
            for again in range(repeats):
                if again:
                    x = hand.back(x_prev, i)  # noqa: F821
                x_prev = step(hand, x, i).detach()
            x = x_prev
        ends.append(x)
    return torch.cat(ends)


def freedom(hand: Hand, x: Tensor, i: int) -> Tensor:
    without, with_it = hand.halves(x, i)
    g = gradient(lambda x: energy(hand.x0(x, i)), x)
    rho = 0.2 * SCALE * rms(with_it - without) / rms(g)
    return hand.ddim(x, hand.eps(x, i), i) - rho * g


def dps(hand: Hand, x: Tensor, i: int, zeta: float = 0.4) -> Tensor:
    norm = gradient(lambda x: energy(hand.x0(x, i)).sqrt(), x)
    return hand.ddim(x, hand.eps(x, i), i) - 2 * zeta * norm


def lgd(
    hand: Hand, x: Tensor, i: int, strength: float = 0.3, samples: int = 5, spread: float = 1.0
) -> Tensor:
    s = ((1 - hand.a[i]) / hand.a[i]) ** 0.5
    draws = [spread * s / (1 + s**2) ** 0.5 * hand.noise() for _ in range(samples)]

    def likelihood(x: Tensor) -> Tensor:
        x0 = hand.x0(x, i)
        return torch.stack([torch.exp(-energy(x0 + d)) for d in draws]).mean().log()

    return hand.ddim(x, hand.eps(x, i), i) + strength * gradient(likelihood, x)


def universal(
    hand: Hand, x: Tensor, i: int, weight: float = 0.7, backward: int = 3, rate: float = 0.05
) -> Tensor:
    eps, x0 = hand.eps(x, i), hand.x0(x, i)
    eps_hat = eps + weight * (1 - hand.a[i]) ** 0.5 * gradient(lambda x: energy(hand.x0(x, i)), x)
    delta = torch.zeros_like(x)
    for _ in range(backward):
        delta = delta - rate * gradient(lambda d: energy(x0 + d), delta)
    eps_hat = eps_hat - (hand.a[i] / (1 - hand.a[i])) ** 0.5 * delta
    return hand.ddim(x, eps_hat, i)


def mpgd(hand: Hand, x: Tensor, i: int, strength: float, kept: bool) -> Tensor:
    without, with_it = hand.halves(x, i)
    x0 = hand.x0(x, i)
    g = gradient(energy, x0)
    moved = x0 - strength * SCALE * rms(with_it - without) / rms(g) * g
    eps = hand.eps(x, i) if kept else (x - hand.a[i] ** 0.5 * moved) / (1 - hand.a[i]) ** 0.5
    return hand.a[i + 1] ** 0.5 * moved + (1 - hand.a[i + 1]) ** 0.5 * eps


def tfg(
    hand: Hand, x: Tensor, i: int, *, growth: str, rho: float = 0.2, mu: float = 0.3, samples: int = 3
) -> Tensor:
    ratios = torch.tensor([p / q for p, q in zip(hand.a[:-1], hand.a[1:], strict=True)], dtype=torch.float64)
    weights = {"increase": ratios, "decrease": 1 - ratios, "constant": torch.ones_like(ratios)}[growth]
    w = float(weights[i] / weights.mean())
    draws = [0.6 * (1 - hand.a[i]) ** 0.5 * hand.noise() for _ in range(samples)]

    def log_f(x0: Tensor) -> Tensor:
        return torch.logsumexp(torch.stack([-energy(x0 + d) for d in draws]), 0) - math.log(samples)

    delta_t = rho * w * gradient(lambda x: log_f(hand.x0(x, i)), x)
    x0, delta_0 = hand.x0(x, i), torch.zeros_like(x)
    for _ in range(4):
        delta_0 = delta_0 + mu * w * gradient(log_f, x0 + delta_0)
    following = hand.ddim(x, hand.eps(x, i), i)
    return following + delta_t / float(ratios[i]) ** 0.5 + hand.a[i + 1] ** 0.5 * delta_0


# --- each rule is its paper's -----------------------------------------------------------------------------


def guided(case: Case, guidance: Guidance, rows: slice = slice(None)) -> Tensor:
    """The guided run's last state."""
    return run(guidance, START[rows], case.times, **case.how(rows))[-1]


ALL = {"start": 0.0, "stop": 1.0, "seed": SEEDS}
RULES: dict[str, tuple[Callable[..., Guidance], Step]] = {
    "freedom": (lambda **k: presets.FreeDoM(loss, **k), freedom),
    "dps": (lambda **k: presets.DPS(loss, 0.4, **k), dps),
    "lgd": (lambda **k: presets.LGD(loss, 0.3, samples=5, **k), lgd),
    "universal": (lambda **k: presets.UniversalGuidance(loss, 0.7, 3, 0.05, **k), universal),
    "universal-forward": (
        lambda **k: presets.UniversalGuidance(loss, 0.7, **k),
        lambda *a: universal(*a, backward=0),
    ),
    "universal-backward": (
        lambda **k: presets.UniversalGuidance(loss, 0.0, 3, 0.05, **k),
        lambda *a: universal(*a, weight=0.0),
    ),
    "mpgd-kept": (
        lambda **k: presets.MPGD(loss, 0.3, "kept", **k),
        lambda *a: mpgd(*a, strength=0.3, kept=True),
    ),
    "mpgd-recomputed": (
        lambda **k: presets.MPGD(loss, 1.5, "recomputed", **k),
        lambda *a: mpgd(*a, strength=1.5, kept=False),
    ),
    "tfg-increase": (
        lambda **k: presets.TFG(loss, 0.2, 0.3, 0.6, samples=3, **k),
        lambda *a: tfg(*a, growth="increase"),
    ),
    "tfg-decrease": (
        lambda **k: presets.TFG(
            loss, 0.2, 0.3, 0.6, samples=3, rho_schedule="decrease", mu_schedule="decrease", **k
        ),
        lambda *a: tfg(*a, growth="decrease"),
    ),
    "tfg-constant": (
        lambda **k: presets.TFG(
            loss, 0.2, 0.3, 0.6, samples=3, rho_schedule="constant", mu_schedule="constant", **k
        ),
        lambda *a: tfg(*a, growth="constant"),
    ),
}
any_rule = pytest.mark.parametrize("rule", RULES)


@any_case
@any_rule
def test_a_rule_is_its_papers_algorithm(rule: str, case: Case) -> None:
    make, step = RULES[rule]
    found, expected = guided(case, make(**ALL, repeats=2)), by_hand(case, step, repeats=2)
    unguided = by_hand(case, lambda hand, x, i: hand.ddim(x, hand.eps(x, i), i))
    assert float((expected - unguided).abs().max()) > 1e-2  # the rule does something here
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@any_rule
def test_members_of_a_batch_do_not_affect_each_other(rule: str) -> None:
    case, make = CASES["vp-epsilon"], RULES[rule][0]
    together = guided(case, make(**ALL, repeats=2))
    for row in range(3):
        alone = guided(case, make(start=0.0, stop=1.0, seed=SEEDS[row], repeats=2), slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-13, atol=1e-13)


@any_rule
def test_a_rule_is_deterministic_from_its_seed(rule: str) -> None:
    case, make = CASES["vp-epsilon"], RULES[rule][0]
    first = guided(case, make(start=0.0, stop=1.0, seed=5, repeats=2))
    assert torch.equal(first, guided(case, make(start=0.0, stop=1.0, seed=5, repeats=2)))
    assert not torch.equal(first, guided(case, make(start=0.0, stop=1.0, seed=6, repeats=2)))


@any_rule
@pytest.mark.parametrize("name", ["vp-epsilon", "flow"])
def test_a_rule_is_the_same_in_sample(rule: str, name: str) -> None:
    case = CASES[name]
    how = case.how(slice(None))
    model = bd.Denoiser(
        how["network"],
        how["schedule"],
        case.prediction,
        guidance_scale=SCALE,
        uncond=how["uncond"],
    )
    guidance = RULES[rule][0](**ALL, repeats=2, decode=picture)
    size = Hand(case, 0).size[0]
    found = bd.sample(model, START * size, COND, grid=list(case.times), guidance=guidance).x0
    torch.testing.assert_close(found, by_hand(case, RULES[rule][1], repeats=2), rtol=1e-12, atol=1e-12)


@any_case
@any_rule
def test_a_rule_lowers_the_loss(rule: str, case: Case) -> None:
    make, _ = RULES[rule]
    unguided = by_hand(case, lambda hand, x, i: hand.ddim(x, hand.eps(x, i), i))
    found = guided(case, make(**ALL, repeats=1))
    assert float(loss(picture(found)).sum()) < float(loss(picture(unguided)).sum())


# --- one rule as a limit of another -----------------------------------------------------------------------


@any_case
def test_lgd_without_spread_pulls_along_the_point_estimates_gradient(case: Case) -> None:
    point = guided(case, Guidance(LGDRule(0.3, samples=7, spread=0.0), loss, **ALL))
    torch.testing.assert_close(point, guided(case, Guidance(Pull(1, Constant(0.3)), loss, **ALL)))
    errors = []
    for spread in (0.04, 0.02):
        near = guided(case, Guidance(LGDRule(0.3, samples=7, spread=spread), loss, **ALL))
        errors.append(float((near - point).abs().max()))
    assert errors[1] < 0.6 * errors[0] < 0.1  # goes to it at least linearly


def _ratio(start: Any, end: Any) -> float:
    return start.alpha / end.alpha


@any_case
def test_tfg_contains_freedom_lgd_and_mpgd(case: Case) -> None:
    freedom_like = TFGRule(0.3, 0.0, 0.0, rho_schedule=_ratio)
    torch.testing.assert_close(
        guided(case, Guidance(freedom_like, loss, **ALL, repeats=2)),
        guided(case, presets.FreeDoM(loss, Constant(0.3), **ALL, repeats=2)),
    )
    lgd_like = TFGRule(0.3, 0.0, 1.0, samples=5, rho_schedule=_ratio)
    torch.testing.assert_close(
        guided(case, Guidance(lgd_like, loss, **ALL)),
        guided(case, Guidance(LGDRule(0.3, samples=5), loss, **ALL)),
    )
    mpgd_like = TFGRule(0.0, 0.2, 0.0, iterations=1, mu_schedule="constant")
    torch.testing.assert_close(
        guided(case, Guidance(mpgd_like, loss, **ALL)),
        guided(case, Guidance(MPGDRule(Constant(0.2), "kept"), loss, **ALL)),
    )


@any_case
def test_tfg_contains_dps(case: Case) -> None:
    # rho_t = sqrt(alpha_t) zeta / sqrt(L) is each sample's own number, so the samples go one by one
    for row in range(3):
        rows = slice(row, row + 1)
        host = AnalyticHost(times=case.times, index=0, x=START[rows], **case.how(rows))
        size = math.hypot(*host.start)
        host = AnalyticHost(times=case.times, index=0, x=START[rows] * size, **case.how(rows))
        root = float(loss(picture(host.evaluate(host.x).x0)).sqrt())
        like = TFGRule(0.4, 0.0, 0.0, rho_schedule=lambda start, end, root=root: _ratio(start, end) / root)
        args = {"start": 0.0, "stop": 0.2, "seed": 0}
        found, expected = (
            run(Guidance(rule, loss, **args), START[rows], case.times, **case.how(rows))[1]
            for rule in (like, DPSRule(0.4))
        )
        torch.testing.assert_close(found, expected)


@any_case
def test_tfg_contains_universal_guidance_with_one_backward_step(case: Case) -> None:
    def rho(start: Any, end: Any) -> float:
        gain = end.alpha * start.sigma / start.alpha - end.sigma  # of -eps in a DDIM step
        return _ratio(start, end) * gain * start.sigma

    def mu(start: Any, end: Any) -> float:
        return 1 - start.alpha * end.sigma / (end.alpha * start.sigma)

    like = TFGRule(0.7, 0.05, 0.0, iterations=1, rho_schedule=rho, mu_schedule=mu)
    torch.testing.assert_close(
        guided(case, Guidance(like, loss, **ALL)),
        guided(case, Guidance(UniversalRule(0.7, 1, 0.05), loss, **ALL)),
    )


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "dps"])  # which refuses to maximise
def test_maximising_is_minimising_the_negative(rule: str) -> None:
    case, kind = CASES["vp-v"], RULES[rule][0]
    up = kind(**ALL, maximize=True)
    down = kind(**ALL)
    down.loss = down.scoring.loss.__class__(lambda pictures: -loss(pictures))
    down.scoring = down.scoring._replace(loss=down.loss)
    torch.testing.assert_close(guided(case, up), guided(case, down), rtol=1e-13, atol=1e-13)


# --- what it costs, and what is refused -------------------------------------------------------------------


class Counted(MixtureNetwork):
    """Counts its calls, with and without a graph, and the backward passes through them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plain = self.graphs = self.backward = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out = super().forward(x, t, cond)
        if not out.requires_grad:
            self.plain += 1
            return out
        self.graphs += 1
        out.register_hook(self._pulled)
        return out

    def _pulled(self, grad: Tensor) -> None:
        self.backward += 1


def costs(guidance: Guidance) -> tuple[int, int, int, int]:
    """Of the one guided step of ten: network calls without a graph, with one, vector–Jacobian products, decodings."""
    network = Counted(SCHEDULES["linear"], "epsilon").requires_grad_(False)
    how = CASES["vp-epsilon"].how(slice(None)) | {"network": network, "uncond": None, "guidance_scale": 1.0}
    run(guidance, START, [0.9 - 0.09 * i for i in range(11)], **how)
    (entry,) = guidance.trace.entries
    counted = network.plain - 9, network.graphs, network.backward
    assert counted == (entry.calls.forward, entry.calls.redone, entry.calls.vjps)
    return *counted, entry.decodes


#: docs/guidance-rules.md has these numbers.
COSTS: dict[str, tuple[Callable[..., Guidance], tuple[int, int, int, int]]] = {
    "FreeDoM": (lambda **k: presets.FreeDoM(loss, **k), (1, 1, 1, 1)),
    "DPS": (lambda **k: presets.DPS(loss, **k), (1, 1, 1, 1)),
    "LGD, 10 samples": (lambda **k: presets.LGD(loss, **k), (1, 1, 1, 10)),
    "Universal Guidance, forward": (lambda **k: presets.UniversalGuidance(loss, **k), (1, 1, 1, 1)),
    "Universal Guidance, backward, 5 steps": (
        lambda **k: presets.UniversalGuidance(loss, 0.0, 5, **k),
        (1, 0, 0, 5),
    ),
    "Universal Guidance, both, 5 steps": (
        lambda **k: presets.UniversalGuidance(loss, 6.0, 5, **k),
        (1, 1, 1, 5),
    ),
    "MPGD": (lambda **k: presets.MPGD(loss, **k), (1, 0, 0, 1)),
    "MPGD, eps recomputed": (lambda **k: presets.MPGD(loss, 15.0, "recomputed", **k), (1, 0, 0, 1)),
    "TFG, 4 iterations": (lambda **k: presets.TFG(loss, **k), (1, 1, 1, 4)),
    "TFG, 4 iterations, 3 samples": (lambda **k: presets.TFG(loss, samples=3, **k), (1, 1, 1, 12)),
    "TFG, rho = 0, 4 iterations": (lambda **k: presets.TFG(loss, rho=0.0, **k), (1, 0, 0, 4)),
    "SAG, n = 4": (lambda **k: bd.SymplecticAdjointGuidance(loss, n=4, **k), (4, 4, 4, 1)),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_of_a_guided_step(name: str) -> None:
    make, expected = COSTS[name]
    assert costs(make(steps=[2], repeats=1)) == expected


def test_the_docs_table_of_costs_is_what_was_counted() -> None:
    page = Path(__file__).parent.parent / "docs" / "guidance-rules.md"
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page.read_text(), re.MULTILINE)
    assert {name: tuple(map(int, numbers)) for name, *numbers in rows} == {
        name: expected for name, (_, expected) in COSTS.items()
    }


def test_dps_refuses() -> None:
    case = CASES["vp-epsilon"]
    with pytest.raises(InputError, match="maximize=True"):
        guided(case, presets.DPS(loss, maximize=True))
    with pytest.raises(InputError, match="a loss of -"):
        guided(case, presets.DPS(lambda pictures: -loss(pictures)))


def test_dps_leaves_alone_what_is_at_its_best() -> None:
    case = CASES["vp-epsilon"]

    def zero(pictures: Tensor) -> Tensor:
        return 0 * pictures.flatten(1).square().sum(1)

    torch.testing.assert_close(
        guided(case, presets.DPS(zero)),
        by_hand(case, lambda hand, x, i: hand.ddim(x, hand.eps(x, i), i)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_pure_noise_is_refused_where_the_rule_is_singular_there() -> None:
    times, flow = (1.0, 0.7, 0.4, 0.0), SCHEDULES["flow"]
    how = Case("flow", "flow_prediction", False, times).how(slice(None))
    how |= {"network": GaussianNetwork(flow, "flow_prediction").requires_grad_(False)}  # regular at alpha = 0
    for guidance in (presets.UniversalGuidance(loss, 0.5, repeats=1), presets.TFG(loss)):
        with pytest.raises(InputError, match="begins at pure noise"):
            run(guidance, START, times, **how)
    for guidance in (
        presets.FreeDoM(loss, start=0.0),
        presets.DPS(loss),
        presets.LGD(loss),
        presets.MPGD(loss, start=0.0),
    ):
        assert bool(run(guidance, START, times, **how)[-1].isfinite().all())


def test_tfg_refuses_a_schedule_over_levels_that_the_host_does_not_tell() -> None:
    case = CASES["vp-epsilon"]
    guidance = presets.TFG(loss, seed=SEEDS)
    guidance.begin(4, 3)
    host = AnalyticHost(times=case.times, index=0, x=START, **case.how(slice(None)))
    host.levels = None
    with pytest.raises(InputError, match="does not tell the noise levels"):
        guidance.advance(host)


@pytest.mark.parametrize(
    "make",
    [
        lambda: presets.DPS(loss, 0.0),
        lambda: presets.DPS(loss, math.nan),
        lambda: presets.LGD(loss, samples=0),
        lambda: presets.LGD(loss, spread=-1.0),
        lambda: presets.UniversalGuidance(loss, 0.0, 0),
        lambda: presets.UniversalGuidance(loss, 1.0, 1, rate=0.0),
        lambda: presets.MPGD(loss, eps="other"),  # type: ignore[arg-type]
        lambda: presets.TFG(loss, 0.0, 0.0),
        lambda: presets.TFG(loss, iterations=0),
        lambda: presets.TFG(loss, rho_schedule="up"),  # type: ignore[arg-type]
        lambda: presets.TFG(loss, gamma_schedule="increase"),  # type: ignore[arg-type]
        lambda: presets.FreeDoM(loss, -1.0),
    ],
)
def test_impossible_numbers_are_refused(make: Callable[[], Guidance]) -> None:
    with pytest.raises(InputError, match=r"got|does nothing"):
        make()


def test_the_presets_are_public() -> None:
    for name in ("FreeDoM", "DPS", "LGD", "UniversalGuidance", "MPGD", "TFG"):
        assert issubclass(getattr(bd.guidance, name), Guidance)
