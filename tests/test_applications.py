"""The instruments that judge the applications: the rule for clean pictures, the judge of shapes, the aims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.ambigram_picture import GAP, HEIGHT, draw, panels
from benchmarks.clean import Usual, measures
from benchmarks.inversion import met, row
from training.judge import SIDE, ShapeJudge, drawn, ink
from training.scenes import DIGITS

from backdrift.recipes import ambigram
from tiny_pipelines import PICTURE, tiny_sd
from top_or_bottom import reader

WHITE, RED = torch.ones(3), torch.tensor([0.8, 0.1, 0.2])


def bar() -> Tensor:
    """A red bar on white, its rim half way between the two: (3, 32, 32)."""
    weight = torch.zeros(32, 32)
    weight[7:25, 11:21] = 0.5
    weight[8:24, 12:20] = 1.0
    return WHITE[:, None, None] * (1 - weight) + RED[:, None, None] * weight


def found(*pictures: Tensor) -> Tensor:
    return measures(torch.stack(pictures), WHITE, RED)


def test_each_measure_is_the_number_it_says() -> None:
    tinted, dark, green, smeared, loose = (bar() for _ in range(5))
    tinted -= torch.tensor([0.0, 0.2, 0.0])[:, None, None] * (tinted[:1] > 0.99)
    dark[:, 8:24, 12:20] = 0.5 * RED[:, None, None]
    green[:, 16, 16] += torch.tensor([0.2, -0.1, 0.0])
    smeared[:, 28:30, 4:12] = (WHITE * 0.7 + RED * 0.3)[:, None, None]
    loose[:, 10:14, 26:28] = RED[:, None, None]
    line = (RED - WHITE) / (RED - WHITE).norm()
    beside = torch.tensor([0.2, -0.1, 0.0])
    beside = beside - (beside @ line) * line  # what of it is off the line
    plain, rows = found(bar())[0], found(tinted, dark, green, smeared, loose)
    rim = 18 * 10 - 16 * 8  # exactly half way, hence between the two
    assert plain.tolist() == pytest.approx([0, 0, 0, rim / 128, 0], abs=1e-6)
    assert rows[0, 0].item() == pytest.approx(0.2, rel=1e-5)
    assert rows[1, 1].item() == pytest.approx(0.5 * RED.norm().item(), rel=1e-5)
    assert rows[2, 2].item() == pytest.approx(beside.norm().item() / 32, rel=0.02)  # one pixel of 32 * 32
    assert rows[3, 3].item() == pytest.approx((rim + 16) / 128, rel=1e-6)
    assert rows[4, 4].item() == pytest.approx(8 / (128 + 8), rel=1e-6)
    for i in (0, 4):  # the measures do not answer for each other
        for j in {0, 1, 4} - {i}:
            assert rows[i, j].item() == pytest.approx(0, abs=1e-6)


def test_clean_means_no_worse_than_the_worst_of_the_others() -> None:
    def with_loose(pixels: int) -> Tensor:
        picture = bar()
        picture[:, 10 : 10 + pixels, 26] = RED[:, None]
        return picture

    usual = Usual.of(torch.stack([bar(), with_loose(4)]))
    pictures = torch.stack([bar(), with_loose(4), with_loose(5), bar() * 0.9])
    assert usual.clean(pictures).tolist() == [True, True, False, False]


# -- the judge ----------------------------------------------------------------------------------------------


def test_ink_does_not_depend_on_the_colours() -> None:
    shape = (bar()[:1] < 0.99).float().expand(3, -1, -1)
    inverted = torch.stack([bar(), 1 - bar(), shape * 0.3 + 0.1])
    found = ink(inverted).view(3, SIDE, SIDE)
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert found[0, 8, 8] == found[2, 8, 8] == 1
    assert found[0, 0].max() == 0


def test_the_nearest_known_shapes_vote() -> None:
    shapes = torch.zeros(6, SIDE * SIDE)
    shapes[:3, :128], shapes[3:, 128:] = 1, 1
    judge = ShapeJudge(shapes, torch.tensor([2, 2, 7, 5, 5, 5]), neighbours=3)
    top = torch.ones(1, 3, 64, 64)
    top[..., 4:32, 4:60] = 0
    (votes,) = judge(top).exp()
    assert votes[2].item() == pytest.approx(2 / 3, abs=0.01)
    assert votes[7].item() == pytest.approx(1 / 3, abs=0.01)
    assert votes[5] < 1e-5


def test_the_judge_reads_real_digits_that_it_has_not_seen() -> None:
    seen, answers = drawn(1500, seed=1, held_out=False)
    fresh, wanted = drawn(200, seed=2, held_out=True)
    read = ShapeJudge(ink(seen), answers)(fresh).argmax(1)
    assert len(DIGITS) == 10
    assert (read == wanted).float().mean() >= 0.93


# -- what is written about them -----------------------------------------------------------------------------


def test_the_aims_of_the_inversion() -> None:
    good = {
        "loss before": 1.0,
        "best loss": 0.1,
        "saturation: plain": 0.5,
        "saturation: words": 0.1,
        "saturation: embedding": 0.08,
        "saturation: embedding / words": 0.81,
        "right: embedding": 0.9,
    }
    assert set(met("in black and white", good).values()) == {True}
    for name, value in (
        ("best loss", 0.11),
        ("saturation: embedding / words", 1.3),
        ("right: embedding", 0.85),
    ):
        assert list(met("in black and white", good | {name: value}).values()).count(False) == 1
    what, text = row("output", "in black and white", good)
    assert what == '"in black and white" inverted into output slots'
    assert text == (
        "loss −90.0%; on 20 unseen pairs saturation 0.5 → 0.08 (the words: 0.1), digit right in 90%"
    )


def test_the_picture_of_the_readme_is_drawn_from_a_run(tmp_path: Path) -> None:
    how: dict[str, Any] = {"loss": reader(), "prompt": "a 2", "num_inference_steps": 1, "progress": False}
    run = ambigram(
        tiny_sd(), "top", "bottom", seeds=[0, 1, 2], steps=1, baseline=None, out=tmp_path / "a", **how
    )
    alone = ambigram(
        tiny_sd(), "top", "bottom", seeds=[2], steps=1, baseline=None, jitter=0, out=tmp_path / "b", **how
    )
    before, after, turned = panels(run, 2)
    assert before.tobytes() == panels(alone, 0)[0].tobytes()  # the noise of seed 2, not yet changed
    assert after.tobytes() == run.best.pil[2].tobytes()
    assert turned.tobytes() == after.rotate(180).tobytes()
    assert draw(run, 2).size == (3 * HEIGHT + 2 * GAP, HEIGHT)
    assert before.size == (PICTURE, PICTURE)
