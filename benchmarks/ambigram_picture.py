"""Draws the README's picture from a run of ambigrams: before, after, and after turned by 180 degrees.

python -m benchmarks.ambigram_picture runs/ambigrams                 # the seed with the lowest loss
python -m benchmarks.ambigram_picture runs/ambigrams --seed 7 --out docs/images/ambigram.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

import backdrift as bd

HEIGHT, GAP = 240, 20  # pixels
DEFAULT = Path("docs/images/ambigram.png")


def panels(run: bd.Run, index: int) -> list[Any]:
    """Three PIL images of the run's picture ``index``; the one before is cut from the record's row."""
    after = run.best.pil[index]
    with Image.open(run.folder / run.record["pictures"]["before"]["path"]) as row:
        step = (row.width - after.width * len(run.record["prompt"])) // max(len(run.record["prompt"]) - 1, 1)
        left = index * (after.width + step)
        before = row.convert("RGB").crop((left, 0, left + after.width, after.height))
    return [before, after, after.transpose(Image.Transpose.ROTATE_180)]


def draw(run: bd.Run, index: int) -> Any:
    """The panels side by side, enlarged to 240 pixels of height, on white."""
    parts = [
        p.resize((HEIGHT * p.width // p.height, HEIGHT), Image.Resampling.BICUBIC) for p in panels(run, index)
    ]
    whole = Image.new("RGB", (sum(p.width for p in parts) + GAP * (len(parts) - 1), HEIGHT), "white")
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width + GAP
    return whole


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of ambigrams.")],
    seed: Annotated[
        int | None, typer.Option(help="Which of its seeds; default that of the lowest loss.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture's file.")] = DEFAULT,
) -> None:
    """Draw one ambigram of a run: before, after, and after upside-down."""
    run = bd.Run.load(folder)
    seeds, best = run.record["settings"]["seeds"], run.record["best"]
    losses = [entry["loss"] for entry in best.get("per_sample", [best])]
    if seed is not None and seed not in seeds:
        raise typer.BadParameter(f"--seed {seed}: the run has {seeds}")
    draw(run, losses.index(min(losses)) if seed is None else seeds.index(seed)).save(out)
    typer.echo(str(out))


if __name__ == "__main__":
    typer.run(main)
