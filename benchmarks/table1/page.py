"""The results as tables and as a picture; nothing here measures anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..marked import rewritten
from .methods import GRIDS, METHODS, TARGETS

PAGE = Path(__file__).parents[2] / "docs" / "table1.md"
GRID_NAMES = {"uniform": "uniform", "logsnr": "log-SNR"}
# Pan et al. 2023, arXiv version 1, Table 1: FID on CIFAR-10 by Adams–Bashforth of order 4, (original, exponential).
PAPER = {10: (9.50, 4.36), 20: (8.27, 2.90), 50: (5.64, 2.58)}
SOLVERS = ("Euler", "RK4", "AB4", "AB4 rising")
DPM = ("DPM-Solver-2", "DPM-Solver-3", "DPM-Solver++(2M)")

Data = dict[str, Any]


def cells(data: Data) -> dict[tuple[str, str, int], dict[str, Any]]:
    """By method, grid and target."""
    return {(c["method"], c["grid"], c["target"]): c for c in data["cells"]}


def number(value: float) -> str:
    """Three digits, written short."""
    text = f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"
    return text.replace("e-0", "e-").replace("e+0", "e+")


def quality_table(data: Data, metric: str) -> str:
    """Rows of methods; for each grid and target the figure, its standard error, and the calls actually made."""
    found = cells(data)
    head = [f"{GRID_NAMES[grid]}, {target}" for grid in GRIDS for target in TARGETS]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for method in METHODS:
        row = [found.get((method.name, grid, target)) for grid in GRIDS for target in TARGETS]
        lines.append(f"| {method.name} | " + " | ".join(_entry(cell, metric) for cell in row) + " |")
    return "\n".join(lines)


def _entry(cell: dict[str, Any] | None, metric: str) -> str:
    if cell is None:
        return "–"
    text = number(cell[metric])
    if f"{metric} error" in cell:
        text += f" ± {number(cell[f'{metric} error'])}"
    return text if cell["calls"] == cell["target"] else f"{text} ({cell['calls']})"


def floor_table(data: Data) -> str:
    """What no solver can go below."""
    floors = data["floors"]
    rows = [
        ("the model's exact flow against the held-in digits", floors["exact flow"]),
        ("held-out real digits against held-in ones", floors["held-out digits"]),
        ("one half of the held-in digits against the other", floors["two halves of the held-in digits"]),
    ]
    lines = ["| floor | classifier | pixels |", "|---|---|---|"]
    for name, row in rows:
        shown = [
            number(row[m]) + (f" ± {number(row[f'{m} error'])}" if f"{m} error" in row else "")
            for m in ("classifier", "pixels")
        ]
        lines.append(f"| {name} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def ratios(data: Data, metric: str) -> list[tuple[str, str, int, float]]:
    """(solver, grid, target, figure on the original form over that on the exponential form)."""
    found = cells(data)
    out = []
    for solver in SOLVERS:
        other = "Euler (DDIM)" if solver == "Euler" else solver
        for grid in GRIDS:
            for target in TARGETS:
                a = found.get((f"original, {solver}", grid, target))
                b = found.get((f"exponential, {other}", grid, target))
                if a and b:
                    out.append((solver, grid, target, a[metric] / b[metric]))
    return out


def ordering_table(data: Data, metric: str) -> str:
    """The same solver on the original and on the exponential form: how many times worse the former is."""
    known = {(solver, grid, target): r for solver, grid, target, r in ratios(data, metric)}
    head = [f"{GRID_NAMES[grid]}, {target}" for grid in GRIDS for target in TARGETS]
    lines = ["| original over exponential | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for solver in SOLVERS:
        row = [known.get((solver, grid, target)) for grid in GRIDS for target in TARGETS]
        lines.append(f"| {solver} | " + " | ".join("–" if r is None else number(r) for r in row) + " |")
    if metric == "classifier":  # the paper has Fréchet distances only
        paper = [f"{PAPER[t][0] / PAPER[t][1]:.2f}" if t in PAPER else "–" for t in TARGETS]
        blank = ["–"] * len(TARGETS)
        lines.append(
            f"| the paper (CIFAR-10, AB4, its own grid) | {' | '.join(paper)} | {' | '.join(blank)} |"
        )
    return "\n".join(lines)


def against_dpm(data: Data, metric: str) -> str:
    """Adams–Bashforth on the exponential form over the best DPM-Solver of the same grid and target."""
    found = cells(data)
    head = [f"{GRID_NAMES[grid]}, {target}" for grid in GRIDS for target in TARGETS]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    ours = {"AB4": "exponential, AB4", "AB4 rising": "exponential, AB4 rising"}
    for label, name in ours.items():
        row = []
        for grid in GRIDS:
            for target in TARGETS:
                mine = found.get((name, grid, target))
                theirs = [found.get((dpm, grid, target)) for dpm in DPM]
                known = [c[metric] for c in theirs if c]
                row.append(number(mine[metric] / min(known)) if mine and known else "–")
        lines.append(f"| exponential {label} over the best DPM-Solver | {' | '.join(row)} |")
    return "\n".join(lines)


def block(data: Data) -> str:
    """All that stands between the page's markers."""
    settings, check = data["settings"], data["floors"]["exact flow's check"]
    parts = [
        f"{settings['samples']:,} samples from the same noises in every cell (seed {settings['seed']}), against "
        f"{settings['real digits']['held in']:,} held-in digits, t from {settings['times'][0]:g} to "
        f"{settings['times'][1]:g} everywhere; {data['machine']['processor']}, torch {data['machine']['torch']}.",
        "### Fréchet distance in the classifier's features",
        quality_table(data, "classifier"),
        "### Fréchet distance of raw pixels",
        quality_table(data, "pixels"),
        "### Floors",
        floor_table(data),
        "### Distance from the model's exact flow",
        quality_table(data, "rms"),
        f"The exact flow is {settings['fine']}; RK4 on the original form with {check['calls']} calls ends within an "
        f"RMS of {number(check['rms'])} of it ({check['samples']:,} samples).",
        "### The paper's ordering",
        "Fréchet distances, classifier:",
        ordering_table(data, "classifier"),
        against_dpm(data, "classifier"),
        "Distances from the exact flow:",
        ordering_table(data, "rms"),
        against_dpm(data, "rms"),
    ]
    return "\n\n".join(parts) + "\n"


def written(text: str, data: Data) -> str:
    """The page's text with the tables of these results between its markers.

    Raises:
        ValueError: the markers are not there once each.
    """
    return rewritten(text, {"table1": block(data)})


def plot(data: Data, path: Path) -> None:
    """Fréchet distance (classifier), and distance from the exact flow, against network calls; a column per grid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10.5, 8), sharex=True, sharey="row")
    for (metric, title), row in zip(
        (("classifier", "Fréchet distance, classifier"), ("rms", "RMS distance from the exact flow")),
        axes,
        strict=True,
    ):
        for grid, axis in zip(GRIDS, row, strict=True):
            for method in METHODS:
                line = [c for c in data["cells"] if (c["method"], c["grid"]) == (method.name, grid)]
                points = sorted((c["calls"], c[metric]) for c in line)
                if points:
                    axis.plot(
                        *zip(*points, strict=True), label=method.name, markersize=4, **_style(method.name)
                    )
            if metric == "classifier":
                axis.axhline(data["floors"]["exact flow"][metric], color="#999999", lw=1, label="exact flow")
            axis.set(xscale="log", yscale="log", title=f"{title}, {GRID_NAMES[grid]} grid")
            axis.set_xticks(TARGETS, map(str, TARGETS))
            axis.minorticks_off()
            axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("network calls")
    axes[0][0].legend(fontsize=7, frameon=False, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _style(name: str) -> dict[str, Any]:
    marks = {"Euler": "o", "RK4": "s", "rising": "v", "AB4": "^", "-2": "o", "-3": "s", "++": "^"}
    family = name.split(",")[0]
    colour = {"original": "#c8553d", "exponential": "#0b6e4f"}.get(family, "#5b6ee1")
    marker = next(mark for word, mark in marks.items() if word in name)
    return {"color": colour, "marker": marker, "linestyle": "--" if marker == "v" else "-"}
