"""The command line on bad input: every message, its exit code, and that nothing was touched."""

from __future__ import annotations

import json
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
