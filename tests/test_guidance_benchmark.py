"""The benchmark of guidance: DOODL, what runs cost, the search for strengths, small runs, and the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.guidance import __main__ as command
from benchmarks.guidance import (
    estimates,
    guided_step,
    page,
    plan,
    plots,
    probe,
    relative,
    search,
    tables,
    units,
)
from benchmarks.guidance.bench import Bench, decoded
from benchmarks.guidance.costs import Counts, Units, attempts_for, expected
from benchmarks.guidance.doodl import CLIPPED, MOMENTUM, PERTURBATION, Doodl, P
from benchmarks.guidance.results import Results, results_file
from benchmarks.guidance.setting import Case, Setting, clamped
from benchmarks.guidance.tasks import TASKS, Task
from benchmarks.guidance.ways import DOODL, FREEDOM, SAG, TFG, UNGUIDED, UNIVERSAL, Scales, Way
from benchmarks.marked import marked
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import backdrift as bd
from backdrift.guidance import Guidance
from backdrift.losses import FunctionLoss
from backdrift.recipes.judges import Judge
from tiny_pipelines import tiny_sd

TIMES = Units(1.0, 2.0, 3.0)


def brightness(images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
    return (images - 0.7).square().flatten(1).mean(1)


def judged(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return 50 + images.flatten(1).mean(1)


TINY = Task(
    "tiny",
    lambda name: FunctionLoss(brightness),
    lambda case: [Judge("CLIP score", judged), Judge("digit as named", judged)],
    (Case("a", "p", 1), Case("a", "q", 2), Case("b", "p", 1), Case("b", "q", 2)),
    (Case("a", "r", 9001), Case("b", "r", 9002)),
)


@pytest.fixture
def setting() -> Setting:
    made = Setting(steps=10, batch=2, guidance_scale=2.0)
    pipe = tiny_sd()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    made.__dict__["pipe"] = pipe
    return made


# ---------------------------------------------------------------------------- DOODL


def test_doodl_is_its_authors_loop() -> None:
    """Both members' losses, clipping, momentum, perturbation and norm, by autograd through the stored run."""
    matrix = torch.tensor([[0.9, 0.2], [-0.1, 0.7]], dtype=torch.float64)
    model = bd.Denoiser(lambda x, t, cond: x @ matrix, bd.VP.linear())
    grid = bd.TimeGrid("uniform", 4, start=0.9, end=0.1)
    weights = torch.tensor([0.002, -0.003], dtype=torch.float64)

    def decode(x: Tensor) -> Tensor:
        return x[:, [0, 1, 0], None, None].expand(-1, -1, 3, 3)

    def loss(images: Tensor) -> Tensor:
        return (images[:, :2, 0, 0] @ weights).square()

    noise = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    doodl = Doodl(model, None, grid, decode, FunctionLoss(loss), rate=20.0, steps=3, seed=5)
    found = doodl(noise)

    generator, clipped = torch.Generator().manual_seed(5), 0
    x, momentum = noise.clone(), torch.zeros_like(noise)
    for _ in range(3):
        pair = [x.clone().requires_grad_() for _ in range(2)]
        run = bd.sample(model, bd.Pair(*pair), solver=bd.EDICT(P), grid=grid, gradient=bd.Exact("max"))
        assert run.pair is not None
        total = sum((member @ weights).square().sum() for member in run.pair)
        mean = sum(torch.autograd.grad(total, pair)) / 2  # tied
        half = 0.5 * mean
        clipped += int((half.abs() > CLIPPED).sum())  # some are, some are not
        momentum = MOMENTUM * momentum + half.clamp(-CLIPPED, CLIPPED)
        x = x - 20.0 * momentum + PERTURBATION * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = x * noise.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True)
    assert 0 < clipped < 3 * noise.numel()
    known = decode(bd.sample(model, x, solver=bd.EDICT(P), grid=grid).x0)
    torch.testing.assert_close(found.images, known, rtol=1e-9, atol=1e-12)
    assert found.decodes == 6
    assert found.calls.forward == (3 + 1) * 2 * 4
    assert found.calls.vjps == 3 * 2 * 4


# ---------------------------------------------------------------------------- what runs cost


def test_attempts_are_spread_evenly_and_early() -> None:
    way = Way(FREEDOM, attempts=7, start=0.25, stop=0.75)
    assert way.repeats(8) == [1, 1, 2, 2, 2, 1, 1, 1]
    assert Way(FREEDOM, start=0.25, stop=0.75).repeats(8) == [1] * 8
    assert Way(UNIVERSAL, attempts=9).repeats(8) == [2, 1, 1, 1, 1, 1, 1, 1]


def test_fewer_attempts_than_steps_guide_some_of_the_range() -> None:
    assert Way(SAG, attempts=2, start=0.25, stop=0.75).guided(8) == [2, 4]
    assert Way(SAG, attempts=3, start=0.25, stop=0.75).guided(8) == [2, 3, 4]
    assert Way(SAG, attempts=5, start=0.25, stop=0.75).guided(8) == [2, 3, 4, 5]
    few = Way(SAG, n=10, start=0.25, stop=0.75)
    attempts = attempts_for(TIMES.seconds(expected(replace(few, n=4), 8)), few, 8, TIMES)
    assert attempts < 4
    seconds = [
        TIMES.seconds(expected(replace(few, attempts=k), 8)) for k in (attempts - 1, attempts, attempts + 1)
    ]
    wanted = TIMES.seconds(expected(replace(few, n=4), 8))
    assert abs(seconds[1] - wanted) == min(abs(s - wanted) for s in seconds)


@pytest.mark.parametrize(
    "way",
    [
        Way(UNGUIDED),
        Way(SAG, w=0.2, n=3, attempts=5, start=0.25, stop=0.75),
        Way(SAG, w=0.2, n=3, attempts=2, start=0.25, stop=0.75),
        Way(FREEDOM, w=0.2, start=0.25, stop=0.75),
        Way(UNIVERSAL, w=0.2, attempts=13),
        Way(TFG, w=0.2, start=0.25, stop=0.5),
        Way(DOODL, w=10.0, attempts=2, n=4),
    ],
    ids=lambda way: way.rule,
)
def test_counts_are_those_expected(way: Way, setting: Setting, tmp_path: Path) -> None:
    bench = Bench(TINY, setting, Results(tmp_path / "r.json", {}, {}))
    bench.__dict__["scales"] = Scales()
    assert Counts(**bench.cell(way, TINY.cases[0])["counts"]) == expected(way, setting.steps)


def test_equal_seconds_are_equal_within_half_an_attempt() -> None:
    for way in (Way(FREEDOM), Way(UNIVERSAL), Way(TFG), Way(DOODL, n=10)):
        for seconds in (600.0, 1234.0):
            attempts = attempts_for(seconds, way, 20, TIMES)
            each = TIMES.seconds(expected(replace(way, attempts=attempts + 1), 20)) - TIMES.seconds(
                expected(replace(way, attempts=attempts), 20)
            )
            assert (
                abs(TIMES.seconds(expected(replace(way, attempts=attempts), 20)) - seconds) <= each / 2 + 1e-9
            )
        # Nothing is left out to be cheaper.
        assert attempts_for(0.0, way, 20, TIMES) == (1 if way.rule == DOODL else len(way.guided(20)))


def test_seconds_count_every_part_once() -> None:
    assert TIMES.seconds(Counts(forward=5, redone=3, vjps=2, decodes=4)) == (5 + 3 - 2) * 1 + 2 * 2 + 4 * 3


# ---------------------------------------------------------------------------- strengths


def test_the_search_closes_in_on_the_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loss falls with w, the CLIP score falls by w: with 3 points to give up, w = 3 would be chosen."""
    bench: Any = type(
        "B", (), {"task": replace(TINY, drop=3.0), "results": Results(tmp_path / "r.json", {}, {})}
    )()
    monkeypatch.setattr(search, "measured", lambda bench, way: (10 / (1 + way.w), 60 - way.w))
    monkeypatch.setattr(search, "GRID", (0.1, 1.0, 10.0))
    found = search.settle(bench, Way(SAG, n=4))
    assert found["floor"] == 57
    assert 3 / 10 ** (1 / 8) <= found["w"] <= 3
    assert len(found["tried"]) == 3 + search.HALVINGS
    assert bench.results.data["searches"] == [found]


def test_the_search_goes_beyond_its_ends_and_finds_a_loss_that_rises_again() -> None:
    assert search.following({1.0: (5.0, 60.0), 3.0: (4.0, 60.0)}, 57.0) == 9.0
    assert search.following({1.0: (5.0, 50.0), 3.0: (4.0, 40.0)}, 57.0) == pytest.approx(1 / 3, rel=1e-2)
    tried = {1.0: (5.0, 60.0), 3.0: (3.0, 60.0), 9.0: (4.0, 60.0)}
    assert search.best(tried, 57.0) == 3.0
    assert search.following(tried, 57.0) == pytest.approx(27**0.5, rel=1e-2)
    assert search.best(tried, 61.0) is None


def test_units_make_strengths_alike(setting: Setting, tmp_path: Path) -> None:
    """At w = 1 the mean move by Universal Guidance's rule is that by SAG's, measured on the states of DDIM steps."""
    setting.pipe.scheduler = DDIMScheduler.from_config(setting.pipe.scheduler.config)
    bench = Bench(TINY, setting, Results(tmp_path / "r.json", {}, {}))
    ratios = []
    for case in TINY.trial:
        moves: dict[str, list[float]] = {FREEDOM: [], UNIVERSAL: []}
        rules = {
            kind: Way(kind, w=1e-3).guidance(TINY.loss("a"), setting.steps, 0, bench.scales).rule
            for kind in moves
        }

        def watch(attempt: Any, rules: Any = rules, moves: Any = moves) -> Tensor:
            for kind, rule in rules.items():
                apart = attempt.rms(rule(attempt) - attempt.take()).mean()
                moves[kind].append(float(apart) / math.hypot(*attempt.host.end))
            return attempt.take()

        setting.guide(case, Guidance(watch, TINY.loss("a"), start=0.0, stop=1.0))
        ours = [m for i, m in enumerate(moves[FREEDOM]) if 0.3 <= i / setting.steps < 0.7]
        ratios.append((sum(moves[UNIVERSAL]) / setting.steps) / (sum(ours) / len(ours)))
    assert math.sqrt(ratios[0] * ratios[1]) == pytest.approx(1, rel=0.02)


# ---------------------------------------------------------------------------- cells, tables, page


def small(folder: Path, setting: Setting) -> tuple[Bench, Units]:
    results = Results(folder / "guidance-style.json", {}, setting.facts)
    return Bench(replace(TINY, trial=TINY.trial[:1]), setting, results, folder / "pictures"), TIMES


def test_a_stopped_run_goes_on_with_the_same_figures(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.RULES, "tiny", (FREEDOM,))
    monkeypatch.setattr(search, "GRID", (0.3,))
    monkeypatch.setattr(search, "HALVINGS", 1)
    bench, times = small(tmp_path, setting)
    plan.compare(bench, times, cases=2)
    whole = json.loads(bench.results.path.read_text())
    part = dict(whole, cells=whole["cells"][:-4])
    bench.results.path.write_text(json.dumps(part))
    again, _ = small(tmp_path, setting)
    plan.compare(again, times, cases=2)
    for cell in whole["cells"]:
        known = again.results.find(cell["key"])
        assert known is not None
        assert {**known, "seconds": 0} == {**cell, "seconds": 0}
    with pytest.raises(SystemExit, match="steps"):
        Results(bench.results.path, {}, {**setting.facts, "steps": 11})

    table = tables.Table(again.results.data, times)
    text = page.searched(table)
    assert text.count("**") == 2 * len(whole["searches"])
    keys = [row["way"] for row in whole["rows"]]
    cases = table.cases(keys, [c.key for c in TINY.cases])
    assert len(cases) == 2
    ours = next(k for k in keys if k["rule"] == SAG)
    for key in keys:
        apart = table.beyond(key, ours, cases, "loss").value
        assert apart == pytest.approx(
            table.mean(key, cases, "loss").value - table.mean(ours, cases, "loss").value
        )
    guided = table.mean(ours, cases, "loss").value
    assert guided < table.mean(keys[0], cases, "loss").value  # pulled towards the lower loss
    assert plots.strengths(table, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_run_as_published_is_not_searched_and_measured_on_few_cases(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.RULES, "tiny", (DOODL,))
    for name, value in (("FEW", {plan.PUBLISHED: 1}), ("DOODL_STEPS", 2), ("EDICT_STEPS", 4)):
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(search, "GRID", (0.3,))
    monkeypatch.setattr(search, "RATES", (30.0,))
    monkeypatch.setattr(search, "HALVINGS", 0)
    bench, times = small(tmp_path, setting)
    plan.compare(bench, times, cases=2)
    published, trial = Way(DOODL, w=plan.DOODL_RATE, attempts=2, n=4), [c.key for c in bench.task.trial]
    measured = [
        cell["key"]["case"] for cell in bench.results.data["cells"] if cell["key"].get("way") == published.key
    ]
    assert measured == [plan.spread(TINY.cases)[0].key]
    assert {"way": published.key, "group": plan.PUBLISHED} in bench.results.data["rows"]
    searched = [
        cell["key"]["way"].get("w")
        for cell in bench.results.data["cells"]
        if cell["key"].get("case") in trial
    ]
    assert plan.DOODL_RATE not in searched


def test_runs_of_another_number_of_steps_have_a_file_of_their_own(tmp_path: Path) -> None:
    assert results_file(tmp_path, "style").name == "guidance-style.json"
    assert results_file(tmp_path, "style", 100).name == "guidance-style-100.json"


def test_a_mean_has_the_standard_error() -> None:
    found = tables.Mean.of([1.0, 2.0, 4.0, 5.0])
    assert found.value == 3.0
    assert found.error == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 3 / 4))
    assert tables.shown(tables.Mean(12.3456, 0.234)) == "12.35 ± 0.23"
    assert tables.shown(tables.Mean(-1234.5, 34.2), sign=True) == "−1,234 ± 34"
    assert math.isnan(tables.Mean.of([1.0]).error)


def test_cases_are_spread_over_references_and_prompts() -> None:
    for task in TASKS.values():
        found = plan.spread(task.cases)
        assert sorted(c.key["prompt"] + c.reference for c in found) == sorted(
            c.key["prompt"] + c.reference for c in task.cases
        )
        assert len(found) == 20
        assert len({c.reference for c in found[:5]}) == 5
        assert not {c.seed for c in task.cases} & {c.seed for c in task.trial}
        assert not {c.prompt for c in task.cases} & {c.prompt for c in task.trial}


# ---------------------------------------------------------------------------- one step, estimates, units


def test_one_step_is_exact_and_flat_in_memory_by_the_symplectic_adjoint(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guided_step, "STYLE", TINY)
    monkeypatch.setattr(guided_step, "STEPS", (1, 4))
    names = ("plain autograd", "vanilla adjoint, exponential form", "symplectic adjoint")
    monkeypatch.setattr(guided_step, "METHODS", {name: guided_step.METHODS[name] for name in names})
    cells = guided_step.measure(setting, TINY.cases[0], 2, 1)
    at = {(c["method"], c["n"]): c for c in cells}
    for n in (1, 4):
        assert at["symplectic adjoint", n]["error"] < 1e-4
        assert at["symplectic adjoint", n]["calls"][2] == n
    assert at["vanilla adjoint, exponential form", 4]["error"] > 1e-3
    grown = {m: at[m, 4]["peak bytes"] / at[m, 1]["peak bytes"] for m in guided_step.METHODS}
    assert grown["symplectic adjoint"] < 1.1 < 1.3 < grown["plain autograd"]


def test_estimates_come_nearer_with_n(setting: Setting) -> None:
    found = estimates.along(TINY, setting, TINY.cases[0], 1)
    assert found["left"] == 9
    errors = [cell["pixels"] for cell in found["cells"]]
    assert [cell["n"] for cell in found["cells"]] == [1, 2, 3, 4, 5, 6, 8]
    assert errors[-1] < errors[0]
    assert found["cells"][-1]["cosine"] > found["cells"][0]["cosine"]


def test_unit_times_are_of_every_part(setting: Setting) -> None:
    cell = {"seconds": units.measure(setting, TINY, TINY.cases[0], 1)}
    assert all(len(values) == 1 and min(values) > 0 for values in cell["seconds"].values())
    assert units.units(cell).product > 0


def test_decoding_is_the_pipelines_own(setting: Setting) -> None:
    pipe, seen = setting.pipe, []

    def look(attempt: Any) -> None:
        seen.append((decoded(pipe, attempt.host.x), attempt.host.decode(attempt.host.x)))

    probe.at_step(setting, TINY.cases[0], TINY.loss("a"), 2, look)
    assert torch.equal(*seen[0])
    assert float(clamped(torch.tensor([-1.0, 0.5, 2.0])).max()) == 1


def test_the_page_holds_the_results_and_nothing_else() -> None:
    assert page.filled(command.FOLDER) == page.PAGE.read_text(), (
        "run: python -m benchmarks.guidance page --write"
    )


def test_the_table_of_relative_strengths_holds_the_results_and_nothing_else() -> None:
    path = results_file(command.FOLDER, "relative", relative.SETTING.steps)
    text = relative.table(json.loads(path.read_text())["cells"])
    assert marked(relative.PAGE.read_text(), "relative") == text, (
        "run: python -m benchmarks.guidance relative"
    )
