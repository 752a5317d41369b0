"""``backdrift guide``: what the four commands write, and every message for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from backdrift.cli import app
from backdrift.cli.errors import BAD_INPUT
from backdrift.cli.guide import read_repeats, write_repeats
from backdrift.errors import InputError
from backdrift.run import Run

QUICK = ("--steps", "4", "--n", "2", "--samples", "1", "--start", "0.2", "--repeats", "1", "--one-step", "calls",
         "--no-progress")  # fmt: skip
TASKS = {
    "style": ("a red seven on white", "--reference", "ref.png"),
    "aesthetic": ("a red seven on white",),
    "object": ("a two on white", "--reference", "made:a blue two on grass"),
    "class": ("a red digit on white", "--label", "seven"),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    Image.radial_gradient("L").convert("RGB").resize((96, 64)).save("ref.png")


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["guide", *args])


def refused(result: Result, *words: str) -> None:
    """One message on stderr with these words, no traceback, the exit code; and nothing was written."""
    assert result.exit_code == BAD_INPUT, result.output
    assert result.stderr.count("Error") == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr, result.stderr
    assert not Path("run").exists()


# ---- what the commands do ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", ["sd", "flow"])
def test_each_command_on_both_built_in_pipelines(task: str, model: str, tmp_path: Path) -> None:
    result = call(task, *TASKS[task], "--model", model, *QUICK, "--out", "run")
    assert result.exit_code == 0, result.output
    record = json.loads(Path("run/record.json").read_text())
    assert record["kind"] == f"guide-{task}"
    assert record["status"] == "finished"
    assert record["settings"]["num_inference_steps"] == 4
    assert record["settings"]["guidance_scale"] == 3.0
    assert record["prompt"] == [TASKS[task][0]]
    assert set(record["variants"]) == {"unguided", "one-step", "n-step"}
    for name in record["variants"]:
        assert Path("run/pictures", f"{name}.png").is_file()
    page = Path("run/report.html").read_text()
    assert f"backdrift guide {task} --config run.yaml" in page
    assert "one-step (n = 1)" in result.output
    assert "report: " in result.output


def test_the_settings_that_are_left_make_the_same_pictures() -> None:
    args = ("style", *TASKS["style"], *QUICK, "--seed", "5")
    assert call(*args, "--out", "run").exit_code == 0
    left = yaml.safe_load(Path("run/run.yaml").read_text())
    assert left["strength"] > 0  # complete: what was left to the recipe is written out
    assert left["n"] == 2
    assert left["repeats"] == 1
    assert call("style", "--config", "run/run.yaml", "--out", "again").exit_code == 0
    one, two = (Run.load(folder) for folder in ("run", "again"))
    assert one.record["fingerprint"] == two.record["fingerprint"]
    assert torch.equal(one.tensors("n-step")["images"], two.tensors("n-step")["images"])
    # and a run of other settings is refused
    result = call("style", "--config", "run/run.yaml", "--strength", "0.5", "--out", "run")
    assert result.exit_code == BAD_INPUT
    assert "other settings" in result.stderr


@pytest.mark.parametrize("task", TASKS)
def test_help_names_every_setting(task: str) -> None:
    result = call(task, "--help")
    assert result.exit_code == 0
    flags = "model steps n start stop strength repeats scheduler guidance-scale samples seed memory device dtype out"
    for flag in (f"--{name} " for name in [*flags.split(), "config"]):
        assert flag in result.output, flag
    assert "style" in call("--help").output


def test_every_setting_of_the_library_is_one_of_the_commands() -> None:
    from backdrift.cli.guide import GuideSettings
    from backdrift.recipes import Guiding, Sampling

    assert set(Guiding.__dataclass_fields__) <= set(GuideSettings.model_fields)
    assert set(Sampling.__dataclass_fields__) - {"callback"} <= set(GuideSettings.model_fields)


def test_strength_follows_the_steps_on_built_in_models_unless_given() -> None:
    from backdrift.recipes.guided_style import PAPER, built_in

    assert PAPER.strength == 0.2
    assert built_in("sd", num_inference_steps=25, n=2).strength == pytest.approx(4 * built_in("sd").strength)
    assert built_in("flow", num_inference_steps=25, strength=0.1).strength == 0.1


def test_repeats_as_text() -> None:
    assert read_repeats(2) == 2
    assert read_repeats("0.3:1,0.4:2") == ((0.3, 1), (0.4, 2))
    assert write_repeats(((0.3, 1), (0.4, 2))) == "0.3:1,0.4:2"
    assert write_repeats(3) == 3
    for wrong in ("many", "0.3:x", "0.3"):
        with pytest.raises(InputError, match=r"0\.3:1,0\.4:2"):
            read_repeats(wrong)


# ---- bad input ---------------------------------------------------------------------------------------


def bad(task: str, *args: str) -> Result:
    return call(task, *TASKS[task], *QUICK, "--out", "run", *args)


def test_a_reference_that_is_missing_or_no_picture() -> None:
    refused(bad("style", "--reference", "nowhere.png"), "'nowhere.png' does not exist")
    refused(bad("object", "--reference", "nowhere.png"), "'nowhere.png' does not exist")
    refused(bad("style", "--reference", "skimage/cofee"), "cofee")
    refused(bad("object", "--reference", "made:"), "needs a prompt")
    Path("text.png").write_text("no picture")
    refused(bad("style", "--reference", "text.png"), "cannot be read as a picture")
    refused(call("style", "a red seven", *QUICK), "--reference is missing")


def test_a_label_that_the_classifier_does_not_know() -> None:
    refused(bad("class", "--label", "sevn"), "sevn", "Did you mean 'seven'?")
    refused(call("class", "a red digit", *QUICK), "--label is missing")
    refused(bad("class", "--classifier", "no/such-model"), "no/such-model")


def test_a_loss_beside_the_subjects_that_is_unknown() -> None:
    refused(
        call("object", *TASKS["object"], "--also", "0.1*clas:two", "--out", "run"), "Did you mean 'class'?"
    )


def test_guided_steps_and_estimates_that_do_not_fit() -> None:
    refused(bad("style", "--start", "0.8", "--stop", "0.5"), "start < stop")
    refused(bad("style", "--stop", "1.5"), "start < stop")
    refused(bad("style", "--start", "0.3", "--stop", "0.4"), "no step of 4")
    refused(bad("style", "--n", "3"), "n=3 is more than the 2")
    refused(bad("style", "--n", "0"), "n=0")
    refused(bad("style", "--n", "some"), "n='some'", "adaptive")
    refused(bad("style", "--repeats", "0"), "repeats=0")
    refused(bad("style", "--repeats", "often"), "--repeats 'often'")
    refused(bad("style", "--strength", "-1"), "strength=-1.0")
    refused(bad("style", "--one-step", "minutes"), "'seconds', 'calls'")
    refused(bad("style", "--subgrid", "even"), "--subgrid", "even")
    refused(bad("style", "--samples", "0"), "--samples")


def test_a_model_a_scheduler_or_a_size_that_cannot_be_used() -> None:
    refused(bad("style", "--scheduler", "eular"), "Did you mean 'euler'?")
    refused(bad("style", "--scheduler", "flow"), "flow matching")
    refused(bad("style", "--model", "no/such-model", "--clip", "no/such-clip"), "no/such-model")
    refused(bad("style", "--clip", "no/such-clip"), "no/such-clip")
    refused(bad("style", "--height", "17"), "height=17")
    refused(bad("style", "--device", "cuda:99"), "cuda:99")
    refused(bad("style", "--memory", "plenty"), "plenty")
    refused(bad("aesthetic", "--loss", "preferense"), "Did you mean 'preference'?")


def test_a_settings_file_with_an_unknown_field() -> None:
    Path("run.yaml").write_text("strenght: 0.2\n")
    refused(bad("style", "--config", "run.yaml"), "strenght", "Did you mean 'strength'?")
