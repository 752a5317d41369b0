"""docs/guidance-tables.md and its pictures, from the results files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ..marked import rewritten
from . import plots
from .plan import LEAST, ONCE, PUBLISHED
from .tables import HIGHER, Data, Table, called, number, shown
from .ways import DOODL, SAG, UNGUIDED, Way

PAGE = Path(__file__).parents[2] / "docs" / "guidance-tables.md"
IMAGES = PAGE.parent / "images"
SHOWN = {
    "style": ("loss", "style, classifier", "CLIP score", "digit as named"),
    "aesthetic": ("loss", "colourfulness", "contrast", "CLIP score", "digit as named"),
    "object": ("loss", "CLIP-I", "CLIP score", "digit as in the reference"),
}
NAMES = {"loss": "loss", "CLIP score": "CLIP score"}
PAPER_STEPS = 100
LONG = ("style",)  # tasks that were run at the paper's number of steps, too
ABLATIONS = ("n", "n, equal seconds", "subgrid", "range", "repeats")


def blocks(folder: Path) -> dict[str, str]:
    """What stands between the page's markers, by marker."""
    found = {}
    for task in SHOWN:
        table = Table.read(folder, task)
        found[task] = "Not measured yet." if table is None else compared(table, task)
        found[f"{task} strengths"] = "Not measured yet." if table is None else searched(table)
    for task in LONG:
        table = Table.read(folder, task, PAPER_STEPS)
        name = f"{task}, {PAPER_STEPS} steps"
        found[name] = "Not measured yet." if table is None else compared(table, task)
        found[f"{name}, strengths"] = "Not measured yet." if table is None else searched(table)
    style = Table.read(folder, "style")
    for kind in ABLATIONS:
        found[f"ablation {kind}"] = "Not measured yet." if style is None else ablation(style, kind)
    found["step"] = stepped(_read(folder, "step"))
    found["estimates"] = estimated(_read(folder, "estimates"))
    found["saturation"] = saturated(_read(folder, "estimates"))
    found["units"] = timed(_read(folder, "units"))
    return found


def _read(folder: Path, name: str) -> Data:
    path = folder / f"guidance-{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, rows)])


def rows_of(table: Table) -> list[tuple[Way, Data, str]]:
    """The measured rows in reading order: way, its key, group."""
    found = [(Way(**row["way"]), row["way"], row["group"]) for row in table.data.get("rows", [])]
    reported = _cases(table)
    found = [row for row in found if table.has(row[1]) and table.cases([row[1]], reported)]
    order = (UNGUIDED, "UG", "FreeDoM", "TFG", DOODL, SAG)
    return sorted(found, key=lambda row: (order.index(row[0].rule), row[2] != ONCE, row[0].attempts))


def compared(table: Table, task: str) -> str:
    """One line for each way: scores, differences to SAG, cost; each on the cases that SAG and it were measured on."""
    every = rows_of(table)
    ours = next((key for way, key, _ in every if way.rule == SAG), None)
    if ours is None or len(every) < 2:
        return "Not measured yet."
    cases = table.cases([ours], _cases(table))
    pictures = len(table.values(ours, cases, "loss"))
    scores = SHOWN[task]
    head = ["", *(f"{s} {'↑' if s in HIGHER else '↓'}" for s in scores)]
    head += ["loss − SAG's", "attempts", "calls + VJPs + decodings", "seconds"]
    lines = []
    for way, key, group in every:
        own = table.cases([key, ours], cases)
        counts, label = table.counts(key, own), called(way)
        if way.rule not in (UNGUIDED, SAG):
            label += f", {group}"
        if len(own) < len(cases):
            label += f" ({len(table.values(key, own, 'loss'))} pictures)"
        lines.append(
            [
                label,
                *(shown(table.mean(key, own, s)) for s in scores),
                "" if key == ours else shown(table.beyond(key, ours, own, "loss"), sign=True),
                "" if way.rule == UNGUIDED else str(_attempts(way, table)),
                f"{counts.forward + counts.redone - counts.vjps} + {counts.vjps} + {counts.decodes}",
                number(table.seconds(key, own)),
            ]
        )
    text = f"{pictures} pictures a row ({len(cases)} runs of {pictures // len(cases)}).\n\n"
    return text + _table(head, lines)


def _cases(table: Table) -> list[Data]:
    """All cases that are no trial's: the tables' own."""
    seen: dict[str, Data] = {}
    for cell in table.data["cells"]:
        if "way" in cell["key"] and cell["key"]["case"]["seed"] < 9000:
            seen[json.dumps(cell["key"]["case"])] = cell["key"]["case"]
    return list(seen.values())


def _steps(table: Table) -> int:
    return int(table.data["settings"]["steps"])


def searches_of(table: Table) -> list[Data]:
    """The searches of the rows that are reported."""
    known = [(way.rule, way.attempts) for way, _, _ in rows_of(table)]
    every = table.data.get("searches", [])
    return [e for e in every if (e["way"]["rule"], e["way"].get("attempts", 0)) in known]


def searched(table: Table) -> str:
    """What each method's search tried, and what was chosen."""
    lines, found = [], searches_of(table)
    for entry in found:
        way = Way(**entry["way"])
        tried = [f"{number(w)}: {number(loss, 4)}, {number(clip)}" for w, loss, clip in entry["tried"]]
        tried = [
            f"**{t}**" if w == entry["w"] else t for t, (w, _, _) in zip(tried, entry["tried"], strict=True)
        ]
        lines.append([called(way), str(_attempts(way, table)), "; ".join(tried)])
    if not lines:
        return "Not measured yet."
    head = ["", "attempts", f"w: loss, CLIP score (at least {number(found[0]['floor'])}; chosen in bold)"]
    return _table(head, lines)


def _attempts(way: Way, table: Table) -> int:
    return way.attempts or len(way.guided(_steps(table)))


def ablation(table: Table, kind: str) -> str:
    """SAG with one setting changed."""
    ways = table.data.get("ablations", {}).get(kind, [])
    ways = [w for w in ways if table.has(w)]
    other = [w for w in table.data.get("ablations", {}).get("range, n = 1", []) if table.has(w)]
    every = ways + (other if kind == "range" else [])
    cases = table.cases(every, table.data.get("ablated cases", [])) if every else []
    if not cases:
        return "Not measured yet."
    usual = next((w for w in ways if Way(**w).key == _usual(table)), ways[0])
    scores = ("loss", "style, classifier", "CLIP score", "digit as named")
    head = [kind, *(f"{s} {'↑' if s in HIGHER else '↓'}" for s in scores)]
    head += ["loss − usual's", "seconds"]
    lines = []
    for key in every:
        way = Way(**key)
        label = {
            "n": f"{way.n}",
            "n, equal seconds": f"{way.n} ({_attempts(way, table)} attempts, w = {way.w:g})",
            "subgrid": way.subgrid,
            "range": f"{way.start:g} to {way.stop:g}" + ("" if key in ways else ", FreeDoM, equal seconds"),
            "repeats": str(_attempts(way, table) // len(way.guided(_steps(table)))),
        }[kind]
        lines.append(
            [
                label,
                *(shown(table.mean(key, cases, s)) for s in scores),
                "" if key == usual else shown(table.beyond(key, usual, cases, "loss"), sign=True),
                number(table.seconds(key, cases)),
            ]
        )
    pictures = len(table.values(every[0], cases, "loss"))
    return f"{pictures} pictures a row.\n\n" + _table(head, lines)


def _usual(table: Table) -> Data:
    return next((row["way"] for row in table.data.get("rows", []) if row["way"]["rule"] == SAG), {})


def stepped(data: Data) -> str:
    """Time, memory and exactness of one guided step."""
    cells = data.get("cells", [])
    if not cells:
        return "Not measured yet."
    timed_at = next(c for c in cells if c["cells"][0]["seconds"])
    steps = sorted({c["n"] for c in timed_at["cells"]})
    names = list(dict.fromkeys(c["method"] for c in timed_at["cells"]))
    at = {(c["method"], c["n"]): c for c in timed_at["cells"]}
    parts = []
    for title, of in (
        ("seconds", lambda c: number(median(c["seconds"]))),
        ("peak of live tensors beside the weights, MB", lambda c: number(c["peak bytes"] / 1e6)),
    ):
        lines = [[name, *(of(at[name, n]) for n in steps)] for name in names]
        parts.append(_table([title, *(f"n = {n}" for n in steps)], lines))
    for cell in cells:
        found = {(c["method"], c["n"]): c for c in cell["cells"]}
        lines = [[name, *(_error(found[name, n]["error"]) for n in steps)] for name in names]
        parts.append(
            _table(
                [f"gradient's error, step {cell['key']['index'] + 1}", *(f"n = {n}" for n in steps)], lines
            )
        )
    return "\n\n".join(parts)


def _error(value: float) -> str:
    if value == 0 or value >= 1e-2:
        return f"{value:.2f}" if value else "0"
    return f"{value:.1e}".replace("e-0", "e-")


def estimated(data: Data) -> str:
    """How good the estimates are along the run, means over the cases."""
    cells = [c for c in data.get("cells", []) if "index" in c["key"]]
    if not cells:
        return "Not measured yet."
    indices = sorted({c["key"]["index"] for c in cells})
    steps = sorted({e["n"] for c in cells for e in c["cells"]})
    parts = []
    for what, title in (
        ("pixels", "RMS distance of the estimate's picture from the finished one, in [0, 1]"),
        ("gap", "distance of its loss from the finished picture's"),
        ("cosine", "cosine between its pull and the one through all steps left"),
    ):
        lines = []
        for index in indices:
            own = [c for c in cells if c["key"]["index"] == index]
            row = []
            for n in steps:
                values = [e[what] for c in own for e in c["cells"] if e["n"] == n]
                row.append(number(sum(values) / len(values)) if values else "–")
            lines.append([f"{index + 1} ({own[0]['left']} left)", *row])
        parts.append(_table([f"{title}; step", *(f"n = {n}" for n in steps)], lines))
    return "\n\n".join(parts)


def saturated(data: Data) -> str:
    """The loss of pictures that are in the style as much as can be."""
    cell = next((c for c in data.get("cells", []) if "saturation" in c["key"]), None)
    if cell is None:
        return "Not measured yet."
    names = list(next(iter(cell["found"].values())))
    return _table(
        ["loss of", *names],
        [[name, *(number(row[n], 4) for n in names)] for name, row in cell["found"].items()],
    )


def timed(data: Data) -> str:
    """Unit times, and the sum of units against whole attempts."""
    cells = {c["key"]["task"]: c for c in data.get("cells", []) if c["key"]["purpose"] == "plan"}
    cells |= {c["key"]["task"]: c for c in data.get("cells", []) if c["key"]["purpose"] == "report"}
    if not cells:
        return "Not measured yet."
    lines = []
    for task, cell in cells.items():
        at = {name: median(values) for name, values in cell["seconds"].items()}
        ratios = []
        for n in (1, 4):
            model = n * at["forward"] + n * at["product"] + at["decode"]
            ratios.append(f"{number(at[f'attempt, n = {n}'])} ({number(model)})")
        lines.append([task, *(number(at[k]) for k in ("forward", "product", "decode")), *ratios])
    head = ["seconds of a batch", "call", "call redone + VJP", "decoding + loss + gradient"]
    about = data["machine"]
    return _table([*head, "attempt, n = 1 (by units)", "attempt, n = 4 (by units)"], lines) + (
        f"\n\n{about['processor']}, {about['threads']} thread, torch {about['torch']}, diffusers {about['diffusers']}; "
        f"medians of {len(next(iter(cells.values()))['seconds']['forward'])} interleaved repeats."
    )


def filled(folder: Path) -> str:
    """The page with its blocks written anew.

    Raises:
        ValueError: a marker is missing.
    """
    return rewritten(PAGE.read_text(), {name: f"{block}\n" for name, block in blocks(folder).items()})


def figures(folder: Path) -> list[list[str]]:
    """Rows for the README's table: what was measured, and the value."""
    found = []
    for task, score in (("style", "loss"), ("aesthetic", "loss"), ("object", "CLIP-I")):
        table = Table.read(folder, task)
        every = (
            []
            if table is None
            else [r for r in rows_of(table) if r[2] not in (ONCE, PUBLISHED) or r[0].rule in (UNGUIDED, SAG)]
        )
        if table is None or len(every) < 3:
            continue
        cases = table.cases([key for _, key, _ in every], _cases(table))
        values = [
            f"{called(way)}{' (one step, in more seconds)' if group == LEAST else ''} "
            f"{shown(table.mean(key, cases, score))}"
            for way, key, group in every
        ]
        what = f"guidance, {task}: {score} {'↑' if score in HIGHER else '↓'} at equal seconds"
        found.append([f"{what}, {len(table.values(every[0][1], cases, score))} pictures", "; ".join(values)])
    return found


def write(folder: Path, pictures: Path) -> None:
    """Page and pictures."""
    PAGE.write_text(filled(folder))
    plots.write(folder, IMAGES, pictures)
