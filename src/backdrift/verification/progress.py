"""What is being measured, and how long it may still take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def announced(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar over about ``total`` parts, on stderr; yields a function to be told of each part when it begins."""
    if not shown:
        yield lambda part: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, done = bar.add_task("…", total=total), -1

        def say(part: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=min(done, total), description=part)

        yield say
