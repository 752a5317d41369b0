"""The pictures of docs/guidance-tables.md: grids of samples, and lines from the results files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from . import plan
from .setting import Case, picture
from .tables import TITLES, Data, Table
from .tasks import TASKS, subject
from .ways import DOODL, FREEDOM, SAG, TFG, UNGUIDED, UNIVERSAL, Way

COLOURS = {
    SAG: "#0b6e4f",
    FREEDOM: "#c8553d",
    UNIVERSAL: "#5b6ee1",
    TFG: "#b8860b",
    DOODL: "#8e44ad",
    UNGUIDED: "#777777",
}
METHODS = {
    "plain autograd": "#222222",
    "vanilla adjoint, original form": "#c8553d",
    "vanilla adjoint, exponential form": "#5b6ee1",
    "symplectic adjoint": "#0b6e4f",
}
SCALE = 2  # of pictures in a grid


def write(folder: Path, images: Path, pictures: Path) -> list[Path]:
    """Every picture whose results are there."""
    images.mkdir(parents=True, exist_ok=True)
    made = []
    for task in TASKS:
        table = Table.read(folder, task)
        if table is None:
            continue
        if strengths(table, images / f"guidance-{task}-strengths.png"):
            made.append(images / f"guidance-{task}-strengths.png")
        if samples(table, task, pictures, images / f"guidance-{task}.png"):
            made.append(images / f"guidance-{task}.png")
        if task == "style" and by_n(table, images / "guidance-n.png"):
            made.append(images / "guidance-n.png")
    for name, draw in (("step", step), ("estimates", estimates)):
        path = folder / f"guidance-{name}.json"
        if path.exists() and draw(json.loads(path.read_text()), images / f"guidance-{name}.png"):
            made.append(images / f"guidance-{name}.png")
    return made


def _figure(columns: int, width: float = 4.6, height: float = 3.6) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.25)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> bool:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True


def strengths(table: Table, path: Path) -> bool:
    """Loss against CLIP score for all strengths that were tried."""
    from .page import searches_of

    searches = searches_of(table)
    if not searches:
        return False
    figure, (axis,) = _figure(1, 6.2, 4.4)
    for entry in searches:
        way, tried = Way(**entry["way"]), entry["tried"]
        once = way.rule == FREEDOM and not way.attempts
        told = {SAG: f", n = {way.n}", FREEDOM: ", once" if once else ", equal seconds"}
        label = TITLES[way.rule] + told.get(way.rule, "")
        style = {"color": COLOURS[way.rule], "linestyle": ":" if once else "-"}
        axis.plot(
            [c for _, _, c in tried], [v for _, v, _ in tried], "o", markersize=3.5, label=label, **style
        )
        chosen = [(c, v) for w, v, c in tried if w == entry["w"]]
        axis.plot(
            *zip(*chosen, strict=True), "o", markersize=9, markerfacecolor="none", color=COLOURS[way.rule]
        )
    axis.axvline(searches[0]["floor"], color="#999999", lw=1, label="least CLIP score allowed")
    axis.set(
        xlabel="CLIP score (to the prompt), mean",
        ylabel="loss, mean",
        title="all strengths tried; rings: chosen",
    )
    axis.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def by_n(table: Table, path: Path) -> bool:
    """Differences to the usual n in loss and CLIP score, picture by picture, and the cost, against n."""
    ways = [w for w in table.data.get("ablations", {}).get("n", []) if table.has(w)]
    cases = table.cases(ways, table.data.get("ablated cases", [])) if ways else []
    usual = next((w for w in ways if w.get("n") == plan.N), None)
    if len(ways) < 2 or not cases or usual is None:
        return False
    figure, axes = _figure(3, 4.1)
    ns = [Way(**w).n for w in ways]
    for axis, score, title in zip(axes, ("loss", "CLIP score"), ("style loss", "CLIP score"), strict=False):
        found = [table.beyond(w, usual, cases, score) for w in ways]
        values, errors = [m.value for m in found], [m.error for m in found]
        axis.errorbar(ns, values, errors, fmt="o-", color=COLOURS[SAG], capsize=2)
        axis.axhline(0, color="#999999", lw=0.8)
        axis.set(
            xlabel="n, steps of the estimate", title=f"{title} − that of n = {plan.N} (± standard error)"
        )
        axis.title.set_fontsize(10)
    axes[2].plot(ns, [table.seconds(w, cases) for w in ways], "o-", color=COLOURS[SAG])
    axes[2].set(xlabel="n, steps of the estimate", title="seconds of a run of five pictures", ylim=(0, None))
    axes[2].title.set_fontsize(10)
    return _save(figure, path)


def step(data: Data, path: Path) -> bool:
    """Time, memory and gradient error of one guided step against n."""
    cells = data["cells"]
    if not cells:
        return False
    figure, axes = _figure(3, 4.3)
    here = next(c for c in cells if c["cells"][0]["seconds"])
    parts: list[tuple[str, Callable[[Data], float]]] = [
        ("seconds of one guided step, five pictures", lambda c: median(c["seconds"])),
        ("peak of live tensors, MB", lambda c: c["peak bytes"] / 1e6),
        (f"relative error of the gradient, step {here['key']['index'] + 1}", lambda c: c["error"]),
    ]
    for axis, (title, of) in zip(axes, parts, strict=True):
        for name, colour in METHODS.items():
            line = [(c["n"], of(c)) for c in here["cells"] if c["method"] == name]
            if not any(value for _, value in line):  # plain autograd's error, which is 0 by definition
                continue
            dashed = "--" if name == "symplectic adjoint" else "-"
            axis.plot(*zip(*line, strict=True), "o" + dashed, markersize=3.5, color=colour, label=name)
        axis.set(xlabel="n, steps of the estimate", title=title)
        axis.title.set_fontsize(10)
    axes[0].set_ylim(0, None)
    axes[1].set_ylim(0, None)
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=7.5, frameon=False)
    return _save(figure, path)


def estimates(data: Data, path: Path) -> bool:
    """Estimates' distance from the finished picture, and their pulls' cosine, against n."""
    cells = [c for c in data["cells"] if "index" in c["key"]]
    if not cells:
        return False
    figure, axes = _figure(3, 4.3)
    indices = sorted({c["key"]["index"] for c in cells})
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    for axis, what, title in zip(
        axes,
        ("pixels", "gap", "cosine"),
        (
            "RMS distance from the finished picture",
            "|style loss − the finished picture's|",
            "cosine of the pull and the exact one",
        ),
        strict=True,
    ):
        for place, index in enumerate(indices):
            own = [e for c in cells if c["key"]["index"] == index for e in c["cells"]]
            ns = sorted({e["n"] for e in own})
            line = [mean(e[what] for e in own if e["n"] == n) for n in ns]
            axis.plot(
                ns, line, "o-", markersize=3.5, color=colours(place / len(indices)), label=f"step {index + 1}"
            )
        axis.set(xlabel="n, steps of the estimate", title=title)
        axis.title.set_fontsize(10)
    axes[0].legend(fontsize=7.5, frameon=False)
    return _save(figure, path)


def samples(table: Table, task: str, pictures: Path, path: Path) -> bool:
    """Example pictures: a row for each way, the references above; the first picture of each case."""
    from .page import rows_of

    every = [row for row in rows_of(table) if row[2] != plan.PUBLISHED]  # measured on few cases
    known = (
        table.cases([k for _, k, _ in every], [c.key for c in plan.spread(TASKS[task].cases)])
        if every
        else []
    )
    chosen = _examples(known)
    rows, labels = [], []
    if task != "aesthetic" and chosen:
        rows.append(torch.cat([_reference(task, c["reference"]) for c in chosen], 2))
        labels.append("reference")
    from .bench import picture_file

    for way, _, group in every:
        files = [picture_file(pictures, task, way, Case(**case)) for case in chosen]
        if not files or not all(f.exists() for f in files):
            continue
        rows.append(torch.cat([torch.load(f)[0] for f in files], 2))
        name = TITLES[way.rule].replace(" ", "\n")
        labels.append(name + ("" if way.rule in (SAG, UNGUIDED) else f"\n{group}"))
    if len(rows) < 2:
        return False
    return _grid(rows, labels, path)


def _examples(cases: Sequence[Data]) -> list[Data]:
    """Ten cases at most, two of each reference, of different prompts."""
    found: list[Data] = []
    for reference in dict.fromkeys(c["reference"] for c in cases):
        found += [c for c in cases if c["reference"] == reference][:2]
    return found[:10]


@torch.no_grad()
def _reference(task: str, name: str) -> Tensor:
    from backdrift.losses import load_picture, prepare

    given = subject(name) if task == "object" else load_picture(name)
    return picture(prepare(given[None], 64, torch.zeros(3), torch.ones(3)))[0]


def _grid(rows: Sequence[Tensor], labels: Sequence[str], path: Path) -> bool:
    """Rows of pictures (3, 64, W) uint8 under each other, their names to the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height, width = rows[0].shape[1:]
    figure, axes = pyplot.subplots(
        len(rows), 1, figsize=(1.3 + SCALE * width / 100, len(rows) * (SCALE * height / 100 + 0.04))
    )
    for axis, row, label in zip(axes, rows, labels, strict=True):
        axis.imshow(row.permute(1, 2, 0).numpy(), interpolation="lanczos")
        axis.set_axis_off()
        axis.text(-8, height / 2, label, ha="right", va="center", fontsize=9)
    left = 1.3 / (1.3 + SCALE * width / 100)
    figure.subplots_adjust(left=left, right=1, top=1, bottom=0, hspace=0.03)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return True
