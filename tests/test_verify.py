"""The certificate: its errors are right, its references are what they say, and what is wrong is called wrong."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError
from backdrift.gradients import GradientMethod
from backdrift.verification.table import as_text
from certified import GRID, SCHEDULE, ClaimsExact, Wrong, loss, mixture, one, relative, rows
from problems import GaussianNetwork, MixtureNetwork, condition, start_state


@cache
def common() -> bd.Certificate:
    methods = {
        "exact": bd.Exact("min"),
        "plain again": bd.Plain(),
        "symplectic": bd.SymplecticAdjoint(),
        "reversible": bd.Reversible(),
        "continuous": bd.ContinuousAdjoint(),
        "deis2m": bd.AdjointDEIS(2),
        "wrong": Wrong(),
        "claims": ClaimsExact(),
    }
    return mixture(
        methods=methods, solver="heun", steps=[8, 16], reference_steps=64, directions=2, tolerance=2e-2
    )


def gradient(steps: int, method: GradientMethod, solver: bd.solvers.Solver) -> tuple[Tensor, Tensor]:
    """The gradient by x_T, and that by the sample, without any of the certificate's code."""
    network = MixtureNetwork(SCHEDULE, "epsilon", width=1.0).requires_grad_(False)
    x = start_state(SCHEDULE, 0.6).requires_grad_()
    grid = bd.TimeGrid("logsnr", steps, start=0.6, end=0.05)
    solution = bd.sample(
        bd.Denoiser(network, SCHEDULE), x, condition(), solver=solver, grid=grid, gradient=method
    )
    x0 = solution.x0
    found = torch.autograd.grad(loss(x0).sum(), [x, x0])
    return found[0], found[1]


@pytest.mark.parametrize("steps", [8, 16])
@pytest.mark.parametrize(
    ("name", "method"), [("continuous", bd.ContinuousAdjoint()), ("deis2m", bd.AdjointDEIS(2))]
)
def test_errors_are_those_computed_by_hand(name: str, method: GradientMethod, steps: int) -> None:
    row = one(common(), name, steps)
    found, on_x0 = gradient(steps, method, bd.Heun())
    own, _ = gradient(steps, bd.Plain(), bd.Heun())
    true, _ = gradient(400, bd.Plain(), bd.RK4())
    assert row.own is not None
    assert row.flow is not None
    assert row.own.relative == pytest.approx(relative(found, own), rel=1e-9)
    assert row.flow.relative == pytest.approx(relative(found, true), rel=1e-3)
    assert row.flow.cosine == pytest.approx(
        float(torch.cosine_similarity(found.flatten(), true.flatten(), dim=0)), abs=1e-6
    )
    assert row.growth == pytest.approx(float(found.norm() / on_x0.norm()) ** (1 / steps), rel=1e-9)
    assert row.flow.relative > 1e-4  # there was something to measure


def test_the_flows_gradient_is_the_closed_form_within_what_it_says_of_itself() -> None:
    """On Gaussian data the flow is known; its gradient too."""
    network = GaussianNetwork(SCHEDULE, "epsilon").requires_grad_(False)
    x = start_state(SCHEDULE, 0.6)
    made = bd.verify(
        bd.Denoiser(network, SCHEDULE), loss=loss, x_T=x, cond=condition(), grid=GRID, methods=["exact"],
        solver="rk4", steps=[4, 8], reference_steps=64, tolerance=1e-4, directions=0, progress=False,
    )  # fmt: skip
    leaf = x.clone().requires_grad_()
    (known,) = torch.autograd.grad(loss(network.solution(leaf, condition(), 0.6, 0.05)).sum(), leaf)
    assert relative(made.flow.gradient, known.flatten()) < made.flow.uncertainty < 1e-4
    differences = [change for _, change in made.flow.history]
    assert differences == sorted(differences, reverse=True)


def test_exact_methods_are_exact_and_finite_differences_agree() -> None:
    for name in ("exact", "plain again", "symplectic", "reversible"):
        for row in rows(common(), name):
            assert row.verdict == "exact", (name, row.reason)
            assert row.own is not None
            assert row.own.relative < 1e-11
    for name in ("exact", "symplectic", "reversible"):
        differences = one(common(), name, 16).differences
        assert differences is not None
        assert differences < 1e-8
    assert one(common(), "exact", 8).differences is None  # only at the steps asked about
    off = one(common(), "wrong", 16).differences
    assert off == pytest.approx(0.05, rel=0.5)


def test_what_is_wrong_fails_and_is_not_recommended() -> None:
    for row in [*rows(common(), "wrong"), *rows(common(), "claims")]:
        assert row.verdict == "failed"
        assert row.own is not None
        assert row.own.relative == pytest.approx(0.05, rel=1e-9)
        assert row.own.cosine == pytest.approx(1.0, abs=1e-12)
        assert row.reason
    assert "tends to neither" in one(common(), "wrong", 16).reason
    assert "claims the sampler's own" in one(common(), "claims", 16).reason
    for found in common().recommendations.values():
        assert found.row is not None
        assert found.row.name not in ("wrong", "claims")
    alone = mixture(methods={"wrong": Wrong()}, steps=[4, 8], tolerance=1e-2, reference_steps=16)
    assert alone.recommendation.row is None
    assert alone.recommendation.text.startswith("None")
    # Within the tolerance it is still not what it claims to be.
    lenient = mixture(methods={"claims": ClaimsExact()}, steps=[4, 8], tolerance=0.1, reference_steps=16)
    assert lenient.recommendation.row is None


def test_calls_products_and_growth_are_counted() -> None:
    exact, adjoint = (one(common(), n, 16) for n in ("exact", "continuous"))
    (plain,) = [r for r in rows(common(), "plain") if r.steps == 16 and r.solver == "Heun()"]
    assert (plain.calls_forward, plain.calls_redone, plain.vjps) == (32, 0, 32)
    assert (exact.calls_forward, exact.calls_redone, exact.vjps) == (32, 31, 32)
    assert adjoint.calls_forward == 32
    assert adjoint.vjps == 32
    for row, method in ((plain, bd.Plain()), (adjoint, bd.ContinuousAdjoint())):
        assert row.norms is not None
        assert len(row.norms) == 17
        found, on_x0 = gradient(16, method, bd.Heun())
        assert row.norms[0] == pytest.approx(float(found.norm()), rel=1e-12)
        assert row.norms[-1] == pytest.approx(float(on_x0.norm()), rel=1e-12)
        each = [a / b for a, b in zip(row.norms, row.norms[1:], strict=False)]
        assert row.largest_growth == pytest.approx(max(each), rel=1e-12)
        assert math.prod(each) ** (1 / 16) == pytest.approx(row.growth, rel=1e-9)
    assert all(row.peak_bytes and row.seconds for row in common().rows)
    glimpses = 32 * 64 * 8  # the entries of the calls' outputs that redone ones are compared with
    assert (plain.peak_bytes or 0) > (exact.peak_bytes or 0) - glimpses  # it keeps every call


def test_the_yardstick_runs_on_the_reversible_methods_own_sampler() -> None:
    row = one(common(), "reversible", 16)
    assert row.solver == "McCallumFoster(Heun(), zeta=None)"
    plains = {r.solver for r in rows(common(), "plain")}
    assert plains == {"Heun()", row.solver}
    assert all(r.verdict == "yardstick" for r in rows(common(), "plain"))


def test_recommendations_follow_the_rows() -> None:
    certificate = common()
    chosen = certificate.recommendation.row
    exact = [r for r in certificate.rows if r.asked and r.verdict == "exact"]
    assert chosen in exact
    assert chosen.seconds is not None
    assert chosen.seconds <= 1.1 * min(r.seconds or 0 for r in exact)
    assert (
        repr(bd.Exact("min")) in certificate.recommendation.text
        or chosen.method in certificate.recommendation.text
    )
    flow = certificate.recommendations["flow"].row
    good = [
        r
        for r in certificate.rows
        if r.verdict in ("exact", "within", "off") and (r.error("flow") or 1) <= 2e-2
    ]
    assert flow in good
    assert flow.calls is not None
    assert flow.vjps is not None
    assert flow.calls + flow.vjps == min((r.calls or 0) + (r.vjps or 0) for r in good)


def test_a_memory_limit_is_kept_or_said_to_be_too_small() -> None:
    methods = {"max": bd.Exact("max"), "min": bd.Exact("min")}
    free = mixture(methods=methods, steps=[4, 16], reference_steps=16)
    high, low = (one(free, name, 16).peak_bytes or 0 for name in ("max", "min"))
    assert low < high
    tight = mixture(methods=methods, steps=[4, 16], reference_steps=16, memory=(low + high) // 2)
    assert tight.recommendation.row is not None
    assert tight.recommendation.row.name == "min"
    nothing = mixture(methods=methods, steps=[4, 16], reference_steps=16, memory=1)
    assert nothing.recommendation.row is None
    assert "allowed" in nothing.recommendation.text


def test_errors_below_the_references_own_are_shown_as_bounds() -> None:
    made = mixture(methods=["exact"], solver="rk4", steps=[4, 24], reference_steps=8, tolerance=0.9)
    row = one(made, "exact", 24)
    assert row.flow is not None
    assert row.flow.relative < made.flow.uncertainty
    assert "≤" in str(made)
    assert made.flow.sampler.steps <= 8


def test_the_table_the_record_and_the_page(tmp_path: Path) -> None:
    certificate = common()
    text = str(certificate)
    for word in (
        "own err.",
        "flow @8",
        "16 steps",
        "reversible, coupled",
        "continuous",
        "wrong failed",
        "Recommended for",
    ):
        assert word in text, word
    assert certificate.recommendation.text.split()[0] in " ".join(text.split())
    narrow = as_text(certificate.record, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    page = certificate.save(tmp_path / "run")
    assert page == certificate.report == tmp_path / "run" / "report.html"
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record == json.loads(json.dumps(certificate.record))
    html = page.read_text()
    assert "http" not in html.replace("http://www.w3.org", "")
    assert html.count("<svg") > 7
    assert "<polyline" in html
    assert "reversible, coupled" in html
    page.unlink()
    assert bd.report.write(tmp_path / "run") == page
    assert page.read_text() == html
    certificate.save(tmp_path / "run")  # a certificate may replace a certificate
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="no certificate"):
        certificate.save(tmp_path / "other")
    with pytest.raises(InputError, match="no certificate"):
        mixture(out=tmp_path / "other")
