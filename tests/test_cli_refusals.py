"""The command line on bad input: every message, its exit code, and that nothing was touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import Result

from backdrift.cli.errors import BAD_INPUT, FAILED, INTERRUPTED, explain
from backdrift.errors import BudgetError, InputError, NonFiniteError
from command_line import STEPS, call, refused

pytestmark = pytest.mark.usefixtures("own_folder")


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


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("prompt: caf\xe9\n".encode("latin-1"))
    refused(call("optimize", "--config", "latin.yaml"), "'latin.yaml' cannot be read", "no UTF-8 text")
    refused(call("invert", "--pairs", "latin.yaml"), "'latin.yaml' cannot be read", "no UTF-8 text")


def test_a_folder_that_cannot_be_written_costs_no_time(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("backdrift.cli.generate.open_pipeline", lambda settings: pytest.fail("loaded it"))
    refused(call("generate", "a", "--out", "file"), "--out 'file' is a file")
    refused(call("generate", "a", "--out", "file/new"), "lies in 'file', which is a file")
    refused(call("generate", "a", "--out", "x" * 300), "too long")
    refused(call("generate", "a", "--out", "."), "is not empty", "--overwrite")
    refused(call("doctor", "sd", "--json", "."), "--json '.' is a folder")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "locked" and allowed(path, mode))
    refused(call("generate", "a", "--out", "locked/run"), "'locked' may not be written to")
    refused(call("doctor", "sd", "--json", "nowhere/a.json"), "'nowhere', which is no folder")
    refused(call("doctor", "sd", "--json", "locked/a.json"), "'locked' may not be written to")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite(model: str, value: str) -> None:
    for flag in ("--lr", "--noise-prior", "--enough", "--guidance-scale"):
        refused(optimize(model, flag, value), flag, "must be a finite number")


def test_a_seed_out_of_range(model: str) -> None:
    refused(optimize(model, "--seed", "-1"), "--seed is -1", "at least 0")
    refused(optimize(model, "--seed", str(2**63)), "--seed", "less than 9223372036854775808")


def test_a_name_beside_the_built_in_ones() -> None:
    refused(call("generate", "a b", "--model", "flwo"), "'flwo'", "Did you mean 'flow'?")
    refused(call("demo", "--upright", "sevn", "--out", "demo"), "Did you mean 'seven'?")
    assert not Path("demo").exists()


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
    refused(
        optimize(model, "--loss", "mine.py:nan"), "Iteration 0", "NaN or infinity in the loss", code=FAILED
    )


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
    refused(optimize(model, "--dtype", "float23"), "--dtype", "one of float32", "Did you mean 'float32'?")
    refused(call("invert", "--slots", "outputs"), "one of output, tokens. Did you mean 'output'?")


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
        ("steps: many", ("field 'steps'", "'many'", "a whole number", "run.yaml")),
        ("steps: -1", ("field 'steps'", "-1", "must be at least 0")),
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


def test_colours_unless_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from backdrift.cli import app

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in CliRunner().invoke(app, ["invert"], color=True).stderr
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in CliRunner().invoke(app, ["invert"], color=True).stderr


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDRIFT_TRACEBACK", "1")
    assert "Traceback" in call("invert").stderr
