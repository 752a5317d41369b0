"""``backdrift doctor``: its table, its file, its exit codes; and that it never downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from backdrift.cli import app
from backdrift.cli.errors import BAD_INPUT, FAILED
from tiny_pipelines import tiny_sd


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *args, "--device", "cpu"])


def test_a_sound_model(model: str, tmp_path: Path) -> None:
    file = tmp_path / "checkup.json"
    result = call(model, "--json", str(file), "--directions", "1", "--seed", "5", "--prompt", "a b")
    assert result.exit_code == 0, result.output
    for word in (
        "StableDiffusionPipeline",
        "DDIMScheduler",
        "by the noise",
        "the same bits",
        "ready for gradients",
    ):
        assert word in result.output
    written = json.loads(file.read_text())
    assert written["ok"] is True
    rows = {row["title"]: row for row in written["rows"]}
    assert rows["beside plain autograd"]["figures"]["relative difference"] == 0.0
    import backdrift as bd

    own = bd.doctor(tiny_sd(), directions=1, seed=5, prompt="a b")
    assert rows["by the noise"] == own["by the noise"].to_dict()


def test_what_is_refused_exits_as_bad_input(model: str, tmp_path: Path) -> None:
    file = tmp_path / "checkup.json"
    result = call(model, "--train", "lora", "--json", str(file))
    assert result.exit_code == BAD_INPUT
    assert "no active LoRA adapter" in result.output
    assert json.loads(file.read_text())["ok"] is False
    assert call(model, "--train", "nothing").exit_code == BAD_INPUT
    assert "no/such-model" in call("no/such-model").stderr
    assert call(model, "--size", "-8").exit_code == BAD_INPUT


def test_a_wrong_gradient_exits_as_a_failure(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / 2

    from diffusers.models.autoencoders.vae import Decoder

    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, *args: Halved.apply(forward(self, *args)))
    result = call(model)
    assert result.exit_code == FAILED, result.output
    assert "do not trust these gradients" in result.output
    assert "vae.decoder" in result.output


def test_it_never_downloads(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def from_pretrained(name: str, **kwargs: Any) -> Any:
        asked.append(kwargs)
        raise OSError("not here")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    assert call("some/model").exit_code == BAD_INPUT
    assert [kwargs["local_files_only"] for kwargs in asked] == [True]
