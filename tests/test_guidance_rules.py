"""The rules that Symplectic Adjoint Guidance generalises, each beside its paper's algorithm written out by hand.

The hand-written ones know nothing of the package: plain torch and plain autograd on one sample in unit coordinates
(the papers'), with their own DDIM step and noise, on a mixture of Gaussians whose eps is known.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import backdrift as bd
from analytic_host import AnalyticHost, picture, run
from backdrift.guidance import Constant, Guidance, presets
from backdrift.guidance.rules import DPSRule, LGDRule, MPGDRule, TFGRule, UniversalRule
from backdrift.guidance.symplectic import Pull
from rules_by_hand import (
    ALL,
    CASES,
    COND,
    RULES,
    SCALE,
    SEEDS,
    START,
    Case,
    Hand,
    any_case,
    any_rule,
    by_hand,
    guided,
    loss,
)

# --- each rule is its paper's -----------------------------------------------------------------------------


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
    for spread in (0.004, 0.002):
        near = guided(case, Guidance(LGDRule(0.3, samples=7, spread=spread), loss, **ALL))
        errors.append(float((near - point).abs().max()))
    assert errors[1] < 0.6 * errors[0] < 0.01  # goes to it at least linearly


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
    down.scoring = dataclasses.replace(down.scoring, loss=down.loss)
    torch.testing.assert_close(guided(case, up), guided(case, down), rtol=1e-13, atol=1e-13)
