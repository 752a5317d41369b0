"""``backdrift stylize``: that it is the library's call, and what it refuses before any work."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

import backdrift
from backdrift.cli.stylize import StylizeSettings
from backdrift.pictures import to_pil
from command_line import STEPS, call, refused
from tiny_pipelines import PICTURE, tiny_sd

pytestmark = pytest.mark.usefixtures("own_folder")
REFERENCE = torch.rand(3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def picture(own_folder: None) -> None:
    to_pil(REFERENCE).save("style.png")


def test_it_writes_what_the_library_would(model: str, tmp_path: Path) -> None:
    args = (
        "--network",
        "built-in:classifier",
        "--noises",
        "1",
        "--shown",
        "2",
        "--style-layers",
        "1,2",
        "--lr",
        "0.01",
    )
    result = call("stylize", "style.png", "a", "b", "--model", model, *STEPS, *args, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "style, unseen noises: after" in result.output
    assert "unet weights:" in result.output
    record = json.loads(Path("run/record.json").read_text())
    ours = backdrift.stylize(
        tiny_sd(), "style.png", ["a", "b"], noises=1, shown=2, network="built-in:classifier", style_layers=["1", "2"],
        lr=0.01, num_inference_steps=2, steps=2, out="mine", progress=False,
    )  # fmt: skip
    assert record["figures"] == ours.record["figures"]
    assert record["fingerprint"] == ours.record["fingerprint"]
    again = call("stylize", "--config", "run/run.yaml", "--out", "again", "--no-progress")
    assert again.exit_code == 0, again.output
    assert json.loads(Path("again/record.json").read_text())["figures"] == record["figures"]


def test_every_argument_of_the_library_is_a_setting() -> None:
    only_python = {"pipe", "prompts", "callback", "optimizer_kwargs", "pipeline_kwargs"}
    wanted = set(inspect.signature(backdrift.stylize).parameters) - only_python
    assert wanted <= set(StylizeSettings.model_fields)


def test_the_help_names_every_setting() -> None:
    result = call("stylize", "--help")
    assert result.exit_code == 0
    for name in StylizeSettings.model_fields:
        if name not in ("reference", "prompt"):
            assert "--" + name.replace("_", "-") in result.output
    assert "backdrift stylize skimage/ihc" in result.output


def test_what_cannot_be_used_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backdrift.cli.stylize.open_pipeline", lambda settings: pytest.fail("loaded it"))
    refused(call("stylize"), "REFERENCE is missing")
    refused(call("stylize", "nowhere.png"), "'nowhere.png' does not exist")
    refused(call("stylize", "skimage/ihk"), "no photograph 'ihk'", "Did you mean 'ihc'?")
    refused(call("stylize", "style.png", "--over", "noise"), "'noise' belongs to one picture")
    refused(call("stylize", "style.png", "--rank", "4"), "needs over='lora'")
    refused(call("stylize", "style.png", "--through", "first:3"), "first:3")
    refused(call("stylize", "style.png", "--noises", "0"), "--noises is 0", "at least 1")
    refused(call("stylize", "style.png", "--style-weight", "0"), "--style-weight", "greater than 0")
    refused(call("stylize", "style.png", "--style-layers", "1,,2"), "names or numbers with commas")
    refused(call("stylize", "style.png", "--out", "style.png"), "'style.png' is a file")


def test_what_the_model_does_not_have_is_refused(model: str) -> None:
    refused(
        call("stylize", "style.png", "a", "--model", model, "--over", "unet.nothing", *STEPS),
        "matches no weight",
    )
    refused(call("stylize", "style.png", "abcdefghijkl", "--model", model, *STEPS), "abcdefghijkl", "8")
    refused(call("stylize", "style.png", "a", "--model", model, "--network", "vgg18", *STEPS), "vgg18")
