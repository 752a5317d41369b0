"""The table and the plot of several ways to the same end: means, errors, what is best, and where the lines lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from backdrift import report
from backdrift.report.comparison import comparison, cost, curves, spread


def record(**changes: Any) -> dict[str, Any]:
    costs = {"network_calls": 1200, "vjps": 480, "decodes": 80, "seconds": 75.0}
    return {
        "comparison": {
            "scores": [{"name": "loss", "lower": True}, {"name": "CLIP <score>", "lower": False}],
            "rows": [
                {"name": "unguided", "scores": [[4.0, 2.0], [20.0, 20.0]], "tries": None, **costs},
                {"name": "n = 4", "scores": [[1.0, 1.0], [18.0, 22.5]], "tries": [1, 2], **costs},
            ],
            "note": "a note",
        },
        "curves": {
            "label": "loss", "across": "step", "note": "of estimates",
            "lines": [
                {"name": "unguided", "style": "faint", "points": [[2, 4.0], [4, 3.0], [6, 3.0]]},
                {"name": "n = 4", "style": "main", "points": [[2, 4.0], [4, None], [6, 1.0]]},
            ],
        },
        **changes,
    }  # fmt: skip


def test_a_mean_has_its_standard_error() -> None:
    # of 1, 2, 3, 4: variance 5/3, so the mean's error is sqrt(5/12)
    assert spread([1.0, 2.0, 3.0, 4.0]) == "2.50 ± 0.65"
    assert spread([17000.0, 17100.0]) == "17\u202f050 ± 50"
    assert spread([2.5]) == "2.5"
    assert spread([2.5, None]) == "2.5"
    assert spread([None]) == "–"


def test_the_best_of_each_score_is_marked() -> None:
    found = comparison(record())
    assert found["ways"] == ["unguided", "n = 4"]
    assert [[cell["best"] for cell in row["cells"]] for row in found["rows"][:2]] == [[False, True]] * 2
    assert [row["name"] for row in found["rows"][:2]] == ["loss ↓", "CLIP <score> ↑"]
    assert found["rows"][0]["cells"][1]["text"] == "1 ± 0"
    tied = record()
    tied["comparison"]["rows"].append({**tied["comparison"]["rows"][1], "name": "n = 5"})
    assert [cell["best"] for cell in comparison(tied)["rows"][0]["cells"]] == [False, True, True]
    same = record()
    same["comparison"]["rows"][1]["scores"] = same["comparison"]["rows"][0]["scores"]
    assert not any(cell["best"] for row in comparison(same)["rows"] for cell in row["cells"])


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("tries", None, "–"),
        ("tries", [2, 2], "2"),
        ("tries", [1, 8], "1 to 8"),
        ("seconds", 75.0, "1 min 15 s"),
        ("vjps", 1200, "1\u202f200"),
    ],
)
def test_costs_as_text(key: str, value: Any, text: str) -> None:
    assert cost(key, value) == text


def test_all_lines_share_one_pair_of_axes() -> None:
    drawn = ElementTree.fromstring(curves(record())["wide"])
    lines = {e.get("class"): e.get("points", "").split() for e in drawn.iter("polyline")}
    assert lines["main"][0] == lines["faint"][0]  # the same value at the same step
    assert len(lines["main"]) == 2  # what is not known is left out
    last = {name: [float(v) for v in points[-1].split(",")] for name, points in lines.items() if name}
    assert last["main"][0] == last["faint"][0]
    assert last["main"][1] > last["faint"][1]  # lower, so further down the page


def test_the_page_has_both_and_escapes_them(tmp_path: Path) -> None:
    whole = {
        "format": "backdrift-run/1",
        "kind": "guide-style",
        "title": "t",
        "status": "finished",
        **record(),
    }
    (tmp_path / "record.json").write_text(json.dumps(whole))
    page = report.write(tmp_path).read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for words in ("Side by side", "CLIP &lt;score&gt; ↑", "loss ↓", "1 to 2", "a note", "of estimates"):
        assert words in text, words
    assert "<score>" not in page
    (tmp_path / "record.json").write_text(json.dumps({**whole, "comparison": None, "curves": None}))
    assert "Side by side" not in report.write(tmp_path).read_text()
