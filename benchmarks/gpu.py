"""What gradients through real architectures cost on a GPU: SD1.5, SDXL, SD3-medium and Flux-dev at their own sizes.

    python -m benchmarks.gpu --minutes 9                 # as many cells as fit; call it again, it goes on
    python -m benchmarks.gpu --models sdxl --list        # which cells, in which order, and what is known of them
    python -m benchmarks.gpu --device cpu --small        # narrow networks, 64 pixels: that it runs from end to end

A cell is one model, precision, wanted gradient, number of steps and method, measured once after a warm-up: time, the
most bytes of everything on the device at once (weights, a CLIP-ViT-L/14 loss network, activations, gradients), what the
planner expected, and whether the gradient is that of the group's first method. Results are saved after each cell
in ``results/gpu-<card>.json`` with a picture beside them; running out of memory is a result. A cell in which
the process died is not tried again (``--again`` does).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gpu_jobs import PEERS, Job, Setting, guarded, measured, release
from .gpu_summary import figures, table
from .record import Record

RESULTS = Path(__file__).parent / "results"
MODELS = ("sdxl", "sd15", "sd3-medium", "flux-dev")
_BUILDING = 20.0  # seconds to build a pipeline and warm it up, until it is known
_DEARER = 6.0  # a gradient against sampling, until it is known
_SLOWER = {("float32", "bfloat16"): 8.0}  # a dtype against another, until it is known
_FAMILY = ("forward", "min", "fifteen", "max", "auto", "plain", "blocks")


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    model: str
    dtype: str
    wants: str
    through: str
    steps: int
    method: str

    @property
    def setting(self) -> Setting:
        return Setting(self.model, self.dtype, self.wants)

    @property
    def group(self) -> tuple[Any, ...]:
        """Cells whose gradients are the same."""
        return (self.setting, self.through, self.steps)


def cells() -> list[Cell]:
    """All of them, the most telling first."""
    bf16, noise, lora = "bfloat16", "noise", "lora"
    last = "last 3"
    rows: list[tuple[str, str, str, str, int, tuple[str, ...]]] = [
        (
            "sdxl",
            bf16,
            noise,
            "all",
            30,
            ("forward", "12GiB", "min", "fifteen", "auto", "max", "8GiB offload"),
        ),
        ("sdxl", bf16, noise, "all", 10, ("forward", "plain", "max", "fifteen", "min", "auto", "blocks")),
        ("sdxl", bf16, noise, "all", 4, ("forward", "plain", "max", "fifteen", "min")),
        ("sd3-medium", bf16, lora, last, 30, ("16GiB", "max", "min")),
        ("sd3-medium", bf16, lora, "all", 30, ("forward", "min", "fifteen", "auto", "16GiB")),
        ("sd15", bf16, noise, "all", 30, _FAMILY),
        ("sd15", bf16, noise, "all", 10, _FAMILY),
        ("flux-dev", bf16, noise, "all", 4, ("forward", "min", "fifteen", "max", "auto", "plain")),
        ("flux-dev", bf16, noise, "all", 30, ("forward", "min", "fifteen", "auto")),
        ("sdxl", bf16, lora, last, 30, ("max", "min", "16GiB")),
        ("sdxl", bf16, lora, "all", 30, ("forward", "min", "fifteen", "auto")),
        ("sd3-medium", bf16, noise, "all", 30, ("forward", "min", "fifteen", "auto", "max")),
        ("sdxl", "float32", noise, "all", 10, ("forward", "min", "fifteen", "max", "auto")),
        ("flux-dev", bf16, lora, last, 30, ("min", "max")),
        ("sd15", bf16, lora, "all", 30, _FAMILY),
        ("sd15", "float32", noise, "all", 30, _FAMILY),
    ]
    done = {(model, dtype, wants, through, steps) for model, dtype, wants, through, steps, _ in rows}
    for steps in (50, 30, 10):  # what is left of the whole grid
        for model in MODELS:
            for dtype in (bf16, "float32"):
                for wants, through in ((noise, "all"), (lora, last), (lora, "all")):
                    if (model, dtype, wants, through, steps) not in done:
                        methods = (
                            ("min", "max")
                            if through != "all"
                            else ("forward", "min", "fifteen", "auto", "max")
                        )
                        rows.append((model, dtype, wants, through, steps, methods))
    return [
        Cell(model, dtype, wants, through, steps, method)
        for model, dtype, wants, through, steps, methods in rows
        for method in methods
    ]


class Bench:
    """Measures cells until the time is over.

    Args:
        record: where they go.
        device: of everything.
        small: narrow networks.
        until: ``time.monotonic()`` at which no further cell is begun.
        again: also measure cells that failed or died before.
    """

    def __init__(
        self, record: Record, device: torch.device, *, small: bool, until: float, again: bool
    ) -> None:
        self.record, self.device, self.small, self.until, self.again = record, device, small, until, again
        self._job: Job | None = None
        self._broken: dict[Setting, dict[str, Any]] = {}
        self._references: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        self._planned: dict[tuple[Any, ...], dict[str, Any]] = {}

    def run(self, chosen: list[Cell]) -> int:
        """Measure what is missing; how many cells are still missing."""
        missing = [cell for cell in chosen if self._missing(cell)]
        for i, cell in enumerate(missing):
            if time.monotonic() + self._expected(cell) > self.until:
                print(f"time is over: {len(missing) - i} cells to go; call again", flush=True)
                return len(missing) - i
            self._measure(cell)
        return 0

    def _missing(self, cell: Cell) -> bool:
        old = self.record.find("cells", **asdict(cell))
        return not old or (self.again and old[0]["status"] != "done")

    def _expected(self, cell: Cell) -> float:
        """A guess at the seconds of a cell, from the slowest like it so far (and what building takes)."""
        known, times = self.record.find("cells", model=cell.model, dtype=cell.dtype, status="done"), 1.0
        for (dtype, other), slower in _SLOWER.items():
            if not known and cell.dtype == dtype:
                known, times = self.record.find("cells", model=cell.model, dtype=other, status="done"), slower
        forward, gradient = (
            [
                times * c["whole_seconds"] * cell.steps / c["steps"]
                for c in known
                if (c["method"] == "forward") is kind
            ]
            for kind in (True, False)
        )
        ready = self.small or (self._job is not None and self._job.setting == cell.setting)
        building = 0.0 if ready else _BUILDING
        if cell.method == "forward":
            return building + max(forward, default=0.0)
        return building + max(gradient, default=_DEARER * max(forward, default=0.0))

    def _measure(self, cell: Cell) -> None:
        key = asdict(cell)
        self._save(key | {"status": "died"})  # what remains if the process does not come back
        start = time.perf_counter()
        built = self._broken.get(cell.setting) or guarded(lambda: {"job": self._job_of(cell.setting)})
        if "job" not in built:  # it would fail for all its cells
            self._broken[cell.setting] = built
        building = time.perf_counter() - start
        found = guarded(lambda: self._work(cell, built["job"])) if "job" in built else built
        whole = time.perf_counter() - start - building
        release()
        self._save({**key, **found, "building_seconds": round(building, 1), "whole_seconds": round(whole, 1)})
        shown = (
            f"{found['seconds']:7.1f} s {found['peak_bytes'] / 2**30:6.1f} GiB" if "seconds" in found else ""
        )
        print(
            f"{cell.model:10} {cell.dtype:8} {cell.wants:5} {cell.through:6} N={cell.steps:<3} {cell.method:13} "
            f"{found['status']:9} {shown} {found.get('says', '')[:160]}",
            flush=True,
        )

    def _work(self, cell: Cell, job: Job) -> dict[str, Any]:
        found = measured(job, cell.method, cell.steps, cell.through)
        if cell.method != "forward":
            found |= self._compared(cell, job.gradient())
        # Planning takes its time, and these methods are what it is about.
        if cell.through == "all" and cell.method in ("max", "plain"):
            found |= self._plan(cell, job)
        job.clear()
        return found

    def _job_of(self, setting: Setting) -> Job:
        if self._job is None or self._job.setting != setting:
            self._job = None
            release()
            self._job = Job(setting, self.device, self.small)
            job = self._job
            guarded(lambda: job.run("fifteen", 1))  # loads kernels, chooses algorithms
            job.clear()
        return self._job

    def _compared(self, cell: Cell, gradient: Tensor) -> dict[str, Any]:
        finite = bool(torch.isfinite(gradient).all())
        said: dict[str, Any] = {"gradient_norm": gradient.norm().item(), "finite": finite}
        if cell.group not in self._references:
            self._references[cell.group] = (cell.method, gradient)
            return said
        name, reference = self._references[cell.group]
        error = ((gradient - reference).norm() / reference.norm()).item()
        return said | {
            "compared_with": name,
            "relative_difference": error,
            "bits": torch.equal(gradient, reference),
        }

    def _plan(self, cell: Cell, job: Job) -> dict[str, Any]:
        """What the planner says of this job; once a group."""
        if cell.group not in self._planned:
            start = time.perf_counter()
            plan = guarded(lambda: job.planned(cell.steps))
            self._planned[cell.group] = plan | {"seconds": round(time.perf_counter() - start, 1)}
        return {"plan": self._planned[cell.group]}

    def _save(self, cell: dict[str, Any]) -> None:
        same = {k: cell[k] for k in ("model", "dtype", "wants", "through", "steps", "method")}
        self.record.replace("cells", same, cell)
        if not self.small:  # a process that is killed leaves them too
            self.record.note("figures", figures(self.record.data))


def about(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    said: dict[str, Any] = {
        "accelerator": None,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }
    if device.type == "cuda":
        said["accelerator"] = torch.cuda.get_device_name(device)
        said["accelerator_bytes"] = torch.cuda.get_device_properties(device).total_memory
        said["cuda"] = torch.version.cuda
    return said


def results_path(device: torch.device, small: bool) -> Path:
    """Named after the card."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return (
        RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}{'-small' if small else ''}.json"
    )


def main(arguments: list[str]) -> int:
    """Measure; exit status 0 if nothing is left, 3 if the time was over before."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="narrow networks, 64 pixels, few steps; proves nothing"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="begin no further cell that would end later"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--wants", nargs="+", choices=("noise", "lora"), default=["noise", "lora"])
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"]
    )
    parser.add_argument("--steps", nargs="+", type=int, default=None)
    parser.add_argument("--methods", nargs="+", default=None, help=f"such as min, 12GiB, {', '.join(PEERS)}")
    parser.add_argument("--again", action="store_true", help="also cells that failed before")
    parser.add_argument("--list", action="store_true", help="print the cells and what is known of them")
    parser.add_argument("--out", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    until = time.monotonic() + 60 * chosen.minutes
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu --small shows that it runs from end to end")
    path = chosen.out or results_path(device, chosen.small)
    record = Record(path, about(device), {"small": chosen.small}, "cells")
    wanted = selected(chosen)
    left = 0
    if not chosen.list:
        left = Bench(record, device, small=chosen.small, until=until, again=chosen.again).run(wanted)
        record.save()
        if any(c["status"] == "done" for c in record.data["cells"]):
            _draw(record)
    for line in table(record.data, [asdict(cell) for cell in wanted] if chosen.list else None):
        print(line)
    return 3 if left else 0


def _draw(record: Record) -> None:
    """The picture; what is measured is safe without it."""
    try:
        from .gpu_plot import plot

        plot(record.data, record.path.with_suffix(".png"))
    except Exception as error:
        print(f"no picture: {type(error).__name__}: {error}")


def selected(chosen: argparse.Namespace) -> list[Cell]:
    """The cells asked for, in order; methods that the list does not have are added."""
    found = [
        c
        for c in cells()
        if c.model in chosen.models
        and c.wants in chosen.wants
        and c.dtype in chosen.dtypes
        and (chosen.steps is None or c.steps in chosen.steps)
    ]
    if chosen.methods is None:
        return found
    groups = dict.fromkeys((c.model, c.dtype, c.wants, c.through, c.steps) for c in found)
    return [Cell(*group, method) for group in groups for method in chosen.methods]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
