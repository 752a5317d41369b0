"""The page's table of stylisation is that of the results, and its figures are means of the pictures' scores."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from benchmarks import stylize
from benchmarks.marked import marked
from benchmarks.record import Record

from backdrift.losses import load_classifier


def read(path: Path) -> Record:
    data = json.loads(path.read_text())
    return Record(path, data["machine"], data["settings"], "cells")


def test_the_page_holds_the_results_and_nothing_else() -> None:
    record = read(stylize.RESULTS)
    assert marked(stylize.PAGE.read_text(), "measured") == stylize.table(record), (
        "run: python -m benchmarks.stylize --write"
    )
    assert record.data["figures"] == stylize.figures(record)


def test_a_row_is_the_mean_over_references_and_pictures(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.json", {}, {}, "cells")
    for reference, style in (("a", [1.0, 2.0]), ("b", [3.0, 4.0])):
        scores = {"style, classifier": style, "digit as named": [1.0, 0.0], "CLIP score": [50.0, 60.0]}
        record.add(
            "cells",
            reference=reference,
            way="original",
            sampler="",
            scores={s.name: scores for s in stylize.SETS},
        )
    found = stylize.cell(record, "original", "style, classifier", "unseen noises")
    assert found == [1, 2, 3, 4]
    # standard deviation sqrt(5/3), over four pictures
    assert stylize.spread(found) == f"2.50 ± {(5 / 3) ** 0.5 / 2:.2f}"
    assert stylize.share([1.0, 0.0, 1.0, 1.0]) == "75% ± 25%"


def test_the_digit_is_read_by_the_classifier() -> None:
    from training.scenes import DIGITS

    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    says = int(load_classifier()(image[None])["digit"].argmax())
    assert [stylize.digit_right(image, f"a red {d} on white") for d in DIGITS] == [
        float(i == says) for i in range(10)
    ]


def test_the_baseline_learns_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its diffusion loss on the reference falls: the pictures of its word come nearer to the reference."""
    ticks = itertools.count()
    monkeypatch.setattr(
        stylize.time, "process_time", lambda: float(next(ticks))
    )  # an update takes one second
    monkeypatch.setattr(stylize, "MOMENTS", {1.0: "the same time"})
    monkeypatch.setattr(stylize, "CALL", {"num_inference_steps": 4, "guidance_scale": 1.0})
    reference = "skimage/ihc"
    from backdrift import load
    from backdrift.losses import load_picture, resize

    wanted = resize(load_picture(reference), (64, 64))

    def apart(pipe: object) -> float:
        return float((stylize.made(pipe, [stylize.WORD] * 2, 7) - wanted).square().mean())

    ((part, updates, pipe),) = stylize.dreambooth(reference, seconds=20.0, lr=1e-3)
    assert (part, updates) == (1.0, 20)
    assert apart(pipe) < 0.9 * apart(load())
