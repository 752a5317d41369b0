"""How well the first applications do on the built-in pipeline.

    python -m benchmarks.applications all            # everything below; goes on where it was killed
    python -m benchmarks.applications ambigrams      # 20 seeds, beside one-step guidance with as many network calls
    python -m benchmarks.applications inversion

Results go to ``results/ambigrams.json`` and ``results/inversion-<slots>.json``, the runs to a folder named after
the pipeline's weights: with other weights everything is done anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

import backdrift as bd
from backdrift.descent.subject import describe_pipeline

from . import ambigrams as ambigram_runs
from . import inversion as inversion_runs

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/applications")

app = typer.Typer(add_completion=False)


def opened() -> tuple[Any, Path]:
    """The built-in pipeline, and the folder of its runs."""
    pipe = bd.load()
    folder = RUNS / describe_pipeline(pipe)["weights"]
    folder.mkdir(parents=True, exist_ok=True)
    return pipe, folder


def write(name: str, data: dict[str, Any]) -> None:
    """Put the results beside the others, and print them."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    for what, value in data["figures"]:
        print(f"{what}: {value}", flush=True)


@app.command()
def ambigrams() -> None:
    """Settle pair and settings on six seeds, then count the successes on twenty others."""
    pipe, folder = opened()
    write("ambigrams", ambigram_runs.measure(pipe, ambigram_runs.tune(pipe, folder), folder))


@app.command()
def inversion() -> None:
    """Learn each effect from eight pairs with either kind of slots, then try it on 20 unseen (noise, prompt) pairs."""
    pipe, folder = opened()
    for slots in inversion_runs.HOW:
        write(f"inversion-{slots}", inversion_runs.measure(pipe, slots, folder))


@app.command("all")
def everything() -> None:
    """Ambigrams and inversion."""
    inversion()
    ambigrams()


if __name__ == "__main__":
    app()
