"""The tables and plots of docs/peers.md, and the targets, from the results files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from ..plot import plain_ticks
from ..targets import Target
from .reach import TARGET, Reached, cheapest

OURS = "backdrift"
EXACT, SYMPLECTIC = 'backdrift | Exact("min") | Euler', "backdrift | SymplecticAdjoint | Euler"
PUBLISHED = "published | symplectic adjoint, stored states | Euler"
TORCHDIFFEQ = "torchdiffeq | odeint_adjoint, stored | euler, exponential form, log-SNR nodes"
ALL, NOISE = "x_T+cond+weights", "x_T"
PROBLEMS = {
    "unet": "UNet of 20 M parameters",
    "digits": "pixel model of digits",
    "mixture": "Gaussian mixture",
}
Cells = list[dict[str, Any]]


def read(folder: Path, name: str) -> dict[str, Any]:
    """A results file; empty if there is none."""
    path = folder / f"peers-{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def split(key: str) -> tuple[str, str, str]:
    """Package, gradient method, setting."""
    package, name, setting = key.split(" | ")
    return package, name, setting


def blocks(folder: Path) -> dict[str, str]:
    """What stands between the page's markers, by marker."""
    found = {
        "targets": "\n".join(f"- {t}" for t in targets(folder)) or "Not measured yet.",
        "reach mixture": reach_table(read(folder, "mixture").get("errors", [])),
        "reach digits": reach_table(read(folder, "digits").get("errors", [])),
        "sde": sde_table(read(folder, "sde").get("errors", [])),
        **{f"cost {name}": cost_table(folder, name) for name in PROBLEMS},
    }
    return {name: f"{text}\n" for name, text in found.items()}


def best_of_each(cells: Cells, target: float = TARGET) -> list[Reached]:
    """The cheapest setting of every gradient method (package and name), cheapest first."""
    best: dict[tuple[str, str], Reached] = {}
    for found in cheapest(cells, target):
        best.setdefault(split(found.method)[:2], found)
    return list(best.values())


def reach_table(cells: Cells) -> str:
    """The cheapest setting of each gradient method that reaches the target; then those that never do."""
    if not cells:
        return "Not measured yet."
    lines = ["| package | gradient | best setting | steps or tolerance | calls | products | both | error |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    found = best_of_each(cells)
    for r in found:
        package, name, setting = split(r.method)
        shown = f"`{name}`" if package in (OURS, "torchdiffeq", "diffrax") else name
        value = f"{r.value:.2g}" if r.value < 1 else f"{r.value:g}"
        lines.append(
            f"| {package} | {shown} | {setting} | {value} | {r.calls} | {r.products} | {r.total} | {_e(r.error)} |"
        )
    reached = {split(r.method)[:2] for r in found}
    for key in dict.fromkeys(split(c["method"])[:2] for c in cells):
        if key not in reached:
            cell = min((c for c in cells if split(c["method"])[:2] == key), key=_worst)
            package, name, setting = split(cell["method"])
            lines.append(
                f"| {package} | {name} | {setting} | {cell['value']:g} | {cell['calls']} | {cell['products']} | "
                f"not reached | {_e(_worst(cell))} |"
            )
    return "\n".join(lines)


def sde_table(cells: Cells) -> str:
    """Worst error at each number of steps, and what a step costs."""
    if not cells:
        return "Not measured yet."
    steps = sorted({c["value"] for c in cells})
    lines = [
        "| package | gradient | solver | calls + products a step | " + " | ".join(f"N = {n:g}" for n in steps)
    ]
    lines[0] += " |"
    lines.append("|---|---|---|---|" + "---|" * len(steps))
    for key in dict.fromkeys(c["method"] for c in cells):
        mine = {c["value"]: c for c in cells if c["method"] == key}
        last = mine[max(mine)]
        each = f"{last['calls'] / last['value']:.1f} + {last['products'] / last['value']:.1f}"
        errors = " | ".join(_e(_worst(mine[n])) if n in mine else "–" for n in steps)
        lines.append("| " + " | ".join(split(key)) + f" | {each} | {errors} |")
    return "\n".join(lines)


class Costs:
    """Time and memory of one problem."""

    def __init__(self, folder: Path, problem: str) -> None:
        self.memory: Cells = read(folder, problem).get("memory", [])
        self.times: Cells = read(folder, f"time-{problem}").get("times", [])

    def peak(self, method: str, value: float, wants: str = ALL) -> int | None:
        """Peak bytes of live tensors beside the weights."""
        found = [c["peak_bytes"] for c in _at(self.memory, method, value, wants)]
        return found[0] if found else None

    def seconds(self, method: str, value: float, wants: str = ALL) -> float | None:
        """Median."""
        found = [c["seconds"] for c in _at(self.times, method, value, wants)]
        return median(found) if found else None

    def ratio(self, method: str, other: str, value: float, wants: str = ALL) -> float | None:
        """Median over the repeats of the ratio of times within one repeat."""
        ours, theirs = (
            {c["repeat"]: c["seconds"] for c in _at(self.times, m, value, wants)} for m in (method, other)
        )
        pairs = [ours[r] / theirs[r] for r in ours if r in theirs]
        return median(pairs) if pairs else None


def _at(cells: Cells, method: str, value: float, wants: str) -> Cells:
    return [c for c in cells if (c["method"], c["value"], c["wants"]) == (method, value, wants)]


def cost_table(folder: Path, problem: str) -> str:
    """Time, memory, calls and errors of the line-up."""
    costs = Costs(folder, problem)
    if not costs.memory:
        return "Not measured yet."
    lines = [
        "| package | gradient | setting | N or tolerance | gradients for | calls + products | MB | s | error |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for c in costs.memory:
        seconds = costs.seconds(c["method"], c["value"], c["wants"])
        error = "to the sampler: the same bits" if c.get("same_bits") else ""
        if not error and "own_errors" in c:
            error = f"to the sampler: {_e(max(c['own_errors'].values()))}"
        if "errors" in c:
            error += f"{'; ' if error else ''}to the flow: {_e(_worst(c))}"
        wants = "all" if c["wants"] == ALL else c["wants"]
        megabytes = (
            f"{c['peak_bytes'] / 1e6:.1f}" if c["peak_bytes"] > 1e5 else f"{c['peak_bytes'] / 1e6:.3f}"
        )
        lines.append(
            "| " + " | ".join(split(c["method"])) + f" | {c['value']:g} | {wants} | {c['calls']} + {c['products']} | "
            f"{megabytes} | {f'{seconds:.3g}' if seconds else '–'} | {error} |"
        )  # fmt: skip
    if any("errors" in c for c in costs.memory):
        title = f"Error against memory and time: {PROBLEMS[problem]}"
        lines.append(f"\n![{title}](images/peers-{problem}-cost.png)")
    return "\n".join(lines)


def targets(folder: Path) -> list[Target]:
    """What was promised, as far as it has been measured."""
    found, costs, steps = [], Costs(folder, "unet"), 10.0
    for wants, shown in ((ALL, "all gradients"), (NOISE, "x_T")):
        for method, name in ((EXACT, 'Exact("min")'), (SYMPLECTIC, "SymplecticAdjoint")):
            time = costs.ratio(method, PUBLISHED, steps, wants)
            if time is not None:
                found.append(
                    Target(f"UNet, {shown}: time of {name} over the published symplectic adjoint", time, 0.85)
                )
            ours, theirs = costs.peak(method, steps, wants), costs.peak(PUBLISHED, steps, wants)
            if ours and theirs:
                text = f"UNet, {shown}: memory of {name} over the published symplectic adjoint"
                found.append(Target(text, ours / theirs, 0.65))
    ours, theirs = costs.peak(EXACT, steps), costs.peak(TORCHDIFFEQ, steps)
    if ours and theirs:
        found.append(Target('UNet, weights: memory of Exact("min") over torchdiffeq', ours / theirs, 0.4))
    time = costs.ratio(EXACT, TORCHDIFFEQ, steps)
    if time is not None:
        found.append(Target('UNet, weights: time of Exact("min") over torchdiffeq', time, 1.0))
    return found + counts(read(folder, "mixture").get("errors", []))


def counts(cells: Cells) -> list[Target]:
    """Calls to the target on the mixture: the best of backdrift's over the best of the peers', and the same without
    ``Exact("max")``, which keeps all calls' activations as plain autograd does.

    Plain and checkpointed autograd run through backdrift's own solvers here, so they are nobody's.
    """
    found = []
    for kept, memory in (("", ""), ('Exact("max")', ", activations not kept")):
        for text, measure in _MEASURES.items():
            ours = _least([c for c in cells if split(c["method"])[1] != kept], (OURS,), measure)
            peers = _least(cells, ("torchdiffeq", "diffrax", "published", "FlowGrad", "DOODL"), measure)
            if ours is not None and peers is not None:
                what = f"mixture: {text} to {TARGET:g} of the true flow's gradient{memory}"
                found.append(Target(f"{what}, ours {ours} over peers' {peers}", ours / peers, 1.0))
    return found


def figures(folder: Path) -> list[tuple[str, str]]:
    """Rows for the README's table, as far as they have been measured: what, and the figure."""
    rows = []
    best = {split(r.method)[0]: r for r in reversed(cheapest(read(folder, "mixture").get("errors", [])))}
    if OURS in best:
        names = [OURS, *(package for package in ("torchdiffeq", "diffrax", "published") if package in best)]
        shown = (f"{_THEIRS.get(name, name)} {best[name].calls} + {best[name].products}" for name in names)
        what = f"gradient within {TARGET:g} of the true flow's on a Gaussian mixture, each package's best setting"
        rows.append((what, f"calls + products with the network: {', '.join(shown)}"))
    costs, steps = Costs(folder, "unet"), 10.0
    for wants, by in ((ALL, "noise, embedding and all weights"), (NOISE, "the noise")):
        found = []
        for other, name in ((PUBLISHED, _THEIRS["published"]), (TORCHDIFFEQ, "torchdiffeq's adjoint")):
            ours, theirs = costs.peak(EXACT, steps, wants), costs.peak(other, steps, wants)
            time = costs.ratio(EXACT, other, steps, wants)
            parts = [f"{ours / theirs:.2f} of the memory"] if ours and theirs else []
            parts += [f"{time:.2f} of the time"] if time is not None else []
            found += [f"{' and '.join(parts)} of {name}"] if parts else []
        if found:
            what = f'exact gradient by {by}, {steps:g} steps of a guided 20 M-parameter UNet: `Exact("min")`'
            rows.append((what, "; ".join(found)))
    return rows


_THEIRS = {"published": "a symplectic adjoint with stored states"}

_MEASURES: dict[str, Callable[[dict[str, Any]], int]] = {
    "calls and products": lambda c: c["calls"] + c["products"],
    "calls alone": lambda c: c["calls"],
}


def _least(cells: Cells, packages: Iterable[str], measure: Callable[[dict[str, Any]], int]) -> int | None:
    good = [c for c in cells if _worst(c) <= TARGET and split(c["method"])[0] in packages]
    return min(map(measure, good), default=None)


def _worst(cell: dict[str, Any]) -> float:
    return max(cell["errors"].values())


def _e(value: float) -> str:
    if value > 10:
        return "> 10"
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace("e+", "e")


_COLOURS = {
    OURS: "#0b6e4f",
    "autograd": "#222222",
    "torchdiffeq": "#5b6ee1",
    "diffrax": "#c8553d",
    "torchsde": "#8f3f97",
    "published": "#b8860b",
    "FlowGrad": "#999999",
    "DOODL": "#4aa3a2",
}


def plots(folder: Path, into: Path) -> None:
    """The pictures."""
    into.mkdir(parents=True, exist_ok=True)
    for problem in ("mixture", "digits", "sde"):
        cells = read(folder, problem).get("errors", [])
        if cells:
            _precision(cells, into / f"peers-{problem}-calls.png")
    for problem in PROBLEMS:
        costs = Costs(folder, problem)
        if any("errors" in c for c in costs.memory):
            _costs(costs, into / f"peers-{problem}-cost.png")


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no cheaper one undercuts."""
    front: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((cost, error))
    return front


def _precision(cells: Cells, path: Path) -> None:
    """Error of each quantity against calls and products: each package's best front, and every setting in pale."""
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    quantities = list(cells[0]["errors"])
    figure, axes = pyplot.subplots(1, len(quantities), figsize=(4.2 * len(quantities), 4), sharey=True)
    for axis, quantity in zip(axes, quantities, strict=True):
        for package in dict.fromkeys(split(c["method"])[0] for c in cells):
            points = [
                (c["calls"] + c["products"], min(c["errors"][quantity], 10.0))
                for c in cells
                if split(c["method"])[0] == package and c["errors"][quantity] > 0
            ]
            colour = _COLOURS[package]
            axis.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.18, markersize=3)
            axis.plot(*zip(*_front(points), strict=True), "-", color=colour, label=package)
        axis.axhline(TARGET, color="#999999", linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="calls + products", title=f"gradient by {quantity}")
        axis.set_ylim(1e-6, 3)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative error to the true flow's gradient")
    axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _costs(costs: Costs, path: Path) -> None:
    """Error against peak memory and, where it was measured, time: each method in pale, each package's best front."""
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    cells = [c for c in costs.memory if "errors" in c and c["wants"] == ALL]
    quantities = list(cells[0]["errors"])
    kinds: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("peak of live tensors beside the weights, MB", lambda c: c["peak_bytes"] / 1e6)
    ]
    if costs.times:
        kinds.append(("seconds", lambda c: costs.seconds(c["method"], c["value"])))
    figure, axes = pyplot.subplots(
        len(kinds),
        len(quantities),
        figsize=(4.2 * len(quantities), 4 * len(kinds)),
        sharey=True,
        squeeze=False,
    )
    for row, (label, measure) in zip(axes, kinds, strict=True):
        for axis, quantity in zip(row, quantities, strict=True):
            for package in dict.fromkeys(split(c["method"])[0] for c in cells):
                colour, every = _COLOURS[package], []
                for key in dict.fromkeys(c["method"] for c in cells if split(c["method"])[0] == package):
                    points = [
                        (measure(c), min(c["errors"][quantity], 10.0)) for c in cells if c["method"] == key
                    ]
                    known = [(x, y) for x, y in points if x is not None]
                    if known:
                        axis.plot(
                            *zip(*known, strict=True),
                            "-o",
                            color=colour,
                            alpha=0.25,
                            markersize=2.5,
                            linewidth=0.7,
                        )
                    every += known
                if every:
                    axis.plot(
                        *zip(*_front(every), strict=True), "-", color=colour, linewidth=1.8, label=package
                    )
            axis.set(xscale="log", yscale="log", xlabel=label, title=f"gradient by {quantity}")
            plain_ticks(axis.xaxis)
            axis.grid(alpha=0.25)
        row[0].set_ylabel("relative error to the true flow's gradient")
    axes[0][0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
