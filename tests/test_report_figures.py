"""Numbers and curves of a report: as they are read, and where the axis says."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from backdrift.report import figures, plot


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (3, "3"),
        (12345, "12\u202f345"),
        (0.0312345, "0.03123"),
        (-1.5, "−1.5"),
        (2.0, "2"),
        (17208.4, "17\u202f208"),
        (-3.0, "−3"),
        (1.234e-7, "1.234·10⁻⁷"),
        (-1.5e12, "−1.5·10¹²"),
        ("adamw", "adamw"),
    ],
)
def test_numbers(value: object, text: str) -> None:
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (18000.0, "18\u202f000"),
        (0.05, "0.05"),
        (0, "0"),
        (1e-6, "10⁻⁶"),
        (2e-6, "2·10⁻⁶"),
        (1e7, "10⁷"),
        (0.0001, "0.0001"),
    ],
)
def test_ticks(value: float, text: str) -> None:
    assert figures.tick(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.042, "0.042 s"),
        (1.43, "1.4 s"),
        (38.2, "38 s"),
        (59.7, "1 min 00 s"),
        (125.0, "2 min 05 s"),
        (4350.0, "1 h 12 min"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert figures.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (512, "512 B"),
        (2048, "2 KiB"),
        (289_000_000, "276 MiB"),
        (3 * 2**30, "3 GiB"),
        (5000 * 2**30, "5000 GiB"),
    ],
)
def test_sizes(value: float | None, text: str) -> None:
    assert figures.size(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (2.0, 1.0, "−50 %"),
        (1.0, 0.004, "−99.6 %"),
        (1.0, 1.5, "+50 %"),
        (-1.0, 1.0, ""),
        (None, 1.0, ""),
        (1.0, 0.0, "−100 %"),
    ],
)
def test_changes(before: float | None, after: float | None, text: str) -> None:
    assert figures.change(before, after) == text


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def line(root: ElementTree.Element, style: str) -> list[tuple[float, float]]:
    (found,) = [e for e in root.iter("polyline") if e.get("class") == style]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.get("points", "").split())]


def scale_from_ticks(root: ElementTree.Element) -> list[tuple[float, float]]:
    """(value, y of its grid line) for each tick of the vertical axis, read off the drawing."""
    labels = [e for e in root.iter("text") if e.get("class") == "tick" and e.get("text-anchor") == "end"]
    grids = [float(e.get("y1", "nan")) for e in root.iter("line") if e.get("class") == "grid"]
    values = [float((e.text or "").replace("−", "-").replace("\u202f", "")) for e in labels]
    return list(zip(values, grids, strict=True))


def test_points_lie_where_the_axis_says_they_do() -> None:
    data = [(0.0, 5.0), (1.0, 2.5), (2.0, 0.0), (4.0, 10.0)]
    root = svg(plot.draw([plot.Curve("loss", data)], width=760, height=280))
    ticks = scale_from_ticks(root)
    (v0, y0), (v1, y1) = ticks[0], ticks[-1]
    points = line(root, "main")
    for (_, value), (_, y) in zip(data, points, strict=True):
        assert y == pytest.approx(y0 + (value - v0) / (v1 - v0) * (y1 - y0), abs=0.11)
    xs = [x for x, _ in points]
    assert (xs[1] - xs[0]) * 4 == pytest.approx(xs[3] - xs[0], abs=0.5)
    assert 0 < min(xs) < max(xs) < 760


def test_a_wide_range_gets_a_logarithmic_axis() -> None:
    data = [(float(i), 10.0**-i) for i in range(5)]
    text = plot.draw([plot.Curve("loss", data)], width=760, height=280)
    assert "log scale" in text
    ys = [y for _, y in line(svg(text), "main")]
    gaps = [b - a for a, b in pairwise(ys)]
    assert gaps == pytest.approx([gaps[0]] * 4, abs=0.21)
    assert {
        v for v, _ in scale_from_ticks(svg(plot.draw([plot.Curve("l", data[:3])], width=760, height=280)))
    } >= {0.01, 0.1, 1}
    # not with a value at or below zero
    assert "log scale" not in plot.draw([plot.Curve("loss", [*data, (5.0, 0.0)])], width=760, height=280)


def test_the_best_is_marked_on_the_curve() -> None:
    data = [(0.0, 3.0), (1.0, 1.0), (2.0, 2.0)]
    root = svg(plot.draw([plot.Curve("loss", data)], width=350, height=230, mark=(1.0, 1.0)))
    (mark,) = [e for e in root.iter("circle") if e.get("class") == "mark"]
    assert (float(mark.get("cx", "")), float(mark.get("cy", ""))) == line(root, "main")[1]
    assert "best: 1 at iteration 1" in ElementTree.tostring(mark, encoding="unicode")


def test_curves_that_cannot_be_drawn() -> None:
    assert plot.draw([plot.Curve("loss", [(0.0, 1.0)])], width=760, height=280) == ""
    assert plot.draw([], width=760, height=280) == ""
    flat = plot.draw([plot.Curve("loss", [(0.0, 0.0), (1.0, 0.0)])], width=760, height=280)
    assert len({y for _, y in line(svg(flat), "main")}) == 1
    broken = [(0.0, 1.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 2.0)]
    assert len(line(svg(plot.draw([plot.Curve("loss", broken)], width=760, height=280)), "main")) == 2
    assert "a &lt;b&gt;" in plot.draw([plot.Curve("a <b>", broken)], width=760, height=280)
