"""Progress bars with the loss and the time that remains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, shown: bool = True) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """A bar over ``total`` steps; yields ``show(done, entry)``, where ``entry`` has at least ``loss``."""
    if not shown:
        yield lambda done, entry: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("loss …", total=total)

        def show(done: int, entry: dict[str, Any]) -> None:
            bar.update(task, completed=done, description=f"loss {entry['loss']:.4g}")

        yield show
