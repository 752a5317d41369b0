"""backdrift beside its peers, on the same work.

    python -m benchmarks.peers errors            # error against calls and products: mixture and SDE; nothing is timed
    python -m benchmarks.peers errors digits     # the same on the pixel model of digits
    python -m benchmarks.peers memory            # peak memory of the line-up: mixture, digits, UNet; nothing is timed
    python -m benchmarks.peers timed             # time of the line-up; wants a machine that does nothing else
    python -m benchmarks.peers timed small       # … on a tiny UNet, to see that it runs
    python -m benchmarks.peers page              # print the page's tables; --write writes them, with plots

Results go to ``benchmarks/results/peers-<problem>.json`` (errors, memory) and ``peers-time-<problem>.json``. The
same command started again goes on where it was stopped. Peers come with ``pip install "backdrift[peers]"``; those that
are missing are left out, and said so.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..marked import rewritten
from ..measure import MALLOC, machine
from ..record import Record
from .bench import CPU, KINDS, Bench
from .lineup import NEEDS, missing

RESULTS = Path(__file__).parent.parent / "results"
PAGE = Path(__file__).parent.parent.parent / "docs" / "peers.md"

app = typer.Typer(add_completion=False, help="backdrift beside its peers, on the same work.")
Only = Annotated[list[str] | None, typer.Option("--only", help="Part of a method's key; may be repeated.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


def versions() -> dict[str, Any]:
    """What the figures depend on where nothing is timed."""
    from importlib.metadata import version

    absent = missing()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in NEEDS if package not in absent},
    }


def record_of(problem: str, folder: Path) -> Record:
    """The record of what is not timed."""
    return Record(folder / f"peers-{problem}.json", versions(), {"problem": problem}, *KINDS)


def _say_missing() -> None:
    for package in missing():
        print(f'{package} is not installed and left out: pip install "backdrift[peers]"', file=sys.stderr)


@app.command()
def errors(
    problems: Annotated[list[str] | None, typer.Argument(help="mixture, sde, digits.")] = None,
    only: Only = None,
    out: Out = RESULTS,
) -> None:
    """Errors, calls and products of every method in every setting."""
    _say_missing()
    for problem in problems or ["mixture", "sde"]:
        Bench(problem, record_of(problem, out), only or ()).errors()


@app.command()
def memory(
    problems: Annotated[list[str] | None, typer.Argument(help="mixture, digits, unet, small.")] = None,
    only: Only = None,
    out: Out = RESULTS,
) -> None:
    """Peak memory of the line-up: live tensors beside the weights."""
    _say_missing()
    for problem in problems or ["mixture", "digits", "unet"]:
        Bench(problem, record_of(problem, out), only or ()).memory()


@app.command()
def timed(
    problems: Annotated[list[str] | None, typer.Argument(help="unet, mixture, digits, small.")] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.")] = 9,
    only: Only = None,
    out: Out = RESULTS,
) -> None:
    """Time of the line-up."""
    _say_missing()
    if not MALLOC.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MALLOC})
    for problem in problems or ["unet", "mixture", "digits"]:
        about = machine(CPU) | versions()
        record = Record(out / f"peers-time-{problem}.json", about, {"problem": problem}, *KINDS)
        Bench(problem, record, only or ()).times(repeats)


@app.command()
def page(
    write: Annotated[bool, typer.Option("--write", help="Into docs/peers.md, with plots.")] = False,
    out: Out = RESULTS,
) -> None:
    """The page's tables, from the results."""
    from .page import blocks, plots

    if write:
        PAGE.write_text(rewritten(PAGE.read_text(), blocks(out)))
        plots(out, PAGE.parent / "images")
    else:
        print("\n".join(f"{name}\n\n{text}" for name, text in blocks(out).items()))


if __name__ == "__main__":
    app()
