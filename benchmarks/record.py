"""The results file: one JSON, rewritten whole after every measurement, so that a run can be taken up again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any


class Record:
    """Measurements by (steps, wants, method).

    Args:
        path: the file; read if it exists.
        machine, settings: what the figures depend on.

    Raises:
        SystemExit: the file holds figures of another machine or other settings.
    """

    def __init__(self, path: Path, machine: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": machine, "settings": settings, "memory": [], "times": []}
        if path.exists():
            old = json.loads(path.read_text())
            for part in ("machine", "settings"):
                differing = {k for k, v in self.data[part].items() if old[part].get(k) != v}
                if differing:
                    raise SystemExit(
                        f"{path.name} holds figures of another {part[:7]} ({', '.join(sorted(differing))} differ): "
                        "add --fresh to replace it, or --out for another file"
                    )
            self.data = old

    def add(self, kind: str, **cell: Any) -> None:
        """Append a measurement (``kind`` is ``"memory"`` or ``"times"``) and save."""
        self.data[kind].append(cell)
        self.save()

    def find(self, kind: str, **keys: Any) -> list[dict[str, Any]]:
        """The measurements with these values."""
        return [c for c in self.data[kind] if all(c.get(k) == v for k, v in keys.items())]

    def save(self) -> None:
        """Write the file; a kill in between leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(fresh, self.path)


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
