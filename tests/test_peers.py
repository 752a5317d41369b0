"""The comparison with other packages: everyone is given the same flow, costs are counted, results are read aright."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.marked import rewritten
from benchmarks.peers import flowgrad, in_jax, invertible, ode, ours, sde, symplectic
from benchmarks.peers.__main__ import app
from benchmarks.peers.bench import KINDS, Bench
from benchmarks.peers.lineup import all_methods, line_up
from benchmarks.peers.method import Counts, Method, of_torch
from benchmarks.peers.page import OURS, blocks, counts, reach_table, split, targets
from benchmarks.peers.problems import digits, mixture, relative_errors, small_unet, true_gradients
from benchmarks.peers.reach import TARGET, cheapest, search
from benchmarks.peers.work import Work
from benchmarks.record import Record
from torch import Tensor, nn

import backdrift as bd

PAGE = Path(__file__).parent.parent / "docs" / "peers.md"


def gradient(method: Method, work: Work, value: float) -> tuple[dict[str, Tensor], Counts]:
    job = method.prepare(work, value)
    (job.counted or job.differentiate)()
    return job.gradients(), job.counts()


def named(methods: list[Method], name: str, setting: str) -> Method:
    (found,) = [m for m in methods if (m.name, m.setting) == (name, setting)]
    return found


def plain(sampler: str) -> Method:
    solver = {**ours.SOLVERS, **ours.COUPLED}[sampler]
    return of_torch("autograd", "plain", sampler, ours.run(solver, bd.Plain()))


def worst(found: dict[str, Tensor], known: dict[str, Tensor]) -> float:
    return max(relative_errors(found, known).values())


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    return true_gradients(mixture, 300)


def test_the_true_gradient_is_that_of_a_flow_known_in_closed_form() -> None:
    """With a single Gaussian the flow is affine: (x - alpha m) grows like the marginal's standard deviation."""

    def single(dtype: torch.dtype = torch.float64) -> Work:
        work = mixture(dtype)
        inner: Any = work.network.inner
        inner.means = nn.Parameter(inner.means.detach()[:1])
        return work

    work = single()
    mean, s = work.network.inner.means + work.cond, work.schedule  # type: ignore[operator]
    (a, b), (sa, sb) = ([float(scale(t)) for t in (work.start, work.end)] for scale in (s.alpha, s.sigma))
    ratio = math.sqrt((0.16 * b**2 + sb**2) / (0.16 * a**2 + sa**2))
    work.clear()
    work.loss(b * mean + ratio * (work.x_T - a * mean)).backward()
    coarse, fine = (worst(true_gradients(single, n), work.gradients()) for n in (100, 200))
    assert fine < 1e-6
    assert math.log2(coarse / fine) == pytest.approx(4, abs=0.3)


@pytest.mark.parametrize(
    ("method", "calls", "products"),
    [
        (named(ours.exact_to_the_steps(), "plain", "Euler"), 5, 5),
        (named(ours.exact_to_the_steps(), "plain", "RK4"), 20, 20),
        (named(ours.exact_to_the_steps(), 'Exact("max")', "RK4"), 20, 20),
        (named(ours.exact_to_the_steps(), 'Exact("min")', "Euler"), 9, 5),  # the last call is not redone
        (named(ours.exact_to_the_steps(), "checkpoint per call", "Euler"), 10, 5),
        (named(ours.exact_to_the_steps(), "SymplecticAdjoint", "Heun"), 20, 10),
        (named(symplectic.methods(), "symplectic adjoint, stored states", "Heun"), 30, 10),
        (named(flowgrad.methods(), "stored-state sweep", "Euler, every step"), 10, 5),
        (named(invertible.methods(), "invertible gradient", "EDICT"), 30, 10),
        (named(ours.exact_to_the_steps(), "Reversible", "EDICT"), 20, 10),
    ],
    ids=lambda v: v.key if isinstance(v, Method) else str(v),
)
def test_calls_and_products_are_those_of_the_formulas(method: Method, calls: int, products: int) -> None:
    assert gradient(method, mixture(), 5)[1] == Counts(calls, products)


@pytest.mark.parametrize(
    ("method", "sampler"),
    [
        *(
            (named(symplectic.methods(), "symplectic adjoint, stored states", s), s)
            for s in symplectic.TABLEAUS
        ),
        (named(flowgrad.methods(), "stored-state sweep", "Euler, every step"), "Euler"),
        (named(invertible.methods(), "invertible gradient", "EDICT"), "EDICT"),
        (named(ours.exact_to_the_steps(), "checkpoint per call", "AB4"), "AB4"),
    ],
    ids=lambda v: v.key if isinstance(v, Method) else str(v),
)
@pytest.mark.parametrize("make", [mixture, lambda: small_unet(torch.float64)], ids=["mixture", "unet"])
def test_exact_peers_equal_plain_autograd(method: Method, sampler: str, make: Any) -> None:
    steps = 6
    known, _ = gradient(plain(sampler), make(), steps)
    found, _ = gradient(method, make(), steps)
    assert worst(found, known) < 1e-10


def test_joined_steps_are_fewer_products_and_no_longer_exact() -> None:
    every, _, joined, _ = flowgrad.methods()
    known, all_counts = gradient(every, mixture(), 64)
    found, fewer = gradient(joined, mixture(), 64)
    assert fewer.products < all_counts.products
    assert 1e-4 < worst(found, known) < 1


def test_steps_are_joined_where_the_slope_hardly_changes() -> None:
    slopes = [torch.tensor([v]) for v in (1.0, 1.0, 1.0, 1.0, 2.0, 2.0)]
    # The change 1 -> 2 counts at both its ends: a joined step ends after each.
    assert flowgrad._joined(slopes, 0.1) == [0, 4, 5]


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "solved back"])
@pytest.mark.parametrize(
    ("solver", "clock", "rule", "order"),
    [
        ("euler", "rho", "logsnr", 1),
        ("rk4", "rho", "logsnr", 1),  # its steps are of order 4; at so few, only that they converge is asked
        ("rk4", "lam", "logsnr", 3),
        ("rk4", "time", "logsnr", 1),
        ("explicit_adams, order 4", "lam", "logsnr", 2),
    ],
)
def test_torchdiffeq_converges_to_the_same_gradient(
    solver: str, clock: str, rule: str, order: float, stored: bool, truth: dict[str, Tensor]
) -> None:
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    method = named(
        ode.methods(),
        f"odeint_adjoint, {'stored' if stored else 'solved back'}",
        f"{solver}, " + next(shown for c, r, shown in ode.CLOCKED if (c, r) == (clock, rule)),
    )
    coarse, fine = (worst(gradient(method, mixture(), n)[0], truth) for n in (48, 96))
    assert fine < 1
    assert math.log2(coarse / fine) > 0.7 * order


def test_torchdiffeq_adaptive_converges(truth: dict[str, Tensor]) -> None:
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    for clock in ("rho", "lam", "time"):
        work = mixture()
        work.clear()
        work.loss(ode.adaptive(clock)(work, 1e-6)).backward()
        assert worst(work.gradients(), truth) < 1e-3, clock


@pytest.mark.parametrize("adjoint", ["RecursiveCheckpointAdjoint", "BacksolveAdjoint"])
def test_diffrax_solves_the_same_flow_and_is_counted(adjoint: str, truth: dict[str, Tensor]) -> None:
    pytest.importorskip("diffrax", reason="diffrax is not installed")
    method = named(in_jax.methods(), adjoint, "Heun, exponential form in log-SNR")
    coarse, fine = (worst(gradient(method, mixture(), n)[0], truth) for n in (64, 128))
    assert math.log2(coarse / fine) > 1.4
    assert gradient(method, mixture(), 8)[1] == Counts(
        32, 16
    )  # two slopes a step, each asked for again on the way back


def test_torchsde_and_backdrift_converge_to_the_same_path() -> None:
    pytest.importorskip("torchsde", reason="torchsde is not installed")
    known = sde.true_gradients(512)
    for method in (m for m in sde.methods() if "2M)" not in m.setting):
        coarse, fine = (worst(gradient(method, sde.work(), n)[0], known) for n in (16, 128))
        assert fine < 0.4 * coarse, method.key
        assert fine < 0.2, method.key


def test_the_noises_of_coarser_steps_are_of_one_path() -> None:
    path = sde.Path(sde.work(), finest=64)
    assert path.noises(8).shape == (8, *mixture().x_T.shape)
    # A coarse step's noise is the sum of the fine ones', each by its size.
    spread = path.variances.sqrt()[:, None, None]
    whole = (path.normals * spread).sum(0) / path.variances.sum().sqrt()
    torch.testing.assert_close(path.noises(1)[0], whole)
    low, step = path.low, path.step
    halves = path.increment(low, low + 32 * step) + path.increment(low + 32 * step, low + 64 * step)
    torch.testing.assert_close(path.increment(low, low + 64 * step), halves)


def test_digits_are_there_in_one_form_or_another() -> None:
    known, _ = gradient(plain("Euler"), digits(torch.float64), 3)
    method = named(symplectic.methods(), "symplectic adjoint, stored states", "Euler")
    assert worst(gradient(method, digits(torch.float64), 3)[0], known) < 1e-8


def test_the_search_finds_the_first_number_of_steps() -> None:
    asked: list[float] = []

    def error(steps: float) -> float:
        asked.append(steps)
        return 10.0 * steps**-3.0

    search(error, "steps")
    first = math.ceil((10.0 / TARGET) ** (1 / 3))
    assert first in asked
    assert first - 1 in asked
    assert len(asked) < 20


def cell(method: str, value: float, calls: int, error: float, **more: Any) -> dict[str, Any]:
    errors = {"x_T": error, "cond": error / 2, "weights": error / 3}
    return {"method": method, "value": value, "calls": calls, "products": calls, "errors": errors, **more}


def test_the_cheapest_that_reaches_the_target_is_taken() -> None:
    a, b, c = "backdrift | A | s", "torchdiffeq | B | s", "diffrax | C | s"
    cells = [cell(a, 8, 8, 0.1), cell(a, 20, 20, 9e-4), cell(a, 40, 40, 1e-5), cell(b, 4, 19, 1e-4)]
    cells += [cell(c, 9, 9, 2e-3)]
    assert [(r.method, r.value, r.total) for r in cheapest(cells)] == [(b, 4, 38), (a, 20, 40)]
    table = reach_table(cells).splitlines()
    assert "torchdiffeq" in table[2]
    assert "not reached" in table[4]
    cells += [cell('backdrift | Exact("max") | s', 5, 5, 9e-4), cell("autograd | plain | s", 1, 1, 1e-9)]
    best, _, both, alone = counts(cells)
    assert (best.value, best.met) == (10 / 38, True)
    assert (both.value, both.met) == (40 / 38, False)
    assert alone.value == 20 / 19


def made_up(folder: Path, ours: float, megabytes: float) -> None:
    exact = 'backdrift | Exact("min") | Euler'
    theirs = "published | symplectic adjoint, stored states | Euler"
    times = [
        {"method": m, "value": 10, "wants": w, "repeat": r, "seconds": s * slow}
        for r, slow in enumerate((1.0, 5.0, 1.1))
        for w in ("x_T+cond+weights", "x_T")
        for m, s in ((exact, ours), (theirs, 1.0))
    ]
    memory = [
        {"method": m, "value": 10, "wants": "x_T+cond+weights", "peak_bytes": b, "calls": 1, "products": 1}
        for m, b in ((exact, round(megabytes * 1e6)), (theirs, 100_000_000))
    ]
    (folder / "peers-unet.json").write_text(json.dumps({"memory": memory}))
    (folder / "peers-time-unet.json").write_text(json.dumps({"times": times}))


@pytest.mark.parametrize(("ours", "megabytes", "met"), [(0.84, 64, True), (0.86, 66, False)])
def test_targets_pass_and_fail(ours: float, megabytes: float, met: bool, tmp_path: Path) -> None:
    made_up(tmp_path, ours, megabytes)
    found = targets(tmp_path)
    assert len(found) == 3
    assert all(t.met is met for t in found)


def test_a_run_is_saved_and_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    only = ('Exact("min")',)

    def run(repeats: int) -> dict[str, Any]:
        bench = Bench("small", Record(path, {}, {}, *KINDS), only)
        bench.memory()
        bench.times(repeats)
        return json.loads(path.read_text())

    once, twice = run(1), run(2)
    assert len(once["memory"]) == 2  # with all gradients, and with x_T alone
    assert twice["memory"] == once["memory"]
    assert twice["times"][: len(once["times"])] == once["times"]
    assert len(twice["times"]) == 2 * len(once["times"]) == 4
    assert all(c["peak_bytes"] > 0 for c in twice["memory"])
    assert all(c["same_bits"] and split(c["method"])[0] == OURS for c in twice["memory"])


def test_the_line_up_is_among_all_methods() -> None:
    for problem in ("mixture", "digits", "unet"):
        keys = [m.key for m in all_methods(problem)]
        assert len(keys) == len(set(keys))
        assert len(line_up(problem)) >= 12


def test_the_page_says_what_the_results_say() -> None:
    text = PAGE.read_text()
    from benchmarks.peers.__main__ import RESULTS

    assert rewritten(text, blocks(RESULTS)) == text, "run: python -m benchmarks.peers page --write"


def test_the_commands_exist() -> None:
    names = {c.callback.__name__ for c in app.registered_commands if c.callback}
    assert names == {"errors", "memory", "timed", "page"}
