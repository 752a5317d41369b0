"""Progress with the loss and the time that remains: a bar in a terminal, now and then a line in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Show = Callable[[int, dict[str, Any]], None]
LINES = 10  # at most so many, and one more, where there is no terminal


@contextmanager
def progress_bar(total: int, shown: bool = True, name: str = "") -> Iterator[Show]:
    """A bar over ``total`` steps; yields ``show(done, entry)``, where ``entry`` has at least ``loss``.

    Args:
        shown: whether anything is shown at all.
        name: of what is going on, shown before the loss.
    """
    if not shown:
        yield lambda done, entry: None
        return
    from rich import get_console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console, before = get_console(), f"{name}: " if name else ""
    if not (console.is_terminal or console.is_jupyter):
        yield _lines(total, before)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    before = escape(before)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{before}loss …", total=total)

        def show(done: int, entry: dict[str, Any]) -> None:
            bar.update(task, completed=done, description=f"{before}loss {entry['loss']:.4g}")

        yield show


def _lines(total: int, before: str) -> Show:
    """Whole lines for files and pipes: after the first step and each time that a tenth of them is over."""
    began, said = time.monotonic(), -1

    def show(done: int, entry: dict[str, Any]) -> None:
        nonlocal said
        part = LINES * done // max(total, 1)
        if part == said:
            return
        said, passed = part, time.monotonic() - began
        print(f"{before}loss {entry['loss']:.4g}, {done} of {total}, after {passed:.0f} s", flush=True)

    return show
