"""Work–precision curves as inline SVG: both axes logarithmic, colours and marks by the series' number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .figures import number, tick
from .plot import Point, _log_ticks, _text, _ticks

WIDTH, HEIGHT = 380, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 40
#: The style sheet has as many colours; further series use them again with the next mark.
COLOURS = 10


@dataclass
class Series:
    """One line with a mark at each point; ``place`` is its colour and mark."""

    name: str
    points: list[Point]
    place: int


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    length: float

    def at(self, value: float) -> float:
        low, v, high = (math.log(x) if self.log else x for x in (self.low, value, self.high))
        return self.start + (v - low) / ((high - low) or 1) * self.length


def draw(series: Sequence[Series], *, x: str, y: str, floor: float | None = None, log_x: bool = True) -> str:
    """The series as an ``<svg>``.

    Args:
        series: points with y of 0, below 0 or not finite are left out (likewise x, on a logarithmic axis).
        x, y: names of the axes.
        floor: height of a dashed line.
        log_x: whether x is logarithmic.

    Returns "" where nothing is left to draw.
    """
    kept = [Series(s.name, [p for p in s.points if _drawable(p, log_x)], s.place) for s in series]
    kept = [s for s in kept if s.points]
    if not kept:
        return ""
    xs, ys = ([p[i] for s in kept for p in s.points] for i in (0, 1))
    if floor is not None and floor > 0:
        ys = [*ys, floor]
    across = _axis(xs, log_x, _LEFT, WIDTH - _LEFT - _RIGHT)
    up = _axis(ys, True, HEIGHT - _BOTTOM, -(HEIGHT - _TOP - _BOTTOM))
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)} by {escape(x)}">'
    ]
    parts += _grid(across, up, x, y)
    if floor is not None and floor > 0:
        height = up.at(floor)
        parts.append(
            f'<line class="floor" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        )
    for s in kept:
        places = [(across.at(a), up.at(b)) for a, b in s.points]
        colour = f"c{s.place % COLOURS}"
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(
            f'<polyline class="curve {colour}" points="{path}"><title>{escape(s.name)}</title></polyline>'
        )
        if len(places) > 6:
            continue
        for (a, b), (value, error) in zip(places, s.points, strict=True):
            title = f"{s.name}: {number(error, 2)} at {number(value, 3)} {x}"
            parts.append(mark(s.place, a, b, title))
    return "\n".join([*parts, "</svg>"])


def mark(place: int, x: float, y: float, title: str = "") -> str:
    """A series' mark at a point of the page: a dot, then a square, then a triangle."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    colour = f"mark c{place % COLOURS}"
    kind = place // COLOURS % 3
    if kind == 0:
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">{inside}</circle>'
    if kind == 1:
        return f'<rect class="{colour}" x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2">{inside}</rect>'
    corners = f"{x:.1f},{y - 4.6:.1f} {x - 4.4:.1f},{y + 3.4:.1f} {x + 4.4:.1f},{y + 3.4:.1f}"
    return f'<polygon class="{colour}" points="{corners}">{inside}</polygon>'


def _drawable(point: Point, log_x: bool) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and y > 0 and (x > 0 or not log_x)


def _axis(values: Sequence[float], log: bool, start: float, length: float) -> _Axis:
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.1)
        return _Axis(low / room, high * room, True, start, length)
    room = 0.04 * (high - low) or 1.0
    return _Axis(low - room, high + room, False, start, length)


def _grid(across: _Axis, up: _Axis, x: str, y: str) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in _thinned(_log_ticks(up.low, up.high), 7):
        height = up.at(value)
        if _TOP - 1 <= height <= bottom + 1:
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>'
            )
            parts.append(_text("tick", _LEFT - 8, height + 4, tick(value), "end"))
    ticks = (
        _log_ticks(across.low, across.high) if across.log else _ticks(across.low, across.high, 6, whole=True)
    )
    for value in _thinned(ticks, 7):
        place = across.at(value)
        if _LEFT - 1 <= place <= right + 1:
            parts.append(f'<line class="grid" y1="{_TOP}" y2="{bottom}" x1="{place:.1f}" x2="{place:.1f}"/>')
            parts.append(_text("tick", place, bottom + 17, tick(value)))
    parts.append(_text("name", (_LEFT + right) / 2, HEIGHT - 4, escape(x)))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="name" x="12" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle:.1f})">{escape(y)}</text>'
    )
    return parts


def _thinned(ticks: list[float], most: int) -> list[float]:
    """Every second of them, or every third, …: so many that they fit."""
    return ticks[:: math.ceil(len(ticks) / most)] if ticks else ticks
