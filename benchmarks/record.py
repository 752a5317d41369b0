"""The results file: one JSON, rewritten whole after every measurement, so that a run can be taken up again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Cell = dict[str, Any]


class Record:
    """Measurements of several kinds, each a list of cells, and what else is noted beside them.

    Args:
        path: the file; read if it exists.
        machine, settings: what the figures depend on.
        kinds: the names of the lists.

    Raises:
        SystemExit: the file holds figures of another machine or other settings.
    """

    def __init__(self, path: Path, machine: dict[str, Any], settings: dict[str, Any], *kinds: str) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": machine, "settings": settings}
        if path.exists():
            old = json.loads(path.read_text())
            differing = [k for part in self.data for k, v in self.data[part].items() if old[part].get(k) != v]
            if differing:
                raise SystemExit(
                    f"{path.name} was measured with other {', '.join(differing)}: delete it to measure anew, or name "
                    "another place for the results"
                )
            self.data = old
        for kind in kinds:
            self.data.setdefault(kind, [])

    def find(self, kind: str, **keys: Any) -> list[Cell]:
        """The measurements with these values."""
        return [cell for cell in self.data[kind] if _has(cell, keys)]

    def add(self, kind: str, **cell: Any) -> None:
        """Append a measurement and save."""
        self.data[kind].append(cell)
        self.save()

    def replace(self, kind: str, keys: Cell, cell: Cell) -> None:
        """Put a measurement in the place of those with these values, and save."""
        self.data[kind] = [other for other in self.data[kind] if not _has(other, keys)]
        self.add(kind, **cell)

    def ensure(self, kind: str, keys: Cell, measure: Callable[[], Cell]) -> Cell:
        """The measurement with these values, made and saved now if there is none."""
        if not self.find(kind, **keys):
            self.add(kind, **{**keys, **measure()})
        return self.find(kind, **keys)[0]

    def note(self, name: str, value: Any) -> None:
        """Set an entry beside the measurements and save."""
        self.data[name] = value
        self.save()

    def save(self) -> None:
        """Write the file, a measurement on a line; a kill in between leaves the old one."""
        parts = []
        for name, value in self.data.items():
            text = json.dumps(value, ensure_ascii=False)
            if isinstance(value, list) and value and isinstance(value[0], dict):
                text = "[\n" + ",\n".join(json.dumps(cell, ensure_ascii=False) for cell in value) + "\n]"
            parts.append(f"{json.dumps(name)}: {text}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        os.replace(fresh, self.path)


def _has(cell: Cell, keys: Cell) -> bool:
    return all(cell.get(k) == v for k, v in keys.items())


class Figures:
    """What a results file says: medians, ratios, peaks.

    Args:
        data: the file's contents.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self._times: dict[tuple[int, str, str], dict[int, dict[str, Any]]] = {}
        for cell in data["times"]:
            key = (cell["steps"], cell["wants"], cell["method"])
            self._times.setdefault(key, {})[cell["repeat"]] = cell
        self._memory = {(c["steps"], c["wants"], c["method"]): c for c in data["memory"]}

    @classmethod
    def read(cls, path: Path) -> Figures:
        """From a file."""
        return cls(json.loads(path.read_text()))

    @property
    def cases(self) -> list[tuple[int, str]]:
        """(steps, wants) that were timed, in order."""
        return sorted(
            {(steps, wants) for steps, wants, _ in self._times}, key=lambda c: (c[1] != "all", c[0])
        )

    def methods(self, steps: int, wants: str) -> list[str]:
        """The methods timed there, in the order they were added."""
        return [m for s, w, m in self._times if (s, w) == (steps, wants) and m != "forward"]

    def repeats(self, steps: int, wants: str, method: str) -> list[dict[str, Any]]:
        """All timed runs of a method."""
        return list(self._times.get((steps, wants, method), {}).values())

    def seconds(self, steps: int, wants: str, method: str) -> float | None:
        """Median seconds."""
        found = [c["seconds"] for c in self.repeats(steps, wants, method)]
        return median(found) if found else None

    def ratio(self, steps: int, wants: str, method: str, to: str) -> float | None:
        """Median over the repeats of the ratio within one repeat, where both ran within seconds of each
        other: a machine that slows down for a minute slows both."""
        ours, theirs = (self._times.get((steps, wants, m), {}) for m in (method, to))
        pairs = [ours[r]["seconds"] / theirs[r]["seconds"] for r in ours if r in theirs]
        return median(pairs) if pairs else None

    def peak(self, steps: int, wants: str, method: str) -> int | None:
        """Peak bytes of live tensors beside the weights."""
        cell = self._memory.get((steps, wants, method))
        return cell["peak_bytes"] if cell else None

    def budget(self, steps: int, wants: str, method: str) -> int | None:
        """The budget a rung of the ladder was given."""
        cell = self._memory.get((steps, wants, method))
        return cell.get("budget_bytes") if cell else None

    def steps_with_peak(self, wants: str, method: str) -> list[int]:
        """For which numbers of steps the memory of a method was measured."""
        return sorted(s for s, w, m in self._memory if (w, m) == (wants, method))
