"""A budget or a plan with `through=`: what is counted is the truncated run, in bytes and in calls; and `invert` through
some steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import backdrift as bd
from backdrift.cli import app
from backdrift.cli.errors import BAD_INPUT
from backdrift.errors import InputError, MissingGradientError
from backdrift.pipelines.planned import count_job
from backdrift.recipes import Embedding, Pair
from small_jobs import PIPELINES, call_of, gradients, measured
from tiny_pipelines import PICTURE, WIDTH, noise_for, tiny_sd


@pytest.mark.parametrize("through", ["steps:0,2", "steps:-1"])
def test_the_truncated_run_is_what_is_planned(through: str) -> None:
    pipe = PIPELINES["sd"]()
    call = call_of(pipe, 4)
    plain, run = gradients(pipe, call, memory="max", through=through)
    chosen = len(run.trace.steps or ())
    assert (run.stats.calls_forward, run.stats.vjps) == (4, chosen)

    _, run = gradients(pipe, call, memory=10**12, through=through)
    assert run.plan is not None
    weights = run.plan.job.weights
    used = measured(pipe, call, memory="max", through=through)
    assert run.plan.plain.needs.peak - weights == pytest.approx(used, rel=0.1)
    assert used < 0.8 * measured(pipe, call, memory="max")

    least, most = run.plan.least.needs.peak, run.plan.plain.needs.peak
    for share in (0.02, 0.5):
        budget = int(least + share * (most - least))
        found, run = gradients(pipe, call, memory=budget, through=through)
        assert run.plan is not None
        assert run.stats.calls_redone == run.plan.chosen.needs.redone <= chosen
        assert measured(pipe, call, memory=budget, through=through) + weights <= 1.1 * budget
        if run.plan.choices.guidance == "together":
            assert torch.equal(found[0], plain[0])
        else:
            torch.testing.assert_close(found[0], plain[0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("through", "carrying"),
    [("all", 4), ("last:2", 2), ("steps:0,3,detach_input", 2), ("random:3,seed=1", 3)],
)
def test_plan_counts_the_truncated_run(through: str, carrying: int) -> None:
    """The calls, the redone ones and the peak are the run's; the time is in multiples of the truncated run's own."""
    pipe = PIPELINES["sd"]()
    call = call_of(pipe, 4)
    call["latents"] = call["latents"].detach().requires_grad_(not through.startswith("last"))
    train = "unet.*attn2*"
    plan = bd.plan(pipe, **call, train=train, through=through, choices=bd.Choices(keep=0))
    assert (plan.job.network_calls, plan.job.graded_calls) == (4, carrying)
    assert (plan.chosen.needs.calls, plan.chosen.needs.redone) == (4 + carrying, carrying)
    with bd.differentiable(pipe, plan, train=train, through=through) as run:
        images = pipe(**call).images
    images.square().mean().backward()
    assert (run.stats.calls_forward, run.stats.calls_redone, run.stats.vjps) == (4, carrying, carrying)
    profiles = [kind.profile() for kind in plan.job.calls]
    reached = [moment.call for moment in plan.job.backward]
    plain = sum(p.forward_flops for p in profiles) + sum(profiles[i].backward_flops for i in reached)
    assert plan.time == pytest.approx(1 + carrying * profiles[0].forward_flops / plain, rel=1e-6)
    said = f"{carrying} of 4 network calls carry the gradient"
    assert (said in str(plan)) == (through != "all")


def test_a_truncated_plan_is_within_ten_percent_of_the_measured_peak() -> None:
    pipe = PIPELINES["sd"]()
    call = call_of(pipe, 4)
    for choices in (bd.Choices(), bd.Choices(keep=0), bd.Choices(keep=1)):
        plan = bd.plan(pipe, **call, through="steps:0,2", choices=choices)
        used = measured(pipe, call, memory=plan, through="steps:0,2")
        assert plan.peak - plan.job.weights == pytest.approx(used, rel=0.1), choices


def test_one_count_stands_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    from backdrift.pipelines import choosing

    counted = []
    monkeypatch.setattr(choosing, "count_job", lambda *a, **k: counted.append(1) or count_job(*a, **k))
    pipe = PIPELINES["sd"]()
    call, through = call_of(pipe, 4, side=16), bd.Random(2, seed=3)
    steps = set()
    for draw in range(4):
        _, run = gradients(pipe, call, memory=10**9, through=through.at(draw))
        assert run.plan is not None
        assert run.plan.job.graded_calls == run.stats.vjps == 2
        steps.add(run.trace.steps)
    assert len(steps) > 1
    assert len(counted) == 1


def test_trained_weights_are_counted_though_no_argument_requires_grad() -> None:
    pipe = PIPELINES["sd"]()
    call = call_of(pipe, 3)
    free = bd.plan(pipe, **call, train="unet", optimizer="sgd")
    call["latents"] = call["latents"].detach()
    fixed = bd.plan(pipe, **call, train="unet", optimizer="sgd")
    assert fixed.job.graded_calls == 3
    assert fixed.peak == pytest.approx(free.peak, rel=0.05)


def test_a_plan_without_any_gradient_is_refused() -> None:
    with pytest.raises(MissingGradientError, match=r"'last:1' cuts the noise off.*train="):
        bd.plan(tiny_sd(), 16, 16, 3, through="last:1")
    with pytest.raises(InputError, match=r"Last\(4\) asks for more steps than the run's 3"):
        bd.plan(tiny_sd(), 16, 16, 3, through="last:4", train="unet")


def test_on_the_command_line() -> None:
    common = ["plan", "sd", "--size", "32", "--steps", "4", "--train", "unet", "--json"]
    found = {}
    for through in ("all", "last:1"):
        done = CliRunner().invoke(app, [*common, "--through", through])
        assert done.exit_code == 0, done.output
        found[through] = json.loads(done.stdout)
    plain, last = (found[k]["plain"]["peak"] for k in ("all", "last:1"))
    assert last < plain
    most = {key: max(row["network_calls"] for row in plan["options"]) for key, plan in found.items()}
    assert (most["all"] > 5, most["last:1"] <= 5) == (True, True)
    assert any("1 of 4 network calls carry" in line for line in found["last:1"]["why"])
    wrong = CliRunner().invoke(app, [*common, "--through", "first:1"])
    assert wrong.exit_code == BAD_INPUT
    assert "none of 'all'" in wrong.stderr


def test_invert_through_some_steps_is_the_choices_gradient(tmp_path: Path) -> None:
    """The first update's gradient by the embedding, against `differentiable` on the same call."""
    pipe, noise = tiny_sd(), noise_for(tiny_sd())
    target = torch.rand(3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    norms = {}
    for through in ("all", "last:1", "steps:0,2,detach_input"):
        leaf = vectors.clone().requires_grad_()
        embeds = Embedding(leaf).apply(pipe, "a 2")
        with bd.differentiable(pipe, "min", through=through):
            images = pipe(
                prompt_embeds=embeds, latents=noise, num_inference_steps=3, guidance_scale=7.5
            ).images
        (known,) = torch.autograd.grad((images - target).square().mean(), leaf)
        run = bd.invert(
            pipe, [Pair("a 2", target, noise=noise)], init=vectors, num_inference_steps=3, steps=1,
            through=through, out=tmp_path / through.replace(":", "-"), progress=False,
        )  # fmt: skip
        assert run.record["settings"]["through"] == run.record["trace"]["through"] == through
        norms[through] = run.record["iterations"][0]["grad_norm"]
        assert norms[through] == pytest.approx(known.norm().item(), rel=1e-4)
    assert len({round(norm, 9) for norm in norms.values()}) == 3
    with pytest.raises(InputError, match="asks for more steps"):
        bd.invert(
            pipe, [Pair("a 2", target, noise=noise)], num_inference_steps=3, through="last:4",
            out=tmp_path / "x", progress=False,
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_invert_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_sd().save_pretrained(tmp_path / "model")
    common = [
        "invert",
        "a 2",
        "--effect",
        "b",
        "--model",
        "model",
        "--num-inference-steps",
        "3",
        "--steps",
        "1",
    ]
    common += ["--n-slots", "1", "--no-progress", "--out", "run"]
    done = CliRunner().invoke(app, [*common, "--through", "last:2"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["settings"]["through"] == "last:2"
    assert record["trace"]["steps"] == [1, 2]
    wrong = CliRunner().invoke(app, [*common, "--through", "first:2"])
    assert wrong.exit_code == BAD_INPUT
