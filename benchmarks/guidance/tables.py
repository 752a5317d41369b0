"""Means, standard errors and paired differences of results files; nothing here measures anything."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .costs import Counts, Units
from .results import results_file
from .setting import STEPS
from .units import units
from .ways import DOODL, SAG, TFG, UNGUIDED, UNIVERSAL, Way

Data = dict[str, Any]
TITLES = {
    UNGUIDED: "unguided",
    SAG: "SAG",
    "FreeDoM": "FreeDoM",
    UNIVERSAL: "Universal Guidance",
    TFG: "TFG",
    DOODL: "DOODL",
}
HIGHER = ("CLIP score", "CLIP-I", "digit as named", "digit as in the reference", "colourfulness", "contrast")


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Over independent values; the error is nan for a single one."""
        x = np.asarray(values, dtype=np.float64)
        error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        return cls(float(x.mean()), float(error))


class Table:
    """The cells of one task.

    Args:
        data: the contents of its results file.
        times: unit times.
    """

    def __init__(self, data: Data, times: Units) -> None:
        self.data, self.times = data, times
        self._cells: dict[str, dict[str, Data]] = {}
        for cell in data.get("cells", []):
            if "way" in cell["key"]:
                found = self._cells.setdefault(_text(cell["key"]["way"]), {})
                found[_text(cell["key"]["case"])] = cell

    @classmethod
    def read(cls, folder: Path, task: str, steps: int = STEPS) -> Table | None:
        """From the results; None if there are none yet."""
        path = results_file(folder, task, steps)
        times = read_units(folder, task)
        return cls(json.loads(path.read_text()), times) if path.exists() and times else None

    def has(self, way: Data) -> bool:
        """Whether a way was measured at all."""
        return _text(way) in self._cells

    def cases(self, ways: Sequence[Data], among: Sequence[Data]) -> list[Data]:
        """Those of the cases that were measured for all ways."""
        return [c for c in among if all(_text(c) in self._cells.get(_text(w), {}) for w in ways)]

    def values(self, way: Data, cases: Sequence[Data], score: str) -> list[float]:
        """Of every picture of these cases."""
        found = self._cells[_text(way)]
        return [v for case in cases for v in found[_text(case)]["scores"][score]]

    def mean(self, way: Data, cases: Sequence[Data], score: str) -> Mean:
        """Over the pictures."""
        return Mean.of(self.values(way, cases, score))

    def beyond(self, way: Data, other: Data, cases: Sequence[Data], score: str) -> Mean:
        """The mean over the pictures of the difference way - other, picture by picture."""
        a, b = (self.values(w, cases, score) for w in (way, other))
        return Mean.of([x - y for x, y in zip(a, b, strict=True)])

    def counts(self, way: Data, cases: Sequence[Data]) -> Counts:
        """Of one run."""
        return Counts(**self._cells[_text(way)][_text(cases[0])]["counts"])

    def seconds(self, way: Data, cases: Sequence[Data]) -> float:
        """Modelled, of one run."""
        return self.times.seconds(self.counts(way, cases))

    def scores(self, way: Data, cases: Sequence[Data]) -> list[str]:
        """What was measured."""
        return list(self._cells[_text(way)][_text(cases[0])]["scores"])


def read_units(folder: Path, task: str) -> Units | None:
    """The unit times to report with; those that were planned with, where there are no others."""
    path = folder / "guidance-units.json"
    if not path.exists():
        return None
    cells = {(c["key"]["purpose"], c["key"]["task"]): c for c in json.loads(path.read_text())["cells"]}
    cell = cells.get(("report", task)) or cells.get(("plan", task))
    return None if cell is None else units(cell)


def number(value: float, digits: int = 3) -> str:
    """So many digits, written short; whole numbers where there are more before the point."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 4)}f}".replace("-", "−")


def shown(mean: Mean, sign: bool = False) -> str:
    """Mean ± error, both to the error's second digit."""
    if not math.isfinite(mean.error):
        return number(mean.value)
    places = 0 if mean.error <= 0 else max(0, 1 - math.floor(math.log10(mean.error)))
    places = min(places, 4)
    text = f"{mean.value:{'+' if sign else ''},.{places}f} ± {mean.error:,.{places}f}"
    return text.replace("-", "−")


def called(way: Way) -> str:
    """What a way is called in a table."""
    return TITLES[way.rule] + (f", n = {way.n}" if way.rule == SAG else "")


def _text(key: Data) -> str:
    return json.dumps(key, sort_keys=True)
