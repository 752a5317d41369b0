"""Guided applications: three ways on equal calls, the same bits after a kill, a lower loss on the finished pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError
from backdrift.losses import MSE, CLIPImage, GramStyle
from backdrift.recipes import Guiding, Sampling, guide_class, guide_object, guide_style
from backdrift.recipes.guided_page import along
from backdrift.recipes.guided_variants import affordable, with_scheduler
from backdrift.recipes.guiding import Task, compare
from backdrift.recipes.judges import Judge
from backdrift.recipes.references import made
from backdrift.run import Run
from tiny_pipelines import PICTURE, tiny_sd, tiny_sd3

QUICK = Guiding(
    num_inference_steps=6, guidance_scale=3.0, n=2, start=0.3, stop=0.7, strength=1.5, repeats=2, one_step="calls"
)  # fmt: skip
TARGET = torch.linspace(0, 1, 3 * PICTURE * PICTURE).view(3, PICTURE, PICTURE)
NAMES = ("unguided", "one-step", "n-step")


def small_task() -> Task:
    """A loss that a tiny pipeline can lower, and a judge that is something else."""
    bright = Judge("brightness", lambda images, prompts: images.flatten(1).mean(1))
    return Task("style", "a tiny task", MSE(TARGET), (bright,), {"target": "a ramp"}, (TARGET, "the target"))


def small(out: Path, how: Guiding = QUICK, pipe: Any = None, **changes: Any) -> Run:
    given: dict[str, Any] = {"samples": 2, "seed": 3, "progress": False, "out": out} | changes
    return compare(tiny_sd() if pipe is None else pipe, "a b", small_task(), how, Sampling(**given))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small(tmp_path_factory.mktemp("runs") / "done")


# ---- what is sampled ---------------------------------------------------------------------------------


def test_the_unguided_pictures_are_the_pipelines_own(done: Run) -> None:
    noise = bd.noise(tiny_sd(), seed=3, batch_size=2, height=PICTURE, width=PICTURE)
    plain = tiny_sd()(
        ["a b"] * 2, latents=noise, num_inference_steps=6, guidance_scale=3.0, height=PICTURE, width=PICTURE,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(done.tensors("unguided")["images"].clamp(0, 1), plain, atol=1e-6, rtol=0)


def test_guided_pictures_have_a_lower_loss_than_unguided_ones(done: Run) -> None:
    loss = {name: done.record["variants"][name]["scores"]["loss"] for name in NAMES}
    for name in ("one-step", "n-step"):
        assert all(a < 0.995 * b for a, b in zip(loss[name], loss["unguided"], strict=True)), loss
    images = done.tensors("n-step")["images"].clamp(0, 1)
    assert loss["n-step"] == pytest.approx(MSE(TARGET)(images).tolist(), rel=1e-6)
    bright = done.record["variants"]["n-step"]["scores"]["brightness"]
    assert bright == pytest.approx(images.flatten(1).mean(1).tolist(), rel=1e-6)


def test_one_step_guidance_has_as_many_calls_and_products(done: Run) -> None:
    ours, theirs = (done.record["variants"][name] for name in ("n-step", "one-step"))
    assert [s["index"] for s in ours["steps"]] == [2, 3, 4]  # 2/6 to 4/6 of the run
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        assert (a["attempts"], a["n"], a["network_calls"], a["vjps"]) == (2, 2, 4, 4)
        assert (b["attempts"], b["n"], b["network_calls"], b["vjps"]) == (4, 1, 4, 4)
    plain = done.record["variants"]["unguided"]
    assert (plain["network_calls"], plain["vjps"], plain["decodes"]) == (6, 0, 0)
    # three guided steps with two tries of two steps, three others; what the way back redoes comes on top
    assert ours["network_calls"] - ours["redone"] == theirs["network_calls"] - theirs["redone"] == 3 * 4 + 3
    stats = done.record["stats"]
    assert stats["vjps"] == ours["vjps"] + theirs["vjps"] == 24


def test_calls_of_adaptive_steps_count_half_as_much_again() -> None:
    steps = [{"index": 2, "estimate_steps": 4}, {"index": 4, "estimate_steps": 1}]
    assert affordable({"n": 4, "steps": steps}, 6, None) == [1, 1, 4, 1, 1, 1]
    assert affordable({"n": "adaptive", "steps": steps}, 6, None) == [1, 1, 6, 1, 2, 1]


def test_tries_by_seconds_are_measured_once_and_written_down(tmp_path: Path) -> None:
    by_time = replace(QUICK, one_step="seconds")
    run = small(tmp_path / "time", by_time, samples=1)
    ratio = run.record["one_step"]
    tries = max(1, round(2 * ratio))
    assert [step["attempts"] for step in run.record["variants"]["one-step"]["steps"]] == [tries] * 3
    again = small(tmp_path / "again", replace(QUICK, one_step=ratio), samples=1)
    assert torch.equal(run.tensors("one-step")["images"], again.tensors("one-step")["images"])
    # a run that was killed after it had been measured does not measure again
    del run.record["variants"]["one-step"]
    run.record |= {"status": "running", "one_step": 2.5}
    run.save_record()
    steps = small(tmp_path / "time", by_time, samples=1).record["variants"]["one-step"]["steps"]
    assert [step["attempts"] for step in steps] == [5] * 3


def test_repeats_by_parts_of_the_run() -> None:
    paper = Guiding()
    assert paper.guided == list(range(30, 70))
    assert paper.attempts() == [1] * 40 + [2] * 30 + [1] * 30  # t = 70 to 61 once, 60 to 31 twice
    assert Guiding(repeats=3).attempts() == [1] * 30 + [3] * 40 + [1] * 30
    assert Guiding(repeats=((0.5, 2),)).attempts() == [1] * 50 + [2] * 20 + [1] * 30


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(done: Run, tmp_path: Path) -> None:
    again = small(tmp_path / "again")
    other = small(tmp_path / "other", seed=4)
    for name in NAMES:
        assert torch.equal(done.tensors(name)["images"], again.tensors(name)["images"])
        assert not torch.equal(done.tensors(name)["images"], other.tensors(name)["images"])
    assert done.record["comparison"]["scores"] == again.record["comparison"]["scores"]


def test_the_record_alone_makes_the_run_again(done: Run, tmp_path: Path) -> None:
    said = json.loads((done.folder / "record.json").read_text())
    settings, how = said["settings"], Guiding.__dataclass_fields__
    values = {name: settings[name] for name in how}
    again = small(tmp_path / "again", Guiding(**values), samples=settings["samples"], seed=said["seed"])
    assert again.record["fingerprint"] == said["fingerprint"]
    for name in NAMES:
        assert torch.equal(done.tensors(name)["images"], again.tensors(name)["images"])


def test_a_memory_plan_changes_no_picture_beyond_rounding(done: Run, tmp_path: Path) -> None:
    exact = small(tmp_path / "exact", memory="max")
    for name in NAMES:
        torch.testing.assert_close(
            done.tensors(name)["images"], exact.tensors(name)["images"], atol=2e-4, rtol=0
        )


def test_flow_pipelines_and_other_schedulers(tmp_path: Path) -> None:
    flow = small(tmp_path / "flow", pipe=tiny_sd3(), samples=1)
    loss = {name: flow.record["variants"][name]["scores"]["loss"][0] for name in NAMES}
    assert loss["n-step"] < loss["unguided"]
    euler = small(tmp_path / "euler", replace(QUICK, scheduler="euler"), samples=1)
    assert euler.record["settings"]["pipeline"]["scheduler"] == "EulerDiscreteScheduler"
    pipe = tiny_sd()
    own = pipe.scheduler
    assert with_scheduler(pipe, "dpm").scheduler is not own
    assert pipe.scheduler is own
    with pytest.raises(InputError, match="Did you mean 'euler'"):
        with_scheduler(pipe, "eular")
    with pytest.raises(InputError, match="flow matching"):
        with_scheduler(pipe, "flow")


# ---- killed and continued ----------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_guiding_recipes as t
def kill(run, name):
    if name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
t.small(Path(sys.argv[1]), callback=kill)
"""


@pytest.mark.parametrize("after", ["unguided", "n-step"])
def test_a_killed_run_goes_on_with_the_same_bits(after: str, done: Run, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), after],
        cwd=Path(__file__).parent, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    left = Run.load(tmp_path / "run")
    assert after in left.record["variants"]
    assert not left.finished
    seen: list[str] = []
    run = small(tmp_path / "run", callback=lambda run, name: seen.append(name))
    assert seen == {"unguided": ["n-step", "one-step"], "n-step": ["one-step"]}[after]
    assert run.finished
    for name in NAMES:
        assert torch.equal(done.tensors(name)["images"], run.tensors(name)["images"])


def test_a_finished_run_is_returned_and_another_one_is_refused(done: Run) -> None:
    before = (done.folder / "record.json").read_bytes()
    assert small(done.folder).record == done.record
    with pytest.raises(InputError, match="other settings"):
        small(done.folder, seed=4)
    with pytest.raises(InputError, match="already holds a run"):
        small(done.folder, resume=False)
    assert (done.folder / "record.json").read_bytes() == before


# ---- the page ----------------------------------------------------------------------------------------


def test_the_page_shows_all_three_ways(done: Run) -> None:
    pictures = done.record["pictures"]
    assert list(pictures)[:4] == ["reference", "unguided", "one-step", "n-step"]
    assert {f"{name} strip 0" for name in NAMES} <= set(pictures)
    page = (done.folder / "report.html").read_text()
    for words in ("Side by side", "one-step (n = 1)", "n = 2", "brightness ↑", "loss ↓", "The loss along the steps",
                  "as make the network calls"):  # fmt: skip
        assert words in page, words
    assert page.count("<polyline") >= 3
    lines = done.record["curves"]["lines"]
    assert [[x for x, _ in line["points"]] for line in lines] == [[2, 3, 4, 6]] * 3
    ends = [line["points"][-1][1] for line in lines]
    means = [sum(v) / 2 for v in (done.record["variants"][n]["scores"]["loss"] for n in NAMES)]
    assert ends == pytest.approx(means)


def test_what_the_safety_checker_flags_is_blurred(done: Run, tmp_path: Path) -> None:
    pipe = tiny_sd(safety_checker=True)
    pipe.safety_checker.concept_embeds_weights.fill_(-2.0)  # below any cosine: it flags everything
    run = small(tmp_path / "flagged", pipe=pipe)
    pictures = run.record["pictures"]
    assert {name for name, entry in pictures.items() if entry.get("flagged")} == set(pictures) - {"reference"}
    assert "blurred: a safety filter flagged it" in (run.folder / "report.html").read_text()
    # the tensors are the pictures themselves, not blackened ones
    assert torch.equal(run.tensors("n-step")["images"], done.tensors("n-step")["images"])


def test_a_strip_keeps_both_ends() -> None:
    strip = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    shown, steps = along(strip, list(range(30, 70)))
    assert len(shown) == 12
    assert steps[0] == 30
    assert steps[-1] == 69
    assert torch.equal((shown[:, 0, 0, 0] * 255).round().long() + 30, torch.tensor(steps))


# ---- the four applications on the built-in pipeline --------------------------------------------------


SHORT = Guiding(
    num_inference_steps=6, guidance_scale=3.0, n=2, start=0.3, stop=0.8, strength=0.3, repeats=1, one_step="calls"
)  # fmt: skip


def applied(pipe: Any, kind: str, out: Path) -> tuple[Run, Any]:
    sampling = Sampling(samples=1, seed=7, progress=False, out=out, strip=0)
    reference = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    if kind == "style":
        return guide_style(pipe, "a red seven on white", reference, SHORT, sampling), GramStyle(reference)
    if kind == "object":
        blue = made(pipe, "a blue two on grass", seed=1, num_inference_steps=6)
        return guide_object(pipe, "a two on white", blue, SHORT, sampling), CLIPImage(blue)
    run = guide_class(pipe, "a red digit on white", "seven", SHORT, sampling)
    return run, bd.losses.resolve("class:seven")


@pytest.mark.parametrize("kind", ["style", "object", "class"])
def test_applications_lower_their_loss_on_the_finished_picture(kind: str, tmp_path: Path) -> None:
    run, loss = applied(bd.load(), kind, tmp_path / kind)
    images: dict[str, Tensor] = {name: run.tensors(name)["images"].clamp(0, 1) for name in NAMES}
    values = {name: float(loss(images[name], run.record["prompt"])) for name in NAMES}
    assert values["n-step"] < 0.98 * values["unguided"], values
    assert run.record["kind"] == f"guide-{kind}"
    assert len(run.record["comparison"]["scores"]) >= 3


def test_a_loss_beside_the_subjects(tmp_path: Path) -> None:
    pipe, sampling = bd.load(), Sampling(samples=1, seed=7, progress=False, out=tmp_path / "also", strip=0)
    blue = made(pipe, "a blue two on grass", seed=1, num_inference_steps=6)
    run = guide_object(pipe, "a digit on white", blue, SHORT, sampling, also="0.1*class:two")
    assert run.record["settings"]["also"] == "0.1*class:two"
    subject, label = CLIPImage(blue), bd.losses.resolve("class:two")
    for name in NAMES:
        images = run.tensors(name)["images"].clamp(0, 1)
        sums = subject(images) + 0.1 * label(images)
        assert run.record["variants"][name]["scores"]["loss"] == pytest.approx(sums.tolist(), rel=1e-5)


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "n=0"),
        ({"n": "many"}, "n='many'"),
        ({"n": True}, "n=True"),
        ({"n": 40}, "n=40 is more than the 31"),
        ({"start": 0.7, "stop": 0.3}, "start < stop"),
        ({"stop": 1.2}, "start < stop"),
        ({"start": 0.311, "stop": 0.315}, "no step of 100"),
        ({"strength": 0.0}, "strength=0.0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"one_step": 0.0}, "one_step=0.0"),
        ({"one_step": "minutes"}, "'seconds', 'calls'"),
        ({"repeats": ((0.5, 1), (0.3, 2))}, "rising"),
        ({"repeats": ((0.5, 0),)}, "rising"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Guiding(**changes)


def test_what_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samples=0"):
        small(tmp_path / "run", samples=0)
    with pytest.raises(InputError, match="height=17"):
        small(tmp_path / "run", height=17)
    with pytest.raises(InputError, match="tokens"):
        compare(tiny_sd(), "abcdefghijkl", small_task(), QUICK, Sampling(out=tmp_path / "run"))
    with pytest.raises(InputError, match="Did you mean 'seven'"):
        guide_class(tiny_sd(), "a b", "sevn", QUICK, Sampling(out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
