"""A certificate's record as tables for the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..report.certificate import cells, headings, summary

_COLOURS = {"exact": "green", "within": "green", "off": "yellow", "failed": "bold red", "refused": "dim"}


def tables(record: Mapping[str, Any]) -> Any:
    """One rich table for the steps asked about, one for the others, what could not be measured, and what follows."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for title, rows in _groups(record):
        parts += [_table(title, rows, record), Text()]
    parts += [Text(line) for line in summary(record)]
    return Group(*parts)


def as_text(record: Mapping[str, Any], width: int = 140) -> str:
    """The same as plain text."""
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, highlight=False).print(tables(record))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _groups(record: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows of each number of steps, the one asked about last, where it is read."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault(row["steps"], []).append(row)
    return [(f"{steps} steps", rows) for steps, rows in found.items()]


def _table(title: str, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for i, (name, _) in enumerate(headings()):
        table.add_column(name, justify="left" if i < 1 else "right", overflow="fold")
    for row in rows:
        table.add_row(
            *(Text(cell) for cell in cells(row, record)[:-1]),
            Text(str(row["verdict"]), style=_COLOURS.get(str(row["verdict"]), "")),
        )
    return table
