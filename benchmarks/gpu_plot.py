"""The results of :mod:`benchmarks.gpu` as a picture: time over sampling against peak memory, one panel a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gpu_summary import GIB, NAMES, group_of, over

_COLOURS = {"min": "#0b6e4f", "auto": "#3aa17e", "max": "#88c9a1", "fifteen": "#c8553d", "plain": "#222222"}
_COLOURS |= {"blocks": "#5b6ee1"}
_LABELS = {"fifteen": "fifteen lines", "plain": "plain autograd", "blocks": "diffusers' blocks"}
_MOST = 9  # panels


def plot(data: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [c for c in data["cells"] if c["method"] != "forward"]
    groups = list(dict.fromkeys(tuple(group_of(c).items()) for c in done))[:_MOST]
    columns = min(3, len(groups)) or 1
    rows = -(-len(groups) // columns) or 1
    shape, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False)
    for axis, group in zip(axes.flat, groups, strict=False):
        _panel(axis, data, dict(group), [c for c in done if tuple(group_of(c).items()) == group])
    for axis in list(axes.flat)[len(groups) :]:
        axis.axis("off")
    card = data["machine"]["accelerator"] or "CPU"
    shape.suptitle(
        f"{card}, torch {data['machine']['torch']}; random weights, a CLIP-sized loss", fontsize=10
    )
    shape.tight_layout()
    shape.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(shape)


def _panel(axis: Any, data: dict[str, Any], group: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    card = data["machine"].get("accelerator_bytes")
    failed = []
    for cell in cells:
        label = _LABELS.get(cell["method"], f'"{cell["method"]}"')
        if cell["status"] != "done":
            failed.append(f"{label}: {cell['status']}")
            continue
        height = over(data, cell, "forward") or cell["seconds"]
        colour = _COLOURS.get(cell["method"], "#b8860b")
        axis.scatter([cell["peak_bytes"] / GIB], [height], color=colour, s=28)
        axis.annotate(
            label, (cell["peak_bytes"] / GIB, height), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
    timed = any(over(data, cell, "forward") for cell in cells)
    axis.set_ylabel("time / sampling" if timed else "seconds", fontsize=8)
    axis.set_xlabel("peak GiB of everything" + (f" (card: {card / GIB:.0f})" if card else ""), fontsize=8)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.tick_params(labelsize=7)
    span = "" if group["through"] == "all" else f", {group['through']}"
    title = f"{NAMES[group['model']]}, {group['dtype']}, {group['wants']}{span}, N = {group['steps']}"
    axis.set_title(title, fontsize=8)
    if failed:
        axis.text(0.98, 0.03, "\n".join(failed), transform=axis.transAxes, ha="right", fontsize=6)
