"""The results file: one JSON, rewritten after every cell, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


class Results:
    """The measured cells and floors.

    Args:
        path: the file; read if it exists.
        machine, settings: what the figures depend on.

    Raises:
        SystemExit: the file holds figures of another machine or other settings.
    """

    def __init__(self, path: Path, machine: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": machine, "settings": settings, "floors": {}, "cells": []}
        if path.exists():
            old = json.loads(path.read_text())
            differing = [
                key
                for part in ("machine", "settings")
                for key in self.data[part] | old[part]
                if self.data[part].get(key) != old[part].get(key)
            ]
            if differing:
                raise SystemExit(
                    f"{path.name} was measured with other {', '.join(differing)}: add --fresh to replace it, or --out "
                    "for another file"
                )
            self.data = old

    def cell(self, method: str, grid: str, target: int) -> Cell | None:
        """The cell, if it has been measured."""
        wanted = (method, grid, target)
        return next((c for c in self.data["cells"] if (c["method"], c["grid"], c["target"]) == wanted), None)

    def ensure(self, method: str, grid: str, target: int, measure: Callable[[], Cell]) -> Cell:
        """The cell, measured now if it has not been."""
        found = self.cell(method, grid, target)
        if found is None:
            found = measure()
            self.data["cells"].append(found)
            self.save()
        return found

    def save(self) -> None:
        """Write the file; a kill in between leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
        os.replace(fresh, self.path)
