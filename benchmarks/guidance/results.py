"""Results files: measurements under keys, rewritten whole after each, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .setting import STEPS

Cell = dict[str, Any]
Key = dict[str, Any]


def results_file(folder: Path, name: str, steps: int = STEPS) -> Path:
    """Where results are kept: runs of an unusual number of steps have a file of their own."""
    return folder / (f"guidance-{name}.json" if steps == STEPS else f"guidance-{name}-{steps}.json")


class Results:
    """The measurements of one file.

    Args:
        path: the file; read if it exists.
        machine, settings: what the figures depend on.

    Raises:
        SystemExit: the file holds figures of another machine or other settings.
    """

    def __init__(self, path: Path, machine: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": machine, "settings": settings, "cells": []}
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
                    f"{path.name} was measured with other {', '.join(differing)}: delete it to measure anew, or give "
                    "--folder for others"
                )
            self.data = old
        self._found = {_text(cell["key"]): cell for cell in self.data["cells"]}

    def find(self, key: Key) -> Cell | None:
        """The measurement under that key."""
        return self._found.get(_text(key))

    def ensure(self, key: Key, measure: Callable[[], Cell]) -> Cell:
        """The measurement under that key, made now if there is none."""
        found = self.find(key)
        if found is None:
            found = {"key": key, **measure()}
            self.data["cells"].append(found)
            self._found[_text(key)] = found
            self.save()
        return found

    def note(self, name: str, value: Any) -> None:
        """Set an entry beside the measurements."""
        if self.data.get(name) != value:
            self.data[name] = value
            self.save()

    def save(self) -> None:
        """Write the file, a measurement on a line; a kill in between leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = [
            f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}"
            for k, v in self.data.items()
            if k != "cells"
        ]
        cells = ",\n".join(json.dumps(cell, ensure_ascii=False) for cell in self.data["cells"])
        fresh = self.path.with_suffix(".part")
        fresh.write_text("{" + ",\n".join([*parts, f'"cells": [\n{cells}\n]']) + "}\n")
        os.replace(fresh, self.path)


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
