"""``backdrift expand``: a run, the user's own classifier, and what is refused before a pipeline is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import STEPS, call, refused
from tiny_pipelines import tiny_sd


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_sd().save_pretrained(folder)
    return str(folder)


OWN = """
def half(images):
    middle = images.shape[-2] // 2
    difference = images[..., :middle, :].mean((1, 2, 3)) - images[..., middle:, :].mean((1, 2, 3))
    return 20 * torch.stack([difference, -difference], 1)

import torch
"""


def test_a_word_is_learnt_with_the_user_s_own_classifier(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    result = call(
        "expand", "a <kind>", "--target", "bright below", "--classifier", "own.py:half", "--labels", "bright above",
        "--labels", "bright below", "--over", "word", "--init", "b", "--unseen", "1", "--cutouts", "1",
        "--model", model, "--out", "run", "--height", "16", "--width", "16", *STEPS,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["kind"] == "expand"
    assert record["settings"]["guidance_scale"] == 7.5
    assert "unseen noise, with the word: seen by the loss's own classifier: " in result.output
    assert (tmp_path / "run" / "learned_embeds.safetensors").is_file()
    assert "the same noise, with the word" in (tmp_path / "run" / "report.html").read_text()
    again = call("expand", "--config", "run/run.yaml", "--out", "run")
    assert again.exit_code == 0, again.output


def test_what_cannot_be_used_is_refused_before_a_pipeline_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("expand", "a seven", "--model", "nowhere")
    refused(call(*given), "target")
    refused(
        call(*given, "--target", "crossed sevn"),
        "knows no class 'crossed sevn'",
        "Did you mean 'crossed seven'",
    )
    refused(call(*given, "--target", "0", "--over", "words"), "one of noise, word")
    refused(call(*given, "--target", "0", "--judge", "brightness"), "must be a loss of a class")
    refused(call(*given, "--target", "0", "--size", "8"), "size=", "brings its own preparation")
    (tmp_path / "own.py").write_text(OWN)
    refused(
        call(*given, "--target", "0", "--classifier", "own.py:half", "--mean", "0.5,0.5"),
        "--mean takes three",
    )
    refused(call(*given, "--target", "0", "--classifier", "own.py:whole"), "no callable 'whole'")
