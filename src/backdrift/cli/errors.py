"""The one place where an error becomes a message and an exit code.

=====  =====================================================================================
0      done
1      the job failed: a loss or a gradient was not finite, memory or disk ran out, or a bug
2      bad input: an option, a file, a size, a prompt, a budget, a loss that cannot be used
130    interrupted (Ctrl-C)
=====  =====================================================================================

Set ``BACKDRIFT_TRACEBACK=1`` to see where an error came from.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import BackdriftError, NonFiniteError, StateChangedError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@contextmanager
def reported() -> Iterator[None]:
    """Turn what is raised inside into one message on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _say("Interrupted. A run that has begun is continued by the same command.")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("BACKDRIFT_TRACEBACK"):
            traceback.print_exc()
        message, code = explain(error)
        _say(f"Error: {message}")
        raise typer.Exit(code) from None


def explain(error: Exception) -> tuple[str, int]:
    """What to say about an error, and the exit code it ends with."""
    if isinstance(error, BackdriftError):
        failed = isinstance(error, NonFiniteError | StateChangedError)
        return str(error), FAILED if failed else BAD_INPUT
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            "Out of memory. Use less --memory (the least is --memory min), smaller pictures or fewer at a time.",
            FAILED,
        )
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, OSError):
        return f"{line or type(error).__name__}", FAILED
    return (
        f"{type(error).__name__}: {line}\nThis is not an error that backdrift knows. "
        "Set BACKDRIFT_TRACEBACK=1 to see where it comes from.",
        FAILED,
    )


def _say(message: str) -> None:
    sys.stdout.flush()
    colour = typer.colors.RED if message.startswith("Error") else typer.colors.YELLOW
    typer.echo(message if os.environ.get("NO_COLOR") else typer.style(message, fg=colour), err=True)
