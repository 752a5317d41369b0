"""Settles each method's strength on noises and prompts that are not reported, by the same search for all.

Four strengths are tried, each three times the one before, and three more by halving in log w. Who pulls harder always
gets a lower loss, so that losses are compared where as much of the prompt is given up: chosen is the strength of the
lowest loss among those whose mean CLIP score is at most ``task.drop`` below that of unguided pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .bench import Bench
from .tasks import CLIP
from .ways import DOODL, UNGUIDED, Way

GRID = (0.03, 0.1, 0.3, 0.9)
RATES = (30.0, 100.0, 300.0, 900.0)
HALVINGS = 3

Tried = Mapping[float, tuple[float, float]]
"""Mean loss and mean CLIP score by strength."""


def measured(bench: Bench, way: Way) -> tuple[float, float]:
    """Mean loss and mean CLIP score over the trial's cases."""
    cells = [bench.cell(way, case) for case in bench.task.trial]
    loss, clip = (float(np.mean([cell["scores"][k] for cell in cells])) for k in ("loss", CLIP))
    return loss, clip


def best(tried: Tried, floor: float) -> float | None:
    """The strength of the lowest loss whose CLIP score is at least ``floor``; None if none is."""
    allowed = [w for w, (_, clip) in tried.items() if clip >= floor]
    return min(allowed, key=lambda w: tried[w][0]) if allowed else None


def following(tried: Tried, floor: float) -> float:
    """What to try next: half way, in log w, from the best so far to the next stronger one; or beyond an end."""
    ws, found = sorted(tried), best(tried, floor)
    if found is None:
        return float(f"{ws[0] / 3:.3g}")
    if found == ws[-1]:
        return float(f"{3 * found:.3g}")
    above = ws[ws.index(found) + 1]
    return float(f"{(found * above) ** 0.5:.3g}")


def settle(bench: Bench, way: Way) -> dict[str, Any]:
    """Search a way's strength; noted in the results file and returned: w, what was tried, and the floor."""
    floor = measured(bench, Way(UNGUIDED))[1] - bench.task.drop
    found = {w: measured(bench, replace(way, w=w)) for w in (RATES if way.rule == DOODL else GRID)}
    for _ in range(HALVINGS):
        w = following(found, floor)
        found[w] = measured(bench, replace(way, w=w))
    chosen = best(found, floor) or min(found)
    entry = {
        "way": way.key,
        "w": chosen,
        "floor": round(floor, 4),
        "tried": [[v, round(found[v][0], 4), round(found[v][1], 4)] for v in sorted(found)],
    }
    others = [e for e in bench.results.data.get("searches", []) if e["way"] != way.key]
    bench.results.note("searches", [*others, entry])
    return entry
