"""What the exact gradient costs: time, memory and network calls beside plain autograd and its peers.

    python -m benchmarks.exact_gradient            # 5 interleaved repeats at N = 4, 10, 31
    python -m benchmarks.exact_gradient --quick    # fewer budgets in between, 3 repeats at N = 31
    python -m benchmarks.exact_gradient --small    # a tiny network: only to see that it runs

Every method differentiates the same run of the same network. A repeat times each method once, in an order
that turns from repeat to repeat. Memory is measured in runs of their own. Results are saved after each measurement;
the same command started again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import backdrift as bd

from .measure import MALLOC, machine, peak_bytes, seconds
from .methods import LADDER, NAMES, method
from .problem import FULL, GUIDANCE, SMALL, WANTS, Problem
from .record import Figures, Record
from .targets import targets

RESULTS = Path(__file__).parent / "results"
LONG = 20  # from so many steps on, --long-repeats and --quick save time


class Bench:
    """One benchmark run.

    Args:
        options: the command line's.
        record: where measurements go.
    """

    def __init__(self, options: argparse.Namespace, record: Record) -> None:
        self.options, self.record = options, record
        self.device = torch.device(options.device)
        self.size = SMALL if options.small else FULL

    def run(self) -> None:
        """Every measurement that the record does not hold yet: memory first, since the ladder's budgets need it."""
        for wants in self.options.wants:
            problem = Problem(self.size, wants, self.device)
            self._one_step(problem)
            for steps in self.options.steps:
                for name in self._in_need_order(self._methods(steps)):
                    self._memory(problem, steps, name)
            for name in ("exact-min",) if self.options.quick else ("exact-min", "checkpoint"):
                if name in self.options.methods:
                    self._memory(problem, self.options.flat_to, name)
        for wants in self.options.wants:
            problem = Problem(self.size, wants, self.device)
            for steps in self.options.steps:
                self._times(problem, steps)

    def _methods(self, steps: int) -> list[str]:
        """What is measured with so many steps: in a quick run, long ones without "max" and what lies below it."""
        left_out = {"exact-max", *LADDER} if self.options.quick and steps >= LONG else set()
        return [name for name in self.options.methods if name not in left_out]

    @staticmethod
    def _in_need_order(names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: name in LADDER)

    def _one_step(self, problem: Problem) -> None:
        """One network call's backpropagation, its .grad allocated beforehand and counted."""
        if self.record.find("memory", steps=1, wants=problem.wants, method="one step"):
            return
        problem.clear()
        for leaf in problem.leaves:
            leaf.grad = torch.zeros_like(leaf)
        held = sum(leaf.nbytes for leaf in problem.leaves)
        peak = held + peak_bytes(lambda: self._differentiate(problem, 1, "plain"), self.device)
        self._add_memory(problem, 1, "one step", peak_bytes=peak)

    def _memory(self, problem: Problem, steps: int, name: str) -> None:
        if self.record.find("memory", steps=steps, wants=problem.wants, method=name):
            return
        problem.clear()
        try:
            peak = peak_bytes(lambda: self._differentiate(problem, steps, name), self.device)
        except bd.errors.BudgetError:  # with few steps a rung can lie below the room that one call needs
            print(f"memory  N={steps:<3} {problem.wants:4} {name:12} budget too small, left out", flush=True)
            return
        budget = self._budget(steps, problem.wants, name)
        self._add_memory(
            problem, steps, name, peak_bytes=peak, **({"budget_bytes": budget} if budget else {})
        )

    def _add_memory(self, problem: Problem, steps: int, name: str, **cell: Any) -> None:
        self.record.add("memory", steps=steps, wants=problem.wants, method=name, **cell)
        print(
            f"memory  N={steps:<3} {problem.wants:4} {name:12} {cell['peak_bytes'] / 1e6:9.1f} MB", flush=True
        )

    def _times(self, problem: Problem, steps: int) -> None:
        wants, reference = problem.wants, None
        repeats = (
            min(self.options.repeats, self.options.long_repeats) if steps >= LONG else self.options.repeats
        )
        ran = {cell["method"] for cell in self.record.find("memory", steps=steps, wants=wants)}
        names = ["forward", *(name for name in self._methods(steps) if name in ran)]
        for repeat in range(repeats):
            turned = names[repeat % len(names) :] + names[: repeat % len(names)]
            for name in turned:
                if self.record.find("times", steps=steps, wants=wants, method=name, repeat=repeat):
                    continue
                if reference is None:  # also warms up
                    problem.clear()
                    self._differentiate(problem, steps, "plain")
                    reference = problem.gradients()
                self._time(problem, steps, name, repeat, reference)

    def _time(
        self, problem: Problem, steps: int, name: str, repeat: int, reference: dict[str, Tensor]
    ) -> None:
        problem.clear()
        if name == "forward":
            with torch.no_grad():
                took = seconds(lambda: method("plain")(problem, steps), self.device)
            found: dict[str, Any] = {}
        else:
            took = seconds(lambda: self._differentiate(problem, steps, name), self.device)
            found = compare(problem.gradients(), reference)
        cell = {"repeat": repeat, "seconds": took, "calls": problem.network.calls, **found}
        self.record.add("times", steps=steps, wants=problem.wants, method=name, **cell)
        print(
            f"time    N={steps:<3} {problem.wants:4} {name:12} {took:9.3f} s  repeat {repeat + 1}", flush=True
        )

    def _differentiate(self, problem: Problem, steps: int, name: str) -> None:
        chosen = method(name, self._budget(steps, problem.wants, name))
        problem.loss(chosen(problem, steps)).backward()

    def _budget(self, steps: int, wants: str, name: str) -> int | None:
        """A rung's budget: so far from the peak of "min" to the peak of "max"."""
        if name not in LADDER:
            return None
        found = self.record.find("memory", steps=steps, wants=wants, method=name)
        if found:
            return found[0]["budget_bytes"]
        low, high = (
            self.record.find("memory", steps=steps, wants=wants, method=m)[0]["peak_bytes"]
            for m in ("exact-min", "exact-max")
        )
        return round(low + LADDER[name] * (high - low))


def compare(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Whether all gradients equal plain autograd's bit for bit, and their relative errors in the 2-norm."""
    equal = all(
        torch.equal(gradients[k].view(torch.int32), reference[k].view(torch.int32)) for k in reference
    )
    errors = {
        k: float((gradients[k] - reference[k]).double().norm() / reference[k].double().norm())
        for k in reference
    }
    return {"bits_equal": equal, "relative_error": errors}


def summary(figures: Figures) -> str:
    """Medians and ratios side by side, a block per case. Times are also given in F, the forward run without grad."""
    heads = ("method", "s", "/F", "/plain", "MB", "calls", "bits", "error of x_T")
    lines = []
    for steps, wants in figures.cases:
        lines += [f"\nN = {steps}, gradients for {wants}", _row(heads)]
        lines += [_row(_cells(figures, steps, wants, name)) for name in figures.methods(steps, wants)]
    return "\n".join(lines)


def _cells(figures: Figures, steps: int, wants: str, name: str) -> tuple[str, ...]:
    runs = figures.repeats(steps, wants, name)
    ratios = [figures.ratio(steps, wants, name, to) for to in ("forward", "plain")]
    peak = figures.peak(steps, wants, name)
    return (
        name,
        f"{figures.seconds(steps, wants, name):.2f}",
        *(f"{ratio:.2f}" if ratio is not None else "-" for ratio in ratios),
        f"{peak / 1e6:.1f}" if peak is not None else "-",
        str(runs[0]["calls"]),
        "same" if all(run["bits_equal"] for run in runs) else "differ",
        f"{max(run['relative_error']['x_T'] for run in runs):.1e}",
    )


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    widths = (8, 6, 7, 8, 6, 6, 13)
    return f"{first:12}" + "".join(f" {cell:>{width}}" for cell, width in zip(others, widths, strict=True))


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exact_gradient", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 10, 31])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--long-repeats", type=int, default=5, help="repeats where there are 20 steps or more"
    )
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--wants", nargs="+", choices=WANTS, default=list(WANTS), help="gradients for what")
    parser.add_argument(
        "--flat-to", type=int, default=64, help="steps up to which memory at 'min' is measured"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="one budget in between; with 20 steps or more 3 repeats, no max"
    )
    parser.add_argument(
        "--small", action="store_true", help="a tiny network, to see that it runs; proves nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="replace an older file")
    parser.add_argument("--out", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.long_repeats = min(chosen.long_repeats, 3)
        chosen.methods = [m for m in chosen.methods if m not in LADDER or m == "exact-1/2"]
    needed = {"plain"} | ({"exact-min", "exact-max"} if set(chosen.methods) & set(LADDER) else set())
    chosen.methods = [m for m in NAMES if m in needed or m in chosen.methods]
    if chosen.out is None:
        device = "" if chosen.device == "cpu" else "_" + torch.device(chosen.device).type
        chosen.out = RESULTS / f"exact_gradient{device}{'_small' if chosen.small else ''}.json"
    return chosen


def main(arguments: list[str]) -> int:
    """Measure what is missing, then print, plot and judge. Exit status 1 if a target is missed."""
    chosen = options(arguments)
    size = SMALL if chosen.small else FULL
    settings = {
        "parameters": sum(p.numel() for p in size.unet().parameters()),
        "latents": [1, 4, size.side, size.side],
        "latent_bytes": 4 * 4 * size.side**2,
        "guidance_scale": GUIDANCE,
        "solver": "Euler on the exponential form (DDIM)",
    }
    if chosen.fresh:
        chosen.out.unlink(missing_ok=True)
    record = Record(chosen.out, machine(torch.device(chosen.device)), settings, "memory", "times")
    Bench(chosen, record).run()
    figures = Figures(record.data)
    print(summary(figures), "\n")
    judged = targets(figures)
    print("\n".join(map(str, judged)))
    from .plot import plot

    plot(figures, chosen.out.with_suffix(".png"))
    print(f"\n{chosen.out.name} and its picture are in {os.path.relpath(chosen.out.parent)}")
    return 0 if all(t.met for t in judged) else 1


if __name__ == "__main__":
    if not MALLOC.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.exact_gradient", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MALLOC})
    raise SystemExit(main(sys.argv[1:]))
