"""What is being measured, and how long it may still take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def announced(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar over about ``total`` parts, on stderr; yields a function to be told of each part when it begins.

    Where stderr is no terminal, each part is a line.
    """
    if not shown:
        yield lambda part: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console, done = Console(stderr=True), -1
    if not (console.is_terminal or console.is_jupyter):

        def tell(part: str) -> None:
            nonlocal done
            done += 1
            print(f"{min(done + 1, total)} of {total}: {part}", file=console.file, flush=True)

        yield tell
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("…", total=total)

        def say(part: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=min(done, total), description=part)

        yield say
