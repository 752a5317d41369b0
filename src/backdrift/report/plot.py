"""A curve over the iterations as inline SVG: no script, no picture, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from .figures import number, tick

Point = tuple[float, float]


@dataclass
class Curve:
    """One line. ``style`` is its class in the style sheet: "main", "second" or "faint"."""

    name: str
    points: list[Point]
    style: str = "main"


@dataclass
class Axes:
    """From data to the page: linear in x, linear or logarithmic in y."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool
    left: int = 54
    right: int = 14
    top: int = 30
    bottom: int = 38
    ticks: list[float] = field(default_factory=list)

    def at(self, point: Point) -> Point:
        """The place on the page of a point of the data."""
        (x0, x1), (y0, y1) = self.x, self.y
        low, value, high = (math.log(v) if self.log else v for v in (y0, point[1], y1))
        across = (point[0] - x0) / ((x1 - x0) or 1)
        up = (value - low) / ((high - low) or 1)
        inner_width = self.width - self.left - self.right
        inner_height = self.height - self.top - self.bottom
        return self.left + across * inner_width, self.top + (1 - up) * inner_height


def draw(
    curves: Sequence[Curve],
    *,
    width: int,
    height: int,
    mark: Point | None = None,
    label: str = "loss",
    across: str = "iteration",
) -> str:
    """The curves as an ``<svg>``; points that are not finite are left out.

    Args:
        mark: A point to set a dot on (the best so far), with its value.
        label: What is drawn, for people who cannot see it.
        across: What it is drawn over.

    Returns "" when there are not two points to join.
    """
    curves = [Curve(c.name, [p for p in c.points if all(map(math.isfinite, p))], c.style) for c in curves]
    points = [p for c in curves for p in c.points]
    if len({x for x, _ in points}) < 2:
        return ""
    axes = _axes(points, width, height)
    parts = [
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)} by {escape(across)}">'
    ]
    parts += _grid(axes, label, across)
    for curve in sorted(curves, key=lambda c: ("faint", "second", "main").index(c.style)):
        path = " ".join("{:.1f},{:.1f}".format(*axes.at(p)) for p in curve.points)
        parts.append(
            f'<polyline class="{curve.style}" points="{path}"><title>{escape(curve.name)}</title></polyline>'
        )
    for curve in curves:
        if curve.style == "main" and len(curve.points) <= 400:
            parts += [_hover(axes, point, label, across) for point in curve.points]
    if mark is not None and all(map(math.isfinite, mark)):
        x, y = axes.at(mark)
        title = f"best: {number(mark[1])} at iteration {number(mark[0])}"
        parts.append(
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(title)}</title></circle>'
        )
    return "\n".join([*parts, "</svg>"])


def _axes(points: Sequence[Point], width: int, height: int) -> Axes:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    log = low > 0 and high / low > 30
    if log:
        ticks = _log_ticks(low, high)
        low, high = low / 1.15, high * 1.15
    else:
        if high == low:
            low, high = low - abs(low or 1) * 0.1, high + abs(high or 1) * 0.1
        ticks = _ticks(low, high, 5)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    left = 14 + 7 * max((len(tick(t)) for t in ticks), default=3)
    return Axes(width, height, (min(xs), max(xs)), (low, high), log, left=max(left, 40), ticks=ticks)


def _grid(axes: Axes, label: str, across: str) -> list[str]:
    right, bottom = axes.width - axes.right, axes.height - axes.bottom
    parts = []
    for value in axes.ticks:
        y = axes.at((axes.x[0], value))[1]
        if axes.top - 1 <= y <= bottom + 1:
            parts.append(f'<line class="grid" x1="{axes.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text("tick", axes.left - 8, y + 4, tick(value), "end"))
    for value in _ticks(*axes.x, 4 if axes.width < 500 else 8, whole=True):
        if axes.x[0] <= value <= axes.x[1]:
            x = axes.at((value, axes.y[0]))[0]
            parts.append(_text("tick", x, bottom + 17, f"{value:g}"))
    middle = (axes.left + right) / 2
    scale = " (log scale)" if axes.log else ""
    parts.append(_text("name", middle, axes.height - 3, escape(across)))
    parts.append(_text("name", 2, 14, f"{escape(label)}{scale}", "start"))
    return parts


def _text(style: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _hover(axes: Axes, point: Point, label: str, across: str) -> str:
    x, y = axes.at(point)
    title = f"{across} {number(point[0])}: {label} {number(point[1])}"
    return f'<circle class="hover" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(title)}</title></circle>'


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside; with 2 and 5 times them where those are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def inside(factors: tuple[int, ...]) -> list[float]:
        return [m * 10.0**d for d in decades for m in factors if low / 1.15 <= m * 10.0**d <= high * 1.15]

    ticks = inside((1,))
    return ticks if len(ticks) >= 4 else inside((1, 2, 5))
