"""A results file as a picture: time against memory, and memory against the number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .methods import LADDER
from .record import Figures

_RUNGS = ["exact-min", *LADDER, "exact-max"]
_COLOURS = {"exact-min": "#0b6e4f", "plain": "#222222", "checkpoint": "#c8553d", "torchdiffeq": "#5b6ee1"}
_LABELS = {"exact-min": "backdrift Exact", "plain": "plain autograd", "checkpoint": "checkpoint per call"}


def plot(figures: Figures, path: Path) -> None:
    """Write the picture: one row for each kind of gradients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted({wants for _, wants in figures.cases})
    shape, axes = pyplot.subplots(len(rows), 2, figsize=(10, 3.8 * len(rows)), squeeze=False)
    for wants, (left, right) in zip(rows, axes, strict=True):
        _trade(left, figures, max(steps for steps, w in figures.cases if w == wants), wants)
        _growth(right, figures, wants)
    processor, threads = figures.data["machine"]["processor"], figures.data["machine"]["threads"]
    device = figures.data["machine"]["accelerator"] or f"{processor}, {threads} threads"
    shape.suptitle(
        f"{figures.data['settings']['parameters'] / 1e6:.1f} M parameters on {device}", fontsize=10
    )
    shape.tight_layout()
    shape.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(shape)


def _trade(axis: Any, figures: Figures, steps: int, wants: str) -> None:
    def point(name: str) -> tuple[float, float] | None:
        peak, ratio = figures.peak(steps, wants, name), figures.ratio(steps, wants, name, "plain")
        return None if peak is None or ratio is None else (peak / 1e6, ratio)

    ladder = [p for p in map(point, _RUNGS) if p]
    if ladder:
        axis.plot(*zip(*ladder, strict=True), "o-", color=_COLOURS["exact-min"], label=_LABELS["exact-min"])
    for name in ("plain", "checkpoint", "torchdiffeq"):
        found = point(name)
        if found:
            axis.plot(*found, "s", color=_COLOURS[name], label=_LABELS.get(name, name))
    axis.set(
        xscale="log", xlabel="peak of live tensors beside the weights, MB", ylabel="time over plain autograd"
    )
    plain_ticks(axis.xaxis)
    axis.set_title(f"gradients for {wants}, N = {steps}", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def _growth(axis: Any, figures: Figures, wants: str) -> None:
    for name, colour in _COLOURS.items():
        steps = figures.steps_with_peak(wants, name)
        peaks = [(figures.peak(n, wants, name) or 0) / 1e6 for n in steps]
        if steps:
            label = "Exact('min')" if name == "exact-min" else _LABELS.get(name, name)
            axis.plot(steps, peaks, "o-", color=colour, label=label)
    one = figures.peak(1, wants, "one step")
    if one is not None:
        axis.axhline(one / 1e6, color="#999999", linestyle=":", label="one step's backpropagation")
    axis.set(xscale="log", yscale="log", xlabel="steps N", ylabel="peak of live tensors, MB")
    ticks = sorted({n for name in _COLOURS for n in figures.steps_with_peak(wants, name)})
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    plain_ticks(axis.yaxis)
    axis.set_title(f"gradients for {wants}: memory", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def plain_ticks(axis: Any) -> None:
    """1, 2 and 5 of each power of ten, in full: the range is often too short for powers alone."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())
