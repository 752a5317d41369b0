"""The command line on a tiny pipeline saved to a folder: what each command does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import tiny_pipelines
from backdrift import __version__
from backdrift.cli import app
from command_line import STEPS, call, refused
from tiny_pipelines import PICTURE, tiny_sd

pytestmark = pytest.mark.usefixtures("own_folder")


# ---- what the commands do ----------------------------------------------------------------------------


def test_version_and_help_need_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys\n"
        "from backdrift.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for args in (["--version"], ["--help"], ["optimize", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-m", "backdrift", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"backdrift {__version__}"


@pytest.mark.parametrize("name", ["generate", "optimize", "invert", "info", "demo"])
def test_help_names_every_setting_with_its_default(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert "--config" in result.output
    assert "(default: 0)" in result.output  # of --seed: no default is eaten by the help's own markup


def test_every_argument_of_the_library_is_a_setting() -> None:
    import inspect

    import backdrift
    from backdrift.cli.invert import InvertSettings
    from backdrift.cli.optimize import OptimizeSettings

    only_python = {"pipe", "callback", "noise", "optimizer_kwargs", "pipeline_kwargs"}
    wanted = set(inspect.signature(backdrift.optimize).parameters) - only_python
    assert wanted <= set(OptimizeSettings.model_fields)
    wanted = set(inspect.signature(backdrift.invert).parameters) - only_python - {"loss", "heldout_pairs"}
    assert wanted <= set(InvertSettings.model_fields)


def test_no_command_shows_the_help() -> None:
    assert "optimize" in call().output


def test_shell_completion_knows_options_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "_BACKDRIFT_COMPLETE": "complete_zsh"}

    def complete(line: str) -> str:
        environment["_TYPER_COMPLETE_ARGS"] = line
        code = "from backdrift.cli import main; main([])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        return done.stdout

    assert "generate" in complete("backdrift ")
    assert "bfloat16" in complete("backdrift optimize --dtype bf")
    assert "brightness" in complete("backdrift optimize --loss bri")


def test_generate_is_the_pipelines_own_picture_and_repeats(model: str, tmp_path: Path) -> None:
    args = ("generate", "a b", "--model", model, "--num-inference-steps", "2", "--seed", "3")
    assert call(*args, "--out", "one").exit_code == 0
    assert call(*args, "--out", "two").exit_code == 0
    (first,), (second,) = (list((tmp_path / n).glob("*.png")) for n in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    pipe = tiny_sd()
    draw = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn((4, 8, 8), generator=draw)])
    expected = pipe("a b", latents=noise, num_inference_steps=2, height=PICTURE, width=PICTURE).images[0]
    assert Image.open(first).tobytes() == expected.tobytes()
    # the settings that were left there make it again
    assert call("generate", "--config", "one/run.yaml", "--out", "three").exit_code == 0
    assert next((tmp_path / "three").glob("*.png")).read_bytes() == first.read_bytes()


def test_built_in_pipelines_are_guided_as_their_cards_say(tmp_path: Path) -> None:
    for out, more in (
        ("own", ()),
        ("three", ("--guidance-scale", "3")),
        ("more", ("--guidance-scale", "7.5")),
    ):
        made = call("generate", "a red two", "--num-inference-steps", "2", "--out", out, *more)
        assert made.exit_code == 0, made.output
    own, three, more = (next((tmp_path / n).glob("*.png")).read_bytes() for n in ("own", "three", "more"))
    assert own == three
    assert own != more


def test_optimize_writes_what_the_library_would(model: str, tmp_path: Path) -> None:
    result = call(
        "optimize", "a b", "--loss", "brightness:0.9", "--model", model, *STEPS, "--out", "run", "--lr", "0.3"
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["settings"]["loss"] == "brightness:0.9"
    assert record["iterations"][-1]["loss"] < record["iterations"][0]["loss"]
    assert (tmp_path / "run" / "report.html").is_file()
    assert "report" in result.output
    import backdrift as bd

    again = bd.optimize(
        tiny_sd(),
        "a b",
        "brightness:0.9",
        num_inference_steps=2,
        steps=2,
        lr=0.3,
        out=tmp_path / "library",
        progress=False,
    )
    assert [e["loss"] for e in again.record["iterations"]] == [e["loss"] for e in record["iterations"]]
    # and the settings file in the folder means the same run
    assert call("optimize", "--config", "run/run.yaml", "--out", "again").exit_code == 0
    repeated = json.loads((tmp_path / "again" / "record.json").read_text())
    assert repeated["fingerprint"] == record["fingerprint"]
    assert "backdrift optimize --config run.yaml" in (tmp_path / "run" / "report.html").read_text()


def test_progress_shows_loss_and_remaining_time(model: str) -> None:
    import rich

    rich.reconfigure(force_terminal=True)
    try:
        result = call("optimize", "a b", "--loss", "brightness", "--model", model, *STEPS[:4], "--out", "run")
    finally:
        rich.reconfigure()
    assert result.exit_code == 0, result.output
    for word in ("loss 0.", "2/2", "left"):
        assert word in result.output


def test_progress_in_a_file_is_a_few_whole_lines(model: str) -> None:
    steps = ("--num-inference-steps", "1", "--steps", "30")
    result = call("optimize", "a b", "--loss", "brightness", "--model", model, *steps, "--out", "run")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if " of 30, after " in line]
    assert [line.split(", ")[1] for line in lines] == [
        f"{done} of 30" for done in (1, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30)
    ]
    assert all(line.startswith("loss 0.") for line in lines)
    assert not set(result.output) & set("\r\x1b━")


def test_examples_in_the_help_are_commands_with_their_flags() -> None:
    """Of every command at least one; each begins with the command's own name."""
    import shlex

    import typer

    def leaves(command: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
        if not hasattr(command, "commands"):
            return [(path, command)]
        return [leaf for name, inner in command.commands.items() for leaf in leaves(inner, (*path, name))]

    for path, command in leaves(typer.main.get_command(app), ("backdrift",)):
        title, *examples = (command.epilog or "").split("\n\n")
        assert title.startswith("Example")
        assert examples
        known = {
            option for parameter in command.params for option in parameter.opts + parameter.secondary_opts
        }
        for example in examples:
            words = shlex.split(example)
            assert tuple(words[: len(path)]) == path
            assert {word for word in words if word.startswith("--")} <= known
            assert example in call(*path[1:], "--help").output


def test_invert_from_files_and_from_an_effect(model: str, tmp_path: Path) -> None:
    for name, grey in (("a", 90), ("b", 160)):
        Image.new("RGB", (PICTURE, PICTURE), (grey,) * 3).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.yaml").write_text(
        yaml.safe_dump([{"source": "a.png", "target": "b.png", "prompt": "a b"}])
    )
    small = ("--num-inference-steps", "2", "--steps", "1", "--no-progress", "--model", model)
    result = call("invert", "--pairs", "pairs.yaml", "--out", "files", "--encode-iterations", "1", *small)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "files" / "embedding.safetensors").is_file()
    result = call("invert", "a b", "--effect", "c", "--out", "effect", *small)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "effect" / "record.json").read_text())
    assert record["kind"] == "invert"
    # the embedding changes the picture that the prompt gives
    plain = ("generate", "a b", "--num-inference-steps", "2", "--model", model)
    assert call(*plain, "--out", "plain").exit_code == 0
    assert call(*plain, "--out", "with", "--embedding", "effect/embedding.safetensors").exit_code == 0
    pictures = [next((tmp_path / n).glob("*.png")).read_bytes() for n in ("plain", "with")]
    assert pictures[0] != pictures[1]


def test_info(model: str) -> None:
    result = call("info")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "cpu" in result.output
    assert "brightness" in result.output
    result = call("info", "--model", model)
    assert result.exit_code == 0, result.output
    count = sum(p.numel() for p in tiny_sd().unet.parameters())
    for word in (
        "UNet2DConditionModel",
        f"{count:,}".replace(",", "\u202f"),
        "DDIMScheduler",
        "epsilon",
        "4x8x8",
    ):
        assert word in result.output


def test_flags_win_over_the_file_and_the_file_over_the_defaults(model: str, tmp_path: Path) -> None:
    settings = {"prompt": "a b", "model": model, "seed": 5, "num-inference-steps": 1, "out": "from-file"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert call("generate", "--config", "run.yaml", "--seed", "6").exit_code == 0
    kept = yaml.safe_load((tmp_path / "from-file" / "run.yaml").read_text())
    assert kept["seed"] == 6
    assert kept["num_inference_steps"] == 1
    assert kept["batch_size"] == 1


# ---- bad input: the message, the exit code, and that nothing was touched -----------------------------


def test_demo_does_its_three_jobs_on_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backdrift.pipelines import assets
    from tiny_heads import tiny_heads

    monkeypatch.setattr(tiny_pipelines, "TOKENS", 48)  # its prompts are sentences
    tiny_sd().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(assets, "load_classifier", tiny_heads)
    args = (
        "demo",
        "--model",
        "model",
        "--num-inference-steps",
        "2",
        "--steps",
        "2",
        "--no-progress",
        "--out",
        "demo",
    )
    result = call(*args)
    assert result.exit_code == 0, result.output
    assert "same bits as plain autograd: yes" in result.output
    assert "one-step guidance" in result.output
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<article") == 3
    assert "demo/report.html" in result.output
    kinds = [
        json.loads((tmp_path / "demo" / n / "record.json").read_text())["kind"]
        for n in ("gradient", "ambigram", "embedding")
    ]
    assert kinds == ["check", "ambigram", "invert"]


def test_ambigram_counts_both_ways_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backdrift.pipelines import assets
    from tiny_heads import tiny_heads

    monkeypatch.setattr(tiny_pipelines, "TOKENS", 48)  # its default prompt is a sentence
    tiny_sd().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(assets, "load_classifier", tiny_heads)
    args = (
        "ambigram",
        "two",
        "seven",
        "--model",
        "model",
        "--seeds",
        "2",
        "--seed",
        "5",
        *STEPS,
        "--out",
        "a",
    )
    result = call(*args)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    assert record["settings"]["seeds"] == [5, 6]
    assert record["prompt"] == ["a red two on white"] * 2
    for who in ("through the whole run", "one-step guidance"):
        name = f"{who}: read both ways by the loss's classifier"
        assert f"{name}: {record['figures'][name]}" in result.output
    refused(call("ambigram", "two", "eleventy", "--model", "model"), "eleventy")


def test_optimize_tells_whether_it_reads_as_wanted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backdrift import Run
    from backdrift.losses import Ambigram
    from backdrift.pipelines import assets
    from tiny_heads import tiny_heads

    monkeypatch.setattr(assets, "load_classifier", tiny_heads)
    options = ("--model", model, "--loss", "ambigram:two/seven", "--batch-size", "3", *STEPS, "--out", "a")
    assert call("optimize", "a 2", *options).exit_code == 0
    run = Run.load(tmp_path / "a")
    right = Ambigram("two", "seven").reads(run.best.images.clamp(0, 1)).all(1)
    assert run.record["figures"]["read as wanted by the loss's own network"] == f"{right.sum()} of 3"
