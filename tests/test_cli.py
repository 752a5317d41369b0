"""The command line on a tiny pipeline saved to a folder: what each command does, and every message for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

import tiny_pipelines
from backdrift import __version__
from backdrift.cli import app
from backdrift.cli.errors import BAD_INPUT, FAILED, INTERRUPTED, explain
from backdrift.errors import BudgetError, InputError, NonFiniteError
from tiny_pipelines import PICTURE, tiny_sd

STEPS = ("--num-inference-steps", "2", "--steps", "2", "--no-progress")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def refused(result: Result, *words: str, code: int = BAD_INPUT) -> None:
    """One message on stderr with these words, no traceback, the exit code."""
    assert result.exit_code == code, result.output
    assert result.stderr.count("Error") == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr, result.stderr


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


def optimize(model: str, *args: str) -> Result:
    given = {
        "--loss": "brightness",
        "--out": "run",
        "--model": model,
        **dict(zip(args[::2], args[1::2], strict=True)),
    }
    return call("optimize", "a b", *STEPS, *(word for pair in given.items() for word in pair))


def test_an_unknown_model(tmp_path: Path) -> None:
    refused(call("generate", "a b", "--model", "no/such-model"), "no/such-model", "'sd', 'flow'")
    (tmp_path / "weights.ckpt").touch()
    refused(call("generate", "a b", "--model", "weights.ckpt"), "pickle")
    refused(call("info", "--model", "missing.safetensors"), "missing.safetensors")


def test_a_wrong_size(model: str) -> None:
    refused(optimize(model, "--height", "17"), "height=17", "multiple of 8")
    refused(call("generate", "a b", "--model", model, "--width", "12"), "width=12", "multiple of 8")
    refused(call("generate", "a b", "--model", model, "--width", "0"), "--width", "greater than 0")


def test_a_missing_file(model: str, tmp_path: Path) -> None:
    refused(optimize(model, "--loss", "mse:nowhere.png"), "'nowhere.png' does not exist")
    refused(optimize(model, "--loss", "nowhere.py:f"), "'nowhere.py' does not exist")
    refused(call("invert", "--pairs", "nowhere.yaml"), "'nowhere.yaml' cannot be read")
    refused(call("optimize", "--config", "nowhere.yaml"), "'nowhere.yaml' does not exist")
    (tmp_path / "pairs.yaml").write_text("- {source: a.png, target: b.png, prompt: a}\n")
    refused(call("invert", "--pairs", "pairs.yaml"), "Entry 1", "'a.png' does not exist")
    assert not (tmp_path / "run").exists()


def test_a_target_of_other_proportions(model: str) -> None:
    Image.new("RGB", (32, 16)).save("wide.png")
    refused(optimize(model, "--loss", "mse:wide.png"), "32x16 pixels", "16x16")


def test_a_budget_that_is_too_small_or_no_budget(model: str) -> None:
    refused(optimize(model, "--memory", "1KiB"), "budget")
    refused(optimize(model, "--memory", "plenty"), "plenty")


def test_a_prompt_over_the_token_limit(model: str) -> None:
    long = "abcdefghijkl"
    refused(call("generate", long, "--model", model), long, "8")
    refused(call("optimize", long, "--loss", "brightness", "--model", model, *STEPS), long, "8")


def test_a_loss_that_is_not_finite_fails(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def nan(images):\n    return (images - images).flatten(1).sum(1).log() * 0\n"
    )
    refused(optimize(model, "--loss", "mine.py:nan"), "Iteration 0", "loss is NaN", code=FAILED)


def test_a_loss_that_does_not_depend_on_the_picture(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def constant(images):\n    return torch.ones(len(images))\n"
        "def flat(images):\n    return 0 * images.flatten(1).sum(1)\n"
        "def mean(images):\n    return images\n"
    )
    refused(optimize(model, "--loss", "mine.py:constant"), "does not depend on the pictures")
    # the same folder: what failed before it had measured anything does not stand in the way
    refused(optimize(model, "--loss", "mine.py:flat"), "zero")
    refused(optimize(model, "--loss", "mine.py:mean"), "one value per sample")
    assert optimize(model).exit_code == 0


def test_an_unknown_loss_over_or_device(model: str) -> None:
    refused(optimize(model, "--loss", "brightnes"), "Did you mean 'brightness'?", "saturation")
    refused(optimize(model, "--over", "nois"), "nois")
    refused(optimize(model, "--optimizer", "adamv"), "adamv")
    refused(optimize(model, "--device", "cuda:99"), "cuda:99", "cpu")
    refused(optimize(model, "--dtype", "float23"), "--dtype", "float23", "bfloat16")


def test_a_missing_prompt_or_loss_is_named(model: str) -> None:
    refused(call("generate", "--model", model), "PROMPT is missing")
    refused(call("optimize", "a b", "--model", model), "--loss is missing")
    refused(call("invert", "--model", model), "--pairs FILE, or --effect WORDS")
    refused(call("invert", "--effect", "dark", "--model", model), "at least one prompt")


def test_a_wrong_flag_is_a_usage_error() -> None:
    result = call("generate", "--colour", "red")
    assert result.exit_code == BAD_INPUT
    assert "--colour" in result.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step: 3", ("unknown field 'step'", "Did you mean 'steps'?", "run.yaml")),
        ("steps: many", ("field 'steps'", "'many'", "valid integer", "run.yaml")),
        ("steps: -1", ("field 'steps'", "-1", "greater than or equal to 0")),
        ("[1, 2]", ("must hold `name: value` lines", "list")),
        ("a: b: c", ("not YAML at line 1",)),
    ],
)
def test_a_settings_file_that_is_wrong(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    refused(call("optimize", "a b", "--loss", "brightness", "--config", "run.yaml"), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt: a", ("must hold a list",)),
        ("- {source: a.png}", ("Entry 1", "source, target and prompt")),
        ("- {a: [}", ("not YAML",)),
    ],
)
def test_a_pairs_file_that_is_wrong(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "pairs.yaml").write_text(text)
    refused(call("invert", "--pairs", "pairs.yaml"), *words)


def test_earlier_results_are_left_as_they_are(model: str, tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    assert optimize(model).exit_code == 0
    before = contents(tmp_path / "run")
    for wrong in (["--height", "17"], ["--loss", "contrast"], ["--loss", "nothing"], ["--seed", "9"]):
        assert optimize(model, *wrong).exit_code == BAD_INPUT
        assert contents(tmp_path / "run") == before
    assert (
        call("generate", "a b", "--model", model, "--num-inference-steps", "1", "--out", "pictures").exit_code
        == 0
    )
    kept = contents(tmp_path / "pictures")
    again = call("generate", "a", "--model", model, "--num-inference-steps", "1", "--out", "pictures")
    refused(again, "is not empty", "--overwrite")
    refused(call("generate", "a", "--model", model, "--out", "run/record.json"), "is a file")
    assert contents(tmp_path / "pictures") == kept


def test_interrupting_exits_with_130_and_the_run_goes_on(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "calls = 0\n"
        "def dark(images):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 2 and not __import__('pathlib').Path('go').exists():\n"
        "        raise KeyboardInterrupt\n"
        "    return images.flatten(1).mean(1)\n"
    )
    args = ("optimize", "a b", "--model", model, "--loss", "mine.py:dark", *STEPS, "--out", "run")
    result = call(*args)
    assert result.exit_code == INTERRUPTED
    assert "Interrupted" in result.stderr
    assert "Traceback" not in result.output
    (tmp_path / "go").touch()
    assert call(*args).exit_code == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert [e["iteration"] for e in record["iterations"]] == [0, 1, 2]


def test_what_each_error_ends_with() -> None:
    assert explain(InputError("x")) == ("x", BAD_INPUT)
    assert explain(BudgetError("x")) == ("x", BAD_INPUT)
    assert explain(NonFiniteError("x")) == ("x", FAILED)
    assert explain(torch.OutOfMemoryError("CUDA out of memory"))[1] == FAILED
    assert "--memory min" in explain(MemoryError())[0]
    assert explain(OSError(28, "No space left on device"))[1] == FAILED
    message, code = explain(ZeroDivisionError("division by zero\nmore"))
    assert code == FAILED
    assert "ZeroDivisionError: division by zero" in message
    assert "BACKDRIFT_TRACEBACK=1" in message


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDRIFT_TRACEBACK", "1")
    assert "Traceback" in call("invert").stderr


def test_demo_does_its_three_jobs_on_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backdrift.pipelines import assets
    from test_losses import tiny_heads

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
    from test_losses import tiny_heads

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
    from test_losses import tiny_heads

    monkeypatch.setattr(assets, "load_classifier", tiny_heads)
    options = ("--model", model, "--loss", "ambigram:two/seven", "--batch-size", "3", *STEPS, "--out", "a")
    assert call("optimize", "a 2", *options).exit_code == 0
    run = Run.load(tmp_path / "a")
    right = Ambigram("two", "seven").reads(run.best.images.clamp(0, 1)).all(1)
    assert run.record["figures"]["read as wanted by the loss's own network"] == f"{right.sum()} of 3"
