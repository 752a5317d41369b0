"""The certificate of pipelines, and its command."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import backdrift as bd
from backdrift.cli import app
from backdrift.cli.verify import METHODS, SOLVERS, VerifySettings
from backdrift.errors import InputError
from backdrift.verification import menu
from tiny_pipelines import (
    TOKENS,
    WIDTH,
    noise_for,
    tiny_flux,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_text_encoder,
    tiny_tokenizer,
)

SHORT: dict[str, Any] = {"steps": [2, 4], "reference_steps": 8, "progress": False}


def test_a_pipelines_errors_are_those_computed_by_hand() -> None:
    pipe = tiny_sd()
    made = bd.verify(
        pipe, "a b", "contrast", methods=["exact:min", "continuous", "continuous:original"], guidance_scale=3.0,
        seed=2, directions=1, **SHORT,
    )  # fmt: skip
    view = bd.as_denoiser(pipe, "a b", 3.0)
    objective = bd.losses.resolve("contrast")

    def gradient(method: Any) -> torch.Tensor:
        x = noise_for(pipe, seed=2).requires_grad_()
        grid = bd.TimeGrid("logsnr", 4)
        solution = bd.sample(view.model, x, view.cond, solver=bd.Euler(), grid=grid, gradient=method)
        pictures = pipe.vae.decode(solution.x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5
        return torch.autograd.grad(objective(pictures).sum(), x)[0].double()

    own, adjoint = gradient(bd.Plain()), gradient(bd.ContinuousAdjoint(form="original"))
    (row,) = [r for r in made.rows if r.name == "continuous:original" and r.steps == 4]
    assert row.own is not None
    assert row.own.relative == pytest.approx(float((adjoint - own).norm() / own.norm()), rel=1e-5)
    exact = next(r for r in made.rows if r.name == "exact:min" and r.steps == 4)
    assert exact.own is not None
    assert exact.own.relative == 0  # bit for bit, on a CPU
    (reference,) = [r for r in made.record["references"] if r["directions"]]
    assert reference["differences"] < 1e-5
    assert exact.differences is not None
    assert exact.differences < 1e-3
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert made.record["settings"]["model"]["class"] == "StableDiffusionPipeline"


def with_lora() -> Any:
    from peft import LoraConfig

    pipe = tiny_sd()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.requires_grad_(False).add_adapter(config)
    return pipe


@pytest.mark.parametrize("over", ["lora", "unet.*lora_A*"])
def test_over_lora_weights(over: str) -> None:
    pipe = with_lora()
    weights = {n: p for n, p in pipe.unet.named_parameters() if ("lora_A" if "A" in over else "lora") in n}
    made = bd.verify(
        pipe, "a b", "contrast", over=over, methods=["exact:min", "symplectic", "continuous"], guidance_scale=3.0,
        seed=2, directions=2, **SHORT,
    )  # fmt: skip
    assert made.record["settings"]["weights"] == len(weights) > 0
    view = bd.as_denoiser(pipe, "a b", 3.0, train=over)
    objective = bd.losses.resolve("contrast")

    def gradient(method: Any) -> torch.Tensor:
        x = noise_for(pipe, seed=2)
        x0 = bd.sample(view.model, x, view.cond, grid=bd.TimeGrid("logsnr", 4), gradient=method).x0
        pictures = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5
        found = torch.autograd.grad(objective(pictures).sum(), list(weights.values()))
        return torch.cat([g.flatten().double() for g in found])

    own, adjoint = gradient(bd.Plain()), gradient(bd.ContinuousAdjoint())
    found = {row.name: row for row in made.rows if row.steps == 4}
    assert found["continuous"].own is not None
    assert found["continuous"].own.relative == pytest.approx(
        float((adjoint - own).norm() / own.norm()), rel=1e-4
    )
    assert {found[name].verdict for name in ("exact:min", "symplectic")} == {"exact"}
    (reference,) = [r for r in made.record["references"] if r["directions"]]
    assert reference["differences"] < 1e-4
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_weights_that_cannot_be_meant_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"text_encoder.* as well .* name those of the unet"):
        bd.verify(tiny_sd(), "a b", "brightness", over="text_encoder", **SHORT)
    with pytest.raises(InputError, match="no active LoRA"):
        bd.verify(tiny_sd(), "a b", "brightness", over="lora", **SHORT)
    with pytest.raises(InputError, match=r"unet\.conv_xyz"):
        bd.verify(tiny_sd(), "a b", "brightness", over="unet.conv_xyz", **SHORT)


def test_a_flow_matching_pipeline_with_all_methods() -> None:
    made = bd.verify(tiny_sd3(), "a b", "brightness", directions=1, **SHORT)
    found = {row.name: row for row in made.rows if row.asked}
    assert found["exact:max"].form == "original"
    assert "continuous:exponential" in found
    assert [
        row.verdict for row in made.rows if row.name.startswith(("exact", "symplectic", "reversible"))
    ] == (["exact"] * 8)
    assert all(row.verdict != "failed" for row in made.rows), [row.reason for row in made.rows]
    assert made.recommendation.row is not None


def flux_with_encoders() -> Any:
    """``tiny_flux`` with text encoders: CLIP, and a T5 behind CLIP's tokenizer."""
    from transformers import T5Config, T5EncoderModel

    pipe, tokenizer = tiny_flux(), tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
        )
        t5 = T5EncoderModel(config).eval()
    parts = {"text_encoder": tiny_text_encoder(), "text_encoder_2": t5}
    parts |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
    for name, part in parts.items():
        setattr(pipe, name, part)
    pipe.tokenizer_max_length = TOKENS
    return pipe


@pytest.mark.parametrize("make", [tiny_sdxl, flux_with_encoders])
def test_other_families_through_the_view_of_their_call(make: Any) -> None:
    pipe = make()
    for over in ("noise", "cond"):
        made = bd.verify(
            pipe, "a b", "contrast", over=over, methods=["exact:min", "symplectic", "continuous"], directions=2,
            height=16, width=16, seed=2, **SHORT,
        )  # fmt: skip
        found = {row.name: row for row in made.rows if row.asked}
        assert {found[name].verdict for name in ("exact:min", "symplectic")} == {"exact"}
        (reference,) = [r for r in made.record["references"] if r["directions"]]
        assert reference["differences"] < 1e-4
    view = bd.as_denoiser(pipe, "a b", height=16, width=16, generator=torch.Generator().manual_seed(2))
    objective = bd.losses.resolve("contrast")

    def gradient(method: Any) -> torch.Tensor:
        x = view.x_T.clone().requires_grad_()
        grid = bd.TimeGrid("uniform" if make is flux_with_encoders else "logsnr", 4)
        x0 = bd.sample(view.model, x, view.cond, solver=bd.Euler(), grid=grid, gradient=method).x0
        return torch.autograd.grad(objective(view.decode(x0)).sum(), x)[0].double()

    own, adjoint = gradient(bd.Plain()), gradient(bd.ContinuousAdjoint())
    made = bd.verify(
        pipe, "a b", "contrast", methods=["continuous"], directions=0, height=16, width=16, seed=2, **SHORT
    )
    (row,) = [r for r in made.rows if r.name == "continuous" and r.steps == 4]
    assert row.own is not None
    assert row.own.relative == pytest.approx(float((adjoint - own).norm() / own.norm()), rel=1e-4)


def test_missing_settings_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"FluxPipeline.* text encoders"):
        bd.verify(tiny_flux(), "a b", "brightness", **SHORT)
    with pytest.raises(InputError, match="needs a prompt"):
        bd.verify(tiny_sd(), loss="brightness")
    with pytest.raises(InputError, match="needs a loss"):
        bd.verify(tiny_sd(), "a b")
    with pytest.raises(InputError, match="belong to a Denoiser"):
        bd.verify(tiny_sd(), "a b", "brightness", x_T=torch.zeros(1, 4, 8, 8))
    with pytest.raises(InputError, match="sd, flow"):
        bd.verify("sd15")
    with pytest.raises(InputError, match="multiple"):
        bd.verify(tiny_sd(), "a b", "brightness", height=17)
    with pytest.raises(InputError, match="Shorten it"):  # not cut off in silence
        bd.verify(tiny_sd(), "abcdefghijkl", "brightness", **SHORT)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    tiny_sd().save_pretrained(tmp_path / "model")
    return "model"


def call(*args: str) -> Any:
    return CliRunner().invoke(app, ["verify", *args])


def test_the_command_writes_what_the_library_measures(model: str) -> None:
    args = (
        "--model", model, "--prompt", "a b", "--loss", "contrast", "--steps", "2", "--steps", "4", "--methods",
        "exact:min", "--methods", "deis2s", "--reference-steps", "8", "--directions", "1", "--no-progress",
    )  # fmt: skip
    result = call(*args, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "Recommended for the sampler's own gradient: Exact(memory='min')" in " ".join(
        result.stdout.split()
    )
    record = json.loads(Path("run/record.json").read_text())
    made = bd.verify(
        tiny_sd(), "a b", "contrast", methods=["exact:min", "deis2s"], directions=1, steps=[2, 4], reference_steps=8,
        progress=False,
    )  # fmt: skip
    pairs = zip(record["rows"], made.record["rows"], strict=True)
    assert all(a["own"] == b["own"] and a["flow"] == b["flow"] and a["calls"] == b["calls"] for a, b in pairs)
    assert "backdrift verify --config run.yaml" in Path("run/report.html").read_text()
    again = call("--config", "run/run.yaml", "--out", "again", "--no-progress", "--json")
    assert again.exit_code == 0, again.output
    shown = json.loads(again.stdout)
    assert [r["own"] for r in shown["rows"]] == [r["own"] for r in record["rows"]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--solver", "heum"), "Did you mean 'heun'"),
        (("--methods", "exakt"), "Did you mean 'exact'"),
        (("--tolerance", "0"), "--tolerance"),
        (("--target", "both"), "--target"),
        (("--steps", "1"), "at least 2"),
        (("--grid", "evenly"), "rule of a TimeGrid"),
        (("--out", "model"), "no certificate"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(model: str, args: tuple[str, ...], words: str) -> None:
    result = call("--model", model, "--prompt", "a b", "--loss", "brightness", "--no-progress", *args)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not Path("runs").exists()


def test_a_model_of_ones_own_needs_a_prompt_and_a_loss(model: str) -> None:
    result = call("--model", model)
    assert result.exit_code == 2
    assert "needs a prompt" in result.stderr


def test_every_argument_of_the_library_is_a_setting() -> None:
    only_python = {"model", "x_T", "cond"}
    wanted = set(inspect.signature(bd.verify).parameters) - only_python
    assert wanted <= set(VerifySettings.model_fields)
    defaults = {name: p.default for name, p in inspect.signature(bd.verify).parameters.items()}
    for name in ("tolerance", "target", "directions", "reference_steps", "seed"):
        assert VerifySettings.model_fields[name].default == defaults[name]
    assert VerifySettings.model_fields["over"].default == [defaults["over"]]


def test_the_commands_completion_knows_all_names() -> None:
    assert set(METHODS) == set(menu.METHODS)
    assert set(SOLVERS) == set(menu.SOLVERS)
