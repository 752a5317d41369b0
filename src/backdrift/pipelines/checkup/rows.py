"""What an examination says: rows with a status, and the table that they make."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import InputError
from ...suggest import closest

__all__ = ["Checkup", "Row", "Status"]

Status = Literal["ok", "handled", "refused", "warning", "failed", "skipped"]

#: What each status means.
MEANING: dict[Status, str] = {
    "ok": "nothing to do",
    "handled": "in the way of gradients by hand; differentiable() takes care of it",
    "refused": "differentiable() raises an error before anything is sampled",
    "warning": "works, but look at it",
    "failed": "measured, and wrong",
    "skipped": "could not be examined",
}


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        status: see :data:`MEANING`.
        topic: the part of the table: ``"pipeline"``, ``"set-up"``, ``"gradient"`` or ``"memory and time"``.
        title: what was looked at; no other row has the same.
        found: what was found.
        advice: what to do; "" where there is nothing to do.
        figures: what was measured, as plain numbers: bytes, seconds, relative differences.
    """

    status: Status
    topic: str
    title: str
    found: str
    advice: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return {
            "status": self.status,
            "topic": self.topic,
            "title": self.title,
            "found": self.found,
            "advice": self.advice,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class Checkup(Sequence[Row]):
    """What :func:`backdrift.doctor` found, row by row. ``print(checkup)`` is a table.

    Rows are found by place or by title: ``checkup["scheduler"]``.

    Attributes:
        pipeline: name of the pipeline's class.
        rows: in the order in which they were examined.
    """

    pipeline: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Nothing is refused, and nothing that was measured is wrong."""
        return not self.refused and not self.failed

    @property
    def refused(self) -> tuple[Row, ...]:
        """What has to be changed before ``differentiable`` runs."""
        return self.of("refused")

    @property
    def failed(self) -> tuple[Row, ...]:
        """What was measured and is wrong."""
        return self.of("failed")

    def of(self, status: Status) -> tuple[Row, ...]:
        """The rows of one status."""
        return tuple(row for row in self.rows if row.status == status)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __contains__(self, item: object) -> bool:
        return item in self.rows or any(row.title == item for row in self.rows)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.rows[key]
        for row in self.rows:
            if row.title == key:
                return row
        titles = [row.title for row in self.rows]
        raise InputError(f"no row is called {key!r}.{closest(key, titles)} There are: {', '.join(titles)}")

    @property
    def summary(self) -> str:
        """One line: how many rows of which status."""
        counts = [(status, len(self.of(status))) for status in MEANING]
        told = ", ".join(f"{n} {status}" for status, n in counts if n)
        if self.failed:
            verdict = "do not trust these gradients"
        elif self.refused:
            verdict = "not differentiable as it is set up; the rows marked refused say what to change"
        elif any(row.topic == "gradient" and row.status == "ok" for row in self.rows):
            verdict = "ready for gradients"
        else:
            verdict = "nothing stands in the way, but no gradient was measured"
        return f"{self.pipeline}: {verdict} ({told})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for a file."""
        rows = [row.to_dict() for row in self.rows]
        return {"pipeline": self.pipeline, "ok": self.ok, "summary": self.summary, "rows": rows}

    def table(self, width: int = 110) -> str:
        """The rows as text, no line longer than ``width`` characters (at least 60)."""
        title = min(28, max((len(row.title) for row in self.rows), default=0))
        rest = max(60, width) - 8 - 2 - title - 2
        lines, topic = [], ""
        for row in self.rows:
            if row.topic != topic:
                topic = row.topic
                lines += ["", topic.upper()]
            names = textwrap.wrap(row.title, title)
            text = textwrap.wrap(row.found, rest, break_on_hyphens=False)
            if row.advice:
                text += textwrap.wrap(
                    row.advice, rest, initial_indent="→ ", subsequent_indent="  ", break_on_hyphens=False
                )
            for i in range(max(len(names), len(text), 1)):
                status = row.status if i == 0 else ""
                name, said = (part[i] if i < len(part) else "" for part in (names, text))
                lines.append(f"{status:<8}  {name:<{title}}  {said}".rstrip())
        return "\n".join([self.summary, *lines])

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__
