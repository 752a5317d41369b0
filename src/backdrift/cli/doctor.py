"""``backdrift doctor``: whether a model's gradients are right, what they cost, and what stands in their way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import typer
from pydantic import Field

from ..errors import InputError
from .command import command
from .config import Settings
from .errors import BAD_INPUT, FAILED
from .fields import Strings
from .folders import check_writable
from .pipeline import open_pipeline

_COLOURS = {
    "ok": "green",
    "handled": "cyan",
    "refused": "bold red",
    "warning": "yellow",
    "failed": "bold red",
    "skipped": "dim",
}


class DoctorSettings(Settings):
    """Settings of ``doctor``."""

    panel: ClassVar[str] = "Options"

    model: str = Field(
        description="Built-in pipeline (sd, flow), a folder, a hub id that is on this machine, or a .safetensors file.",
        json_schema_extra={"argument": True, "complete": ["sd", "flow"]},
    )  # fmt: skip
    train: Strings = Field(
        [], description="Weights that get gradients: lora, a component, a pattern; repeatable."
    )
    size: int | None = Field(
        None, gt=0, description="Height and width of the small call in pixels.",
        json_schema_extra={"default": "the smallest that works"},
    )  # fmt: skip
    steps: int | None = Field(
        None, ge=1, description="Steps of the small call.", json_schema_extra={"default": "2"}
    )
    prompt: str | None = Field(None, description="Text of the small call.")
    directions: int = Field(
        2, ge=0, description="Random directions for finite differences; 0 leaves them out."
    )
    json_file: Path | None = Field(
        None,
        description="Also write everything to this file.",
        json_schema_extra={"flag": "--json", "metavar": "FILE"},
    )


def doctor(settings: DoctorSettings) -> None:
    """Examine a model: what stands in the way of gradients, whether they are right, and what they cost.

    Nothing is downloaded. Exits with 1 if a gradient is wrong, with 2 if something is refused.
    """
    from rich.console import Console

    from ..pipelines.doctor import doctor as examine

    if settings.json_file is not None:
        _check_file(settings.json_file)
    pipe = open_pipeline(settings, local_files_only=True)
    console = Console(stderr=True)
    with console.status("looking at the pipeline") as status:
        checkup = examine(
            pipe,
            train=settings.train or None,
            height=settings.size,
            width=settings.size,
            num_inference_steps=settings.steps,
            directions=settings.directions,
            seed=settings.seed,
            progress=status.update,
            **({} if settings.prompt is None else {"prompt": settings.prompt}),
        )
    if settings.json_file is not None:
        settings.json_file.write_text(json.dumps(checkup.to_dict(), indent=2) + "\n", encoding="utf-8")
    _print(checkup)
    if not checkup.ok:
        raise typer.Exit(FAILED if checkup.failed else BAD_INPUT)


def _check_file(file: Path) -> None:
    """A file that cannot be written is refused before anything is measured."""
    if file.is_dir() or not file.parent.is_dir():
        why = "is a folder" if file.is_dir() else f"is to lie in {str(file.parent)!r}, which is no folder"
        raise InputError(f"--json {str(file)!r} {why}; give the name of a file in a folder that is there.")
    check_writable(file.parent, "--json, in the folder")


def _print(checkup: Any) -> None:
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    titles = min(28, max(len(row.title) for row in checkup))
    for topic, rows in groupby(checkup, key=lambda row: row.topic):
        console.print(Text(f"\n{topic.upper()}", style="bold"))
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(width=max(map(len, _COLOURS)))
        table.add_column(width=titles, overflow="fold")
        table.add_column(overflow="fold")
        for row in rows:
            told = Text(row.found)
            if row.advice:
                pressing = row.status in ("refused", "failed", "warning")
                told.append(f"\n→ {row.advice}", style="" if pressing else "dim")
            table.add_row(Text(row.status, style=_COLOURS[row.status]), Text(row.title), told)
        console.print(table)
    console.print(Text(f"\n{checkup.summary}", style=f"bold {'green' if checkup.ok else 'red'}"))


def add_to(app: typer.Typer) -> None:
    command(
        app, DoctorSettings,
        "backdrift doctor sd",
        "backdrift doctor path/to/pipeline --dtype bfloat16 --train lora --json checkup.json",
    )(doctor)  # fmt: skip
