"""What the commands that write a run say at its end."""

from __future__ import annotations

from typing import Any

from .config import Settings, dump


def finish(run: Any, settings: Settings, command: str) -> None:
    """Leave the settings beside the record, draw the page with them, and say what came out."""
    from rich.console import Console

    from ..report import write
    from ..report.again import CONFIG
    from ..report.figures import change, number, seconds

    dump(settings, run.folder / CONFIG, command)
    page = write(run.folder, blur_flagged=not getattr(settings, "show_flagged", False))
    record = run.record
    console = Console(highlight=False, soft_wrap=True)
    best = record["best"]
    if best is not None and record["iterations"]:
        first = record["iterations"][0]["loss"]
        fall = change(first, best["loss"])
        console.print(
            f"loss {number(first)} → [bold]{number(best['loss'])}[/bold]{f' ({fall})' if fall else ''} "
            f"at iteration {best['iteration']}, {seconds(record['stats'].get('seconds'))}"
        )
    if record["message"]:
        console.print(f"{record['status']}: {record['message']}", markup=False)
    if any(picture.get("flagged") for picture in record["pictures"].values()):
        console.print("The safety checker flagged pictures; --show-flagged shows them on the page.")
    for name, entry in record["files"].items():
        console.print(f"{name}: {run.folder / entry['path']}", markup=False)
    console.print(f"report: {page}", markup=False)
