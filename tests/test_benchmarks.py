"""The benchmark's instruments against known answers, and one small run of it from end to end."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchdiffeq")

from benchmarks import figures as readme
from benchmarks.exact_gradient import compare, main
from benchmarks.marked import marked, rewritten
from benchmarks.measure import MALLOC, host_bytes, machine, peak_bytes
from benchmarks.methods import plain, torchdiffeq
from benchmarks.problem import GUIDANCE, SMALL, Problem
from benchmarks.record import Figures, Record
from benchmarks.targets import targets

CPU = torch.device("cpu")
MB = 250_000  # float32 numbers in a megabyte


def test_peak_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        first = torch.zeros(2 * MB)
        second = torch.zeros(3 * MB)  # 5 MB alive
        del first
        third = torch.zeros(MB)  # 4 MB
        (second + 1).sum()  # 7 MB: the temporary counts
        del second, third

    assert peak_bytes(work, CPU) == pytest.approx(7e6, abs=100)


def test_peak_starts_from_what_was_alive_before() -> None:
    before = torch.zeros(8 * MB)
    assert peak_bytes(lambda: torch.zeros(MB).sum(), CPU) == pytest.approx(1e6, abs=100)
    assert len(before) == 8 * MB


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(SMALL, "all", CPU)


def hand_written(problem: Problem, steps: int) -> torch.Tensor:
    """DDIM with guidance from its definition, without a line of the package but the schedule."""
    times = problem.times(steps).tolist()
    x, both = problem.x_T, torch.cat([problem.uncond, problem.cond])
    for t, s in pairwise(times):
        (a, b), (c, d) = (
            (float(problem.schedule.alpha(u)), float(problem.schedule.sigma(u))) for u in (t, s)
        )
        low, high = problem.network(torch.cat([x, x]), torch.full((2,), t), both).chunk(2)
        eps = low + GUIDANCE * (high - low)
        x = c * ((x - b * eps) / a) + d * eps
    return x


def test_plain_is_the_gradient_of_ddim_as_written_down(problem: Problem) -> None:
    problem.clear()
    problem.loss(hand_written(problem, 3)).backward()
    reference = problem.gradients()
    problem.clear()
    problem.loss(plain(problem, 3)).backward()
    assert max(compare(problem.gradients(), reference)["relative_error"].values()) < 1e-5


def test_torchdiffeq_solves_the_same_equation_and_its_gradient_converges(problem: Problem) -> None:
    errors = []
    for steps in (4, 16):
        found = []
        for way in (plain, torchdiffeq):
            problem.clear()
            x0 = way(problem, steps)
            problem.loss(x0).backward()
            found.append((x0.detach(), problem.gradients()))
        (ours, exact), (theirs, adjoint) = found
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
        errors.append(compare(adjoint, exact)["relative_error"])
    for name in ("x_T", "cond", "weights"):  # first order: a quarter of the error, roughly
        assert errors[1][name] < 0.6 * errors[0][name], errors


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("bench") / "small.json"
    arguments = ["--small", "--out", str(out), "--repeats", "2", "--steps", "2", "3", "--wants", "all"]
    # With what these need: plain, and both ends of the ladder.
    arguments += ["--flat-to", "6", "--methods", "exact-1/2", "checkpoint", "torchdiffeq"]
    main(arguments)
    return out, arguments


def test_a_run_measures_bits_calls_and_memory(small_run: tuple[Path, list[str]]) -> None:
    figures = Figures.read(small_run[0])
    calls = {"plain": 1, "exact-max": 1, "exact-min": 2, "checkpoint": 2, "torchdiffeq": 2}
    for steps in (2, 3):
        for name, each in calls.items():
            runs = figures.repeats(steps, "all", name)
            assert len(runs) == 2
            expected = each * steps - (name == "exact-min")  # the last call is never redone
            assert {run["calls"] for run in runs} == {expected}, name
            assert all(run["bits_equal"] for run in runs) == (name != "torchdiffeq"), name
            assert (max(run["relative_error"]["weights"] for run in runs) > 1e-3) == (name == "torchdiffeq")
    peaks = [figures.peak(n, "all", "exact-min") for n in figures.steps_with_peak("all", "exact-min")]
    assert len(peaks) == 3
    assert max(filter(None, peaks)) <= 1.05 * min(filter(None, peaks))
    assert figures.peak(3, "all", "plain") > figures.peak(2, "all", "plain") > 0  # type: ignore[operator]
    assert not [str(t) for t in targets(figures) if "bit" in t.text and not t.met]
    assert small_run[0].with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_is_taken_up_where_it_stopped(small_run: tuple[Path, list[str]]) -> None:
    out, arguments = small_run
    whole = json.loads(out.read_text())
    kept = [c for c in whole["times"] if c["method"] != "checkpoint" or c["repeat"] == 0]
    part = dict(whole, times=kept)
    other = out.with_name("part.json")
    other.write_text(json.dumps(part))
    main([str(other) if a == str(out) else a for a in arguments])
    again = json.loads(other.read_text())
    assert again["times"][: len(kept)] == kept  # measured once, never again
    added = [(c["steps"], c["method"], c["repeat"]) for c in again["times"][len(kept) :]]
    assert added == [(2, "checkpoint", 1), (3, "checkpoint", 1)]
    assert again["memory"] == whole["memory"]


def test_the_machine_is_described_and_not_named() -> None:
    described = machine(CPU)
    assert described["torch"] == torch.__version__
    assert described["malloc"].keys() == MALLOC.keys()
    text = json.dumps(described)
    assert str(Path.cwd()) not in text
    assert os.uname().nodename not in text


def made_up(**ratios: float) -> dict[str, Any]:
    """Results in which method m takes ``ratios[m]`` times as long as plain, in rounds of which one was slow."""
    times = [
        {"steps": 10, "wants": "all", "method": name, "repeat": r, "seconds": ratio * slow, "calls": 20,
         "bits_equal": name != "torchdiffeq", "relative_error": {"x_T": 0.0 if name != "torchdiffeq" else 0.3}}
        for r, slow in enumerate((1.0, 7.0, 1.1))
        for name, ratio in {"plain": 1.0, **ratios}.items()
    ]  # fmt: skip
    memory = [
        {"steps": n, "wants": "all", "method": m, "peak_bytes": b}
        for n, m, b in [
            (1, "one step", 100),
            (10, "exact-min", 115),
            (10, "torchdiffeq", 300),
            (10, "plain", 900),
        ]
    ]
    settings = {"parameters": 19_600_000, "latents": [1, 4, 32, 32], "latent_bytes": 1}
    about = {"processor": "P", "threads": 2, "accelerator": None, "torch": "2"}
    return {"machine": about, "settings": settings, "memory": memory, "times": times}


def test_ratios_are_taken_within_a_round() -> None:
    figures = Figures(made_up(**{"exact-min": 1.25}))
    assert figures.ratio(10, "all", "exact-min", "plain") == pytest.approx(1.25)
    assert figures.seconds(10, "all", "plain") == 1.1


@pytest.mark.parametrize(("ratio", "met"), [(1.29, True), (1.31, False)])
def test_targets_pass_and_fail(ratio: float, met: bool) -> None:
    judged = {t.text: t for t in targets(Figures(made_up(**{"exact-min": ratio, "torchdiffeq": 1.5})))}
    assert judged["N=10 all: time of exact-min over plain"].met is met
    assert judged["N=10 all: most network calls of a plan over N"].value == 2
    memory = judged["N=10 all: memory of exact-min, latents aside, over one step's backpropagation"]
    assert memory.value == pytest.approx((115 - 11) / 100)
    assert judged["N=10 all: memory of exact-min over torchdiffeq"].value == pytest.approx(115 / 300)


def test_the_table_says_what_the_results_say(tmp_path: Path) -> None:
    data = made_up(**{"exact-min": 1.25, "torchdiffeq": 1.3})
    (tmp_path / "exact_gradient.json").write_text(json.dumps(data))
    (tmp_path / "other.json").write_text(
        json.dumps({"figures": [["ambigrams that read both ways", "17 of 20"]]})
    )
    text = readme.block(tmp_path)
    assert '| `Exact("min")` | 1.25 | 0 MB | 20 | the same bits |' in text
    assert "| torchdiffeq `odeint_adjoint` | 1.30 | 0 MB | 20 | relative error 30–30 % |" in text
    assert "median over 3 interleaved repeats" in text
    assert "| ambigrams that read both ways | 17 of 20 |" in text
    assert readme.block(tmp_path / "none") == ""


def test_the_readme_holds_the_results_and_nothing_else() -> None:
    assert marked(readme.README.read_text(), "figures") == readme.block(), "run: make figures"


PAGE = "# Title\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nend\n"


def test_blocks_of_a_page_are_rewritten_and_nothing_else() -> None:
    assert marked(PAGE, "a") == "old\n"
    assert marked(PAGE, "b") == ""
    new = rewritten(PAGE, {"b": "x\ny\n", "a": ""})
    assert new == "# Title\n<!-- a -->\n<!-- /a -->\nbetween\n<!-- b -->\nx\ny\n<!-- /b -->\nend\n"
    assert rewritten(new, {"a": "old\n", "b": ""}) == PAGE


@pytest.mark.parametrize("text", ["no table here", PAGE + PAGE, "<!-- /a -->\n<!-- a -->\n"])
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one line <!-- a -->"):
        rewritten(text, {"a": "new"})


def test_the_pipelines_four_ways_give_the_same_bits_in_bounded_memory(tmp_path: Path) -> None:
    from benchmarks.pipeline import NAMES, rows
    from benchmarks.pipeline import main as pipeline

    out = tmp_path / "pipeline.json"
    arguments = ["--small", "--steps", "2", "--repeats", "1", "--memory-steps", "1", "2", "--wants", "all"]
    assert pipeline([*arguments, "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert all(cell["bits_equal"] for cell in data["times"])
    # The decoder is large beside so small a network: at "min" every network call is redone.
    assert {cell["method"]: cell["calls"] for cell in data["times"]} == dict(
        zip(NAMES, (2, 2, 4, 4), strict=True)
    )
    ((what, _),) = rows(Record(out, data["machine"], data["settings"]))
    assert what.endswith("every weight and input")


def test_host_bytes_see_what_is_kept_and_what_is_given_back() -> None:
    before = host_bytes()
    kept = [bytearray(os.urandom(1000)) for _ in range(20_000)]
    risen = host_bytes() - before
    assert risen == pytest.approx(20e6, rel=0.3)
    del kept
    assert host_bytes() - before < risen / 2
