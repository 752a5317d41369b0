"""What a pipeline's own safety checker flags is written down, and blurred or shown, whichever verb made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from backdrift import invert, optimize, report
from backdrift.cli import app
from backdrift.errors import InputError
from backdrift.recipes import Pair, ambigram, effect_pairs
from backdrift.run import Run
from html_page import Page
from tiny_pipelines import PICTURE, noise_for, tiny_sd
from top_or_bottom import reader

SMALL: dict[str, Any] = {"num_inference_steps": 1, "steps": 1, "progress": False}


def checked(*flags: list[bool]) -> Any:
    """A pipeline whose checker says ``flags`` call by call (the last for good), and blackens as diffusers' does."""
    said, pipe = list(flags), tiny_sd(safety_checker=True)

    def forward(images: Tensor, clip_input: Tensor) -> tuple[Tensor, list[bool]]:
        found = (said.pop(0) if len(said) > 1 else said[0])[: len(images)]
        for image, flagged in zip(images, found, strict=True):
            if flagged:
                image.zero_()
        return images, found

    pipe.safety_checker.forward = forward
    return pipe


def away_from_grey(images: Tensor) -> Tensor:
    return (images - 0.5).square().flatten(1).mean(1)


def marks(run: Run) -> dict[str, bool]:
    return {name: entry.get("flagged", False) for name, entry in run.record["pictures"].items()}


def test_the_flags_of_the_pictures_shown_are_written_not_those_of_others(tmp_path: Path) -> None:
    """The first set (before) is flagged, the second, which is the best, is not; and the other way round."""
    for flags, wanted in (
        (([True], [False]), {"before": True, "after": False}),
        (
            ([False], [True]),
            {"before": False, "after": True},
        ),
    ):
        run = optimize(checked(*flags), "a 2", away_from_grey, out=tmp_path / str(wanted["after"]), **SMALL)
        assert run.record["best"]["iteration"] == 1
        assert marks(run) == wanted


def test_one_flagged_picture_marks_its_row_and_none_marks_nothing(tmp_path: Path) -> None:
    run = optimize(checked([False, True]), ["a 2", "b 7"], away_from_grey, out=tmp_path / "a", **SMALL)
    assert marks(run) == {"before": True, "after": True}
    free = optimize(checked([False, False]), ["a 2", "b 7"], away_from_grey, out=tmp_path / "b", **SMALL)
    assert marks(free) == {"before": False, "after": False}
    assert '"flagged"' not in (tmp_path / "b" / "record.json").read_text()


def test_the_checkpoint_keeps_the_flags_of_the_best_so_far(tmp_path: Path) -> None:
    def stop(run: Run, entry: Any) -> None:
        if entry["iteration"] == 1:
            raise KeyboardInterrupt

    for i, flags in enumerate((([True], [False]), ([False], [True]))):
        folder = tmp_path / str(i)
        kwargs = SMALL | {"steps": 2, "callback": stop, "out": folder}
        with pytest.raises(KeyboardInterrupt):
            optimize(checked(*flags), "a 2", away_from_grey, **kwargs)
        state = Run.load(folder).load_checkpoint()
        assert state is not None
        assert state["best"]["iterations"].tolist() == [1]
        assert state["best"]["flagged"].tolist() == flags[1]


def test_inversion_and_ambigrams_mark_theirs(tmp_path: Path) -> None:
    pair = Pair("a 2", torch.zeros(3, PICTURE, PICTURE), noise=noise_for(tiny_sd()))
    learned = invert(checked([True]), [pair], out=tmp_path / "a", **SMALL)
    assert marks(learned) == {"before": True, "target": False, "after": True}
    made = ambigram(
        checked([True]), "top", "bottom", loss=reader(), prompt="a 2", out=tmp_path / "b", **SMALL
    )
    assert marks(made) == dict.fromkeys(["before", "after", "upside down", "one-step guidance"], True)


def test_a_blackened_target_is_refused_as_something_to_learn_from() -> None:
    with pytest.raises(InputError, match=r"flagged the picture of 'a 2, b'"):
        effect_pairs(checked([False], [True]), ["a 2"], "b", seeds=[0], num_inference_steps=1)


# -- on the command line ------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    pipe = tiny_sd(safety_checker=True)
    pipe.safety_checker.concept_embeds_weights.fill_(-2.0)  # below any cosine: it flags everything
    pipe.save_pretrained("model")
    return "model"


def call(*args: str) -> Result:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output
    return result


def test_the_page_blurs_them_unless_told_otherwise(model: str) -> None:
    options = ("--model", model, "--num-inference-steps", "1", "--steps", "1", "--no-progress")
    hidden = call("optimize", "a 2", "--loss", "brightness", *options, "--out", "a")
    assert "--show-flagged" in hidden.output
    blurred, _ = Page(Path("a/report.html").read_text()).images
    call("optimize", "a 2", "--loss", "brightness", *options, "--out", "b", "--show-flagged")
    shown, _ = Page(Path("b/report.html").read_text()).images
    assert Path("a/pictures/before.png").read_bytes() == Path("b/pictures/before.png").read_bytes()
    assert shown != blurred
    assert report.write("a", blur_flagged=False).read_text().count(shown["src"]) == 1


def test_generate_says_so_and_shows_them_on_request(model: str) -> None:
    common = ("generate", "a 2", "--model", model, "--num-inference-steps", "1")
    hidden = call(*common, "--out", "a")
    assert "flagged 00-a-2.png: blackened" in hidden.stderr
    assert not numpy.asarray(Image.open("a/00-a-2.png")).any()
    shown = call(*common, "--out", "b", "--show-flagged")
    assert "flagged 00-a-2.png: shown" in shown.stderr
    pipe = tiny_sd()  # the same weights, no checker
    expected = pipe("a 2", latents=noise_for(pipe), num_inference_steps=1).images[0]
    assert numpy.array_equal(numpy.asarray(Image.open("b/00-a-2.png")), numpy.asarray(expected))
