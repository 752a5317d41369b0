"""The tables of Symplectic Adjoint Guidance, and what lies behind them.

    python -m benchmarks.guidance units               # unit times, on a machine that does nothing else
    python -m benchmarks.guidance run style           # a table: strengths settled, then all cells (aesthetic, object)
    python -m benchmarks.guidance ablate              # n, sub-grid, guided range, repeats
    python -m benchmarks.guidance step                # time, memory and exactness of one guided step
    python -m benchmarks.guidance estimates           # how good the n-step estimate is; where the loss saturates
    python -m benchmarks.guidance relative            # presets by relative strengths: docs/guidance-rules.md
    python -m benchmarks.guidance page --write        # docs/guidance-tables.md and the pictures, from the results

Results go to ``benchmarks/results/guidance-*.json``; a stopped run goes on where it was.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..marked import rewritten
from ..measure import MALLOC, machine
from . import estimates as quality
from . import guided_step, page, plan, relative
from . import units as timing
from .bench import Bench
from .costs import Units
from .results import Results, results_file
from .setting import STEPS, Case, Setting
from .tasks import STYLE, TASKS, Task

FOLDER = Path(__file__).parents[1] / "results"
PICTURES = Path("runs") / "guidance-benchmark"
MACHINE = ("processor", "threads", "python", "torch", "diffusers")
STEP_CASE = Case("skimage/coffee", "a red seven on white", 7000)

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
Folder = Annotated[Path, typer.Option(help="Where the results are.")]


def results(folder: Path, name: str, setting: Setting) -> Results:
    """A results file of this machine and setting."""
    about = machine(torch.device("cpu"))
    path = results_file(folder, name, setting.steps)
    return Results(path, {key: about[key] for key in MACHINE}, setting.facts)


def known_units(folder: Path, task: Task) -> Units:
    """Of a task; the times of a batch do not depend on the number of steps.

    Raises:
        SystemExit: they have not been measured.
    """
    found = results(folder, "units", Setting())
    cell = found.find({"purpose": "plan", "task": task.name})
    if cell is None:
        raise SystemExit(f"no unit times yet: run python -m benchmarks.guidance units plan {task.name}")
    return timing.units(cell)


@app.command()
def units(
    purpose: Annotated[str, typer.Argument(help="plan: for what may be spent; report: for what is printed.")],
    names: list[str],
    repeats: int = 15,
    folder: Folder = FOLDER,
) -> None:
    """Unit times."""
    setting = Setting()
    found = results(folder, "units", setting)
    for name in names:
        case = TASKS[name].cases[0]
        cell = found.ensure(
            {"purpose": purpose, "task": name},
            lambda c=case, n=name: {"seconds": timing.measure(setting, TASKS[n], c, repeats)},
        )
        print(name, timing.units(cell))


@app.command()
def run(
    name: str,
    group: Annotated[list[str] | None, typer.Option(help="Only these groups of rows.")] = None,
    cases: Annotated[int | None, typer.Option(help="Only the first so many cases.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Only these methods, beside SAG.")] = None,
    steps: Annotated[
        int, typer.Option(help="Of a run; results of another number have a file of their own.")
    ] = STEPS,
    folder: Folder = FOLDER,
    pictures: Path = PICTURES,
) -> None:
    """One table."""
    setting, task = Setting(steps), TASKS[name]
    kept = pictures if steps == STEPS else pictures / f"{steps} steps"
    bench = Bench(task, setting, results(folder, name, setting), kept)
    plan.compare(bench, known_units(folder, task), group or (), cases, rule or ())


@app.command()
def ablate(
    kind: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    cases: int = 4,
    folder: Folder = FOLDER,
    pictures: Path = PICTURES,
) -> None:
    """Ablations for style; they read the strengths that ``run style`` has settled, and write a file of their own."""
    setting = Setting()
    bench = Bench(STYLE, setting, results(folder, "style", setting), pictures)
    plan.ablate(bench, known_units(folder, STYLE), cases, kind or ())


@app.command()
def step(repeats: int = 7, folder: Folder = FOLDER) -> None:
    """One guided step against n, early, in the middle and late."""
    setting = Setting()
    found = results(folder, "step", setting)
    for index in (15, 9, 20):
        many = repeats if index == 15 else 0  # neither time nor memory depends on the step
        found.ensure(
            {"case": STEP_CASE.key, "index": index},
            lambda i=index, m=many: {"cells": guided_step.measure(setting, STEP_CASE, i, m)},
        )


@app.command()
def estimates(folder: Folder = FOLDER) -> None:
    """How good the estimates are."""
    setting = Setting()
    found = results(folder, "estimates", setting)
    found.ensure({"saturation": "style"}, lambda: {"found": quality.saturation(STYLE, setting)})
    for case in plan.spread(STYLE.cases)[:2]:
        for index in (5, 9, 15, 20, 25):
            found.ensure(
                {"case": case.key, "index": index},
                lambda c=case, i=index: quality.along(STYLE, setting, c, i),
            )
            print(f"estimates: {case.reference}, step {index}", flush=True)


@app.command("relative")
def measure_relative(folder: Folder = FOLDER) -> None:
    """Presets with relative strengths; writes the table of docs/guidance-rules.md."""
    found = results(folder, "relative", relative.SETTING)
    relative.measure(found)
    text = relative.PAGE.read_text()
    relative.PAGE.write_text(rewritten(text, {"relative": relative.table(found.data["cells"])}))


@app.command("page")
def make_page(
    write: Annotated[bool, typer.Option("--write", help="Write page and pictures.")] = False,
    figures: Annotated[bool, typer.Option("--figures", help="And rows for the README's table.")] = False,
    folder: Folder = FOLDER,
    pictures: Path = PICTURES,
) -> None:
    """The page's tables."""
    if figures:
        results(folder, "style", Setting()).note("figures", page.figures(folder))
    if write:
        page.write(folder, pictures)
    else:
        for name, text in page.blocks(folder).items():
            print(f"== {name}\n{text}\n")


if __name__ == "__main__":
    if not MALLOC.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.guidance", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MALLOC})
    torch.set_num_threads(1)
    app()
