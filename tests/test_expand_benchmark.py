"""The benchmark of vocabulary expansion: its interval, its choice among tries, and the page that it writes."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks import expand
from benchmarks.marked import marked


def test_wilson_s_interval_is_the_published_one() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263 and 0 of 20."""
    assert expand.interval(81, 263) == "26–37 %"  # 0.2553 to 0.3662
    assert expand.interval(0, 20) == "-0–16 %".replace("-0", "0")  # 0 to 0.1611
    assert expand.interval(20, 20) == "84–100 %"


def test_of_each_sample_the_try_with_the_lowest_loss_is_kept() -> None:
    tries = [torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0], [5.0]])]
    assert expand.lowest(lambda x: x[:, 0], tries).tolist() == [[2.0], [1.0]]


def test_the_shapes_do_not_depend_on_the_colours() -> None:
    picture = torch.full((1, 3, 64, 64), 0.9)
    picture[..., 16:48, 24:32] = 0.1
    seen = expand.shapes(picture)
    assert seen.shape == (1, 64)
    assert torch.allclose(seen, expand.shapes(1 - picture), atol=1e-5)
    assert seen.view(8, 8)[2:6, 3].tolist() == pytest.approx([1] * 4)
    assert seen.sum().item() == pytest.approx(4)


def test_the_page_has_the_results_table() -> None:
    data = json.loads(expand.RESULTS.read_text())
    assert marked(expand.PAGE.read_text(), "expand") == expand.table(data)
    assert data["figures"] == expand.figures(data)
    assert list(data["measured"]) == list(expand.TASKS)
    for of in data["measured"].values():
        assert set(of["ways"]) == set(expand.WAYS)
        assert of["calls"] == 12 * (2 * data["settings"]["steps"] + 1)
