"""A record's comparison of several ways to the same end: a table of scores and costs, and their curves in one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import figures
from .plot import Curve, draw

COSTS = (
    ("tries", "tries per guided step"),
    ("network_calls", "network calls"),
    ("vjps", "VJPs"),
    ("decodes", "pictures scored"),
    ("seconds", "time"),
)


def comparison(record: Mapping[str, Any]) -> dict[str, Any]:
    """The table: a column for each way; its scores (mean ± standard error over the samples) and what it cost."""
    found = record.get("comparison") or {}
    scores, ways = found.get("scores") or [], found.get("rows") or []
    rows = []
    for i, score in enumerate(scores):
        lower = bool(score.get("lower"))
        best = _best(ways, i, lower)
        cells = [{"text": spread(way["scores"][i]), "best": k in best} for k, way in enumerate(ways)]
        rows.append({"name": f"{score['name']} {'↓' if lower else '↑'}", "cells": cells})
    for key, name in COSTS:
        rows.append(
            {"name": name, "cells": [{"text": cost(key, way.get(key)), "best": False} for way in ways]}
        )
    return {
        "ways": [way["name"] for way in ways],
        "rows": rows if ways else [],
        "note": found.get("note", ""),
    }


def spread(values: Sequence[float | None]) -> str:
    """``0.312 ± 0.020``: the mean and its standard error, which one value alone does not have."""
    known = [v for v in values if v is not None]
    if not known:
        return figures.number(None)
    mean = sum(known) / len(known)
    if len(known) == 1:
        return figures.number(float(mean))
    error = math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1) / len(known))
    if not 1e-6 < error < 1e6:
        return f"{figures.number(float(mean))} ± {figures.number(float(error), 2)}"
    decimals = max(0, 1 - math.floor(math.log10(error)))  # two digits of the error
    if abs(mean) >= 1e4:
        return f"{figures.grouped(mean, decimals)} ± {figures.grouped(error, decimals)}"
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")


def cost(key: str, value: Any) -> str:
    """One of :data:`COSTS` as text."""
    if key == "seconds":
        return figures.seconds(value)
    if key == "tries" and value is not None:
        low, high = value
        return str(low) if low == high else f"{low} to {high}"
    return figures.number(value)


def _best(ways: Sequence[Mapping[str, Any]], score: int, lower: bool) -> set[int]:
    """Which ways have the best mean; none where all are alike."""
    means = [_mean(way["scores"][score]) for way in ways]
    known = [m for m in means if m is not None]
    if len(set(known)) < 2:
        return set()
    best = min(known) if lower else max(known)
    return {k for k, mean in enumerate(means) if mean == best}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def curves(record: Mapping[str, Any]) -> dict[str, Any]:
    """The lines in one pair of axes, wide and narrow (for phones), their legend and a note."""
    found = record.get("curves") or {}
    lines = [
        Curve(line["name"], [(float(x), float(y)) for x, y in line["points"] if y is not None], line["style"])
        for line in found.get("lines") or []
    ]
    label, across = found.get("label", "loss"), found.get("across", "step")
    return {
        "title": found.get("title", "The loss along the steps"),
        "wide": draw(lines, width=760, height=300, label=label, across=across),
        "narrow": draw(lines, width=350, height=240, label=label, across=across),
        "legend": [(line.style, line.name) for line in lines],
        "note": found.get("note", ""),
    }
