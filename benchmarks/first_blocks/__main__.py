"""Run the thirty blocks, each with one line and with the fifteen lines; write what became of them.

    python -m benchmarks.first_blocks                          # all: some minutes on one core
    python -m benchmarks.first_blocks flux_dev wan             # some
    python -m benchmarks.first_blocks --steps 3 --out runs/blocks.json

Results go to ``results/first-blocks.json``, after every block; what it holds is run again only with ``--fresh``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..measure import machine
from ..record import Record
from .listed import BLOCKS, Block
from .models import device
from .summary import figures, rows
from .verified import Judge
from .ways import ONE_LINE

RESULTS = Path(__file__).parents[1] / "results"


def measure(block: Block, steps: int | None) -> dict[str, object]:
    """What became of one block."""
    start = time.perf_counter()
    judge = Judge(block, steps)
    truth = judge.truth()
    cell: dict[str, object] = {
        "block": block.name,
        "page": block.page,
        "line": ONE_LINE,
        "lines_added": 1,
        "steps": steps,
        "truth": None if truth is None else {"by": truth.by, "slopes": truth.slopes},
        "backdrift": judge.backdrift(truth).as_dict(),
        "fifteen": judge.fifteen(truth).as_dict(),
    }
    if judge.failures:
        cell["failures"] = judge.failures
    return cell | {"seconds": round(time.perf_counter() - start, 1)}


def main(arguments: list[str]) -> int:
    """Measure what is missing; exit status 1 if a block with its one line has no verified gradient."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_blocks")
    parser.add_argument("blocks", nargs="*", metavar="BLOCK", help="names; by default all")
    parser.add_argument("--steps", type=int, default=None, help="sampling steps in place of the blocks' own")
    parser.add_argument("--fresh", action="store_true", help="run again what the results hold")
    parser.add_argument("--out", type=Path, default=RESULTS / "first-blocks.json")
    chosen = parser.parse_args(arguments)
    known = {block.name: block for block in BLOCKS}
    unknown = set(chosen.blocks) - set(known)
    if unknown:
        parser.error(f"no block {min(unknown)!r}; there are: {', '.join(known)}")
    _quiet()
    record = Record(chosen.out, machine(torch.device(device)), {"blocks": len(BLOCKS)}, "blocks")
    console = Console()
    for name in chosen.blocks or known:
        old = record.find("blocks", block=name)
        if old and not chosen.fresh and old[0]["steps"] == chosen.steps:
            continue
        cell = measure(known[name], chosen.steps)
        record.replace("blocks", {"block": name}, cell)
        record.data["blocks"].sort(key=lambda c: list(known).index(c["block"]))
        record.note("figures", figures(record.data["blocks"]))
        ours, theirs = cell["backdrift"]["status"], cell["fifteen"]["status"]  # type: ignore[index]
        console.print(f"{name}: {ours}; fifteen lines: {theirs} ({cell['seconds']} s)")
    table = Table("block", "backdrift", "fifteen lines", title=f"One line: {ONE_LINE}")
    for row in rows(record.data["blocks"]):
        table.add_row(*row)
    console.print(table)
    for what, value in record.data.get("figures", []):
        console.print(f"{what}: {value}")
    return int(any(c["backdrift"]["status"] != "verified" for c in record.data["blocks"]))


def _quiet() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
