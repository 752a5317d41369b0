"""AdjointDPM's Table 1 on real digits.

    python -m benchmarks.table1            # measure what is missing, print the tables, write JSON and plot
    python -m benchmarks.table1 --write    # and put the tables into docs/table1.md

Results go to ``benchmarks/results/table1.json`` and ``table1.png``. One core; a stopped run goes on where it was. On
one machine every figure is the same, bit for bit, whenever it is measured.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..measure import MALLOC, machine
from ..record import Record
from . import page
from .measure import FINE_STEPS, Problem
from .methods import GRIDS, METHODS, TARGETS

RESULTS = Path(__file__).parents[1] / "results" / "table1.json"
MACHINE = ("processor", "threads", "python", "torch")


def run(problem: Problem, path: Path) -> Record:
    """Measure every cell that ``path`` does not have."""
    about = machine(torch.device("cpu"))
    record = Record(path, {key: about[key] for key in MACHINE}, problem.settings, "cells")
    if not record.data.get("floors"):
        record.note("floors", problem.floors())
    for method in METHODS:
        for grid in GRIDS:
            for target in TARGETS:
                keys = {"method": method.name, "grid": grid, "target": target}
                new = not record.find("cells", **keys)
                cell = record.ensure("cells", keys, lambda m=method, g=grid, n=target: problem.cell(m, g, n))
                if new:
                    shown = ", ".join(f"{k} {page.number(cell[k])}" for k in ("classifier", "pixels", "rms"))
                    print(f"{method.name}, {grid}, {cell['calls']} calls: {shown}", flush=True)
    names = [method.name for method in METHODS]
    record.data["cells"].sort(key=lambda c: (names.index(c["method"]), GRIDS.index(c["grid"]), c["target"]))
    record.save()
    return record


def main(
    samples: Annotated[int, typer.Option(help="How many samples each cell draws.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the noises.")] = 0,
    fine_steps: Annotated[int, typer.Option(help="Steps of what stands for the exact flow.")] = FINE_STEPS,
    out: Annotated[Path, typer.Option(help="The results file.")] = RESULTS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything anew.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the tables into docs/table1.md.")] = False,
) -> None:
    """Measure, print and plot."""
    torch.set_num_threads(1)
    if fresh:
        out.unlink(missing_ok=True)
    data = run(Problem(samples, seed, fine_steps), out).data
    page.plot(data, out.with_suffix(".png"))
    print(page.block(data))
    if write:
        page.PAGE.write_text(page.written(page.PAGE.read_text(), data))


if __name__ == "__main__":
    if not MALLOC.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.table1", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MALLOC})
    typer.run(main)
