"""`optimize(through=...)`: the choice's gradient, its draws, the trace in the record, the page, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import backdrift as bd
from backdrift.cli import app
from backdrift.cli.errors import BAD_INPUT
from backdrift.errors import InputError, MissingGradientError
from backdrift.trace import Trace
from tiny_pipelines import noise_for, tiny_sd

N = 4
WEIGHTS = "unet.mid_block.attentions.*attn2*"


def brightness(images: Tensor) -> Tensor:
    return (images - 0.9).square().flatten(1).mean(1)


def optimized(pipe: Any, out: Path, **kwargs: Any) -> bd.Run:
    given = {"num_inference_steps": N, "steps": 2, "progress": False, "over": WEIGHTS} | kwargs
    return bd.optimize(pipe, "a 2", brightness, out=out, **given)


def test_the_first_update_is_the_choices_gradient(tmp_path: Path) -> None:
    pipe, noise, rate = tiny_sd(), noise_for(tiny_sd()), 10.0
    found = {}
    for through in ("all", "last:1", bd.Steps([0, 2], detach_input=True)):
        run = bd.differentiable(pipe, "min", train=WEIGHTS, through=through)
        size = {"height": 16, "width": 16}
        images = run(["a 2"], latents=noise, num_inference_steps=N, **size).images
        names = {n: p for n, p in pipe.unet.named_parameters() if f"unet.{n}" in run.trained}
        gradients = torch.autograd.grad(brightness(images).mean(), list(names.values()))
        done = optimized(
            pipe, tmp_path / str(len(found)), noise=noise, steps=1, optimizer="sgd", lr=rate, through=through
        )
        entry = done.record["iterations"][0]
        norm = torch.stack([g.double().norm() for g in gradients]).norm().item()
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert done.record["settings"]["through"] == done.record["trace"]["through"]
        assert done.record["trace"]["steps"] == list(run.trace.steps or ())
        for ours, known in zip(done.record["trace"]["eps"], run.trace.eps, strict=True):
            assert ours == (None if known is None else pytest.approx(known, rel=1e-5))
        assert "through" not in entry
        found[str(through)] = entry["grad_norm"]
    assert len(set(found.values())) == 3


def test_random_steps_are_drawn_by_iteration_and_do_not_depend_on_chunks(tmp_path: Path) -> None:
    pipe = tiny_sd()
    whole = optimized(pipe, tmp_path / "a", batch_size=2, steps=3, through="random:2,seed=3")
    parts = optimized(pipe, tmp_path / "b", batch_size=2, steps=3, chunk=1, through=bd.Random(2, seed=3))
    drawn = [entry.get("through") for entry in whole.record["iterations"]]
    assert drawn[:-1] == [list(bd.Random(2, seed=3).choose(N, i).steps) for i in range(3)]
    assert drawn[-1] is None  # the last one is measured only
    assert drawn == [entry.get("through") for entry in parts.record["iterations"]]
    assert parts.record["trace"]["latents"][-1] == pytest.approx(
        whole.record["trace"]["latents"][-1], rel=1e-3
    )


def test_over_the_noise_a_cut_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(MissingGradientError, match=r"over='noise'.*Steps\(range\(3, 4\)\)"):
        optimized(tiny_sd(), tmp_path / "a", over="noise", through="last:1")
    with pytest.raises(InputError, match="Last\\(5\\) asks for more steps"):
        optimized(tiny_sd(), tmp_path / "a", through="last:5")
    with pytest.raises(InputError, match="must be All"):
        optimized(tiny_sd(), tmp_path / "a", through=3)
    assert not (tmp_path / "a").exists()
    run = optimized(tiny_sd(), tmp_path / "b", over="noise", through=bd.Steps([3]))
    assert run.record["trace"]["latents"][0] > 0


def test_the_page_shows_the_gradient_at_the_steps(tmp_path: Path) -> None:
    run = optimized(tiny_sd(), tmp_path / "a", over="noise")
    page = run.report.read_text()
    assert "The gradient at the sampler" in page
    assert 'aria-label="norm of the gradient by step, from noise (left) to picture"' in page
    record = json.loads((run.folder / "record.json").read_text())
    assert record["trace"]["iteration"] == 1
    assert len(record["trace"]["latents"]) == N + 1
    # A record of before traces were kept is still drawn.
    del record["trace"]
    (run.folder / "record.json").write_text(json.dumps(record))
    assert "The gradient at the sampler" not in bd.Run.load(run.folder).report.read_text()


def test_traces_of_parts_of_a_batch_add_up_as_vectors_do() -> None:
    assert Trace.together([]) is None
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = bd.Denoiser(lambda x, t, cond: torch.sin(x), bd.Flow(), "flow_prediction")

    def trace(rows: Tensor) -> Trace:
        solution = bd.sample(model, rows.clone().requires_grad_(), grid=[0.9, 0.5, 0.1])
        solution.x0.square().sum().backward()
        assert solution.trace is not None
        return solution.trace

    whole, parts = trace(x).as_dict(), Trace.together([trace(x[:1]), trace(x[1:])])
    assert parts is not None
    for name in ("latents", "eps", "growth"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-12)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_sd().save_pretrained(tmp_path / "model")
    common = ["optimize", "a b", "--loss", "brightness:0.9", "--model", "model", "--num-inference-steps", "3"]
    common += ["--steps", "1", "--no-progress", "--over", WEIGHTS, "--out", "run"]
    done = CliRunner().invoke(app, [*common, "--through", "last:2,discount=0.9"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["settings"]["through"] == "last:2,discount=0.9"
    assert record["trace"]["steps"] == [1, 2]
    wrong = CliRunner().invoke(app, [*common, "--through", "first:2"])
    assert wrong.exit_code == BAD_INPUT
    assert "none of 'all'" in wrong.stderr
