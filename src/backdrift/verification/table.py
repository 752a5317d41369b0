"""A certificate's record as tables for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

from ..report.certificate import cells, errors_by_steps, headings, summary

_COLOURS = {"exact": "green", "within": "green", "off": "yellow", "failed": "bold red", "refused": "dim"}
#: Columns left out where the terminal is narrower than that many characters.
_NARROW = ((118, ("cos", "growth")), (94, ("VJPs",)), (88, ("diff.",)))


class Tables:
    """A record to be printed by rich: the rows at the steps asked about, the errors at all steps, and what follows."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield self._asked(options.max_width)
        yield Text()
        if len({row["steps"] for row in self.record["rows"]}) > 1:
            yield self._by_steps()
            yield Text()
        for line in summary(self.record):
            yield Text(line)

    def _asked(self, width: int) -> Any:
        from rich.text import Text

        left_out = {name for least, names in _NARROW if width < least for name in names}
        names = [name for name, _ in headings()]
        shown = [i for i, name in enumerate(names) if name not in left_out]
        steps = self.record["settings"]["steps"][-1]
        table = _table(f"{steps} steps", [names[i] for i in shown])
        for row in self.record["rows"]:
            if row["asked"]:
                texts = cells(row, self.record)
                styles = ["" for _ in texts[:-1]] + [_COLOURS.get(texts[-1], "")]
                table.add_row(*(Text(texts[i], style=styles[i]) for i in shown))
        return table

    def _by_steps(self) -> Any:
        from rich.text import Text

        names, rows = errors_by_steps(self.record)
        table = _table("Relative errors at fewer steps", names)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


def as_text(record: Mapping[str, Any], width: int = 140) -> str:
    """The same as plain text."""
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, highlight=False).print(Tables(record))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _table(title: str, names: list[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table
