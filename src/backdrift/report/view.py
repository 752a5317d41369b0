"""A record as the template wants it: every number already text, every picture already embedded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from . import figures
from .again import again
from .comparison import comparison, curves
from .pictures import embed
from .plot import Curve, draw

#: status of a record -> (words, class in the style sheet)
STATUS = {
    "finished": "good",
    "stopped early": "good",
    "running": "busy",
    "interrupted": "busy",
    "failed": "bad",
}


def view(folder: Path, record: Mapping[str, Any], *, blur_flagged: bool = True) -> dict[str, Any]:
    """Everything the template shows of one run."""
    iterations = record.get("iterations") or []
    pictures = [
        embed(folder, name, entry, blur_flagged=blur_flagged)
        for name, entry in (record.get("pictures") or {}).items()
    ]
    return {
        "kind": str(record.get("kind", "run")).replace("-", " "),
        "title": record.get("title") or record.get("kind", "run"),
        "status": record.get("status", ""),
        "tone": STATUS.get(str(record.get("status")), "busy"),
        "message": record.get("message") or "",
        "when": _when(record.get("created")),
        "prompts": [str(p) for p in record.get("prompt") or []],
        "cards": [p for p in pictures if not p["strip"]],
        "strips": [p for p in pictures if p["strip"]],
        "flagged": any(p["hidden"] for p in pictures),
        "tiles": tiles(record),
        "plots": plots(record),
        "trace": trace(record),
        "comparison": comparison(record),
        "tables": [tabulated(table) for table in record.get("tables") or []],
        "curves": curves(record),
        "figures": [(k, figures.number(v)) for k, v in (record.get("figures") or {}).items()],
        "settings": sorted(settings(record.get("settings") or {})),
        "files": [(str(f["path"]), str(f.get("caption", ""))) for f in (record.get("files") or {}).values()]
        + [(str(t["path"]), _shapes(t)) for t in (record.get("tensors") or {}).values()],
        "versions": list((record.get("versions") or {}).items()),
        "machine": [(k, str(v)) for k, v in (record.get("machine") or {}).items()],
        "again": again(folder, record),
        "table": table(iterations),
        "seed": record.get("seed"),
    }


def tiles(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: loss, iterations, time, network calls, memory; only what is known."""
    iterations, best, stats = record.get("iterations") or [], record.get("best"), record.get("stats") or {}
    found: list[dict[str, str]] = []

    def add(name: str, value: str, *notes: str) -> None:
        found.append({"name": name, "value": value, "note": " · ".join(note for note in notes if note)})

    if best and iterations:
        first, last = iterations[0].get("loss"), best.get("loss")
        value = f"{figures.number(first, 3)} → {figures.number(last, 3)}"
        add("loss", value, figures.change(first, last), f"best at iteration {best.get('iteration')}")
    if len(iterations) > 1:
        each = sorted(entry["seconds"] for entry in iterations if entry.get("seconds") is not None)
        note = f"{figures.seconds(each[len(each) // 2])} each" if each else ""
        add("iterations", figures.number(iterations[-1]["iteration"]), note)
    if stats.get("seconds") is not None:
        add("time", figures.seconds(stats["seconds"]))
    if stats.get("network_calls") is not None:
        notes = [(stats.get("redone"), "redone"), (stats.get("vjps"), "VJPs")]
        known = [f"{figures.number(count)} {what}" for count, what in notes if count is not None]
        add("network calls", figures.number(stats["network_calls"]), *known)
    if stats.get("peak_bytes") is not None:
        add("peak memory", figures.size(stats["peak_bytes"]), "activations held")
    return found


def plots(record: Mapping[str, Any]) -> dict[str, Any]:
    """The loss curve, wide and narrow (for phones), and its legend."""
    iterations, best = record.get("iterations") or [], record.get("best")
    curves = [Curve("loss", _points(iterations, "loss"))]
    if held := _points(iterations, "heldout"):
        curves.append(Curve("held-out score", held, "second"))
    curves += _per_sample(iterations)
    mark = None
    if best and best.get("loss") is not None:
        at = [y for x, y in curves[0].points if x == best["iteration"]]
        mark = (float(best["iteration"]), at[0]) if at else None
    legend = [("main", "loss" if len(curves) == 1 else "mean loss")]
    legend += [("second", "held-out score")] if held else []
    legend += [("faint", "each sample")] if any(c.style == "faint" for c in curves) else []
    return {
        "wide": draw(curves, width=760, height=280, mark=mark),
        "narrow": draw(curves, width=350, height=230, mark=mark),
        "legend": legend if len(legend) > 1 else [],
    }


def trace(record: Mapping[str, Any]) -> dict[str, Any]:
    """The last gradient's norm at the sampler's steps, as a curve, wide and narrow; what to say of it."""
    found = record.get("trace") or {}
    points = [
        (float(i), float(norm)) for i, norm in enumerate(found.get("latents") or ()) if norm is not None
    ]
    eps = [(float(i), float(norm)) for i, norm in enumerate(found.get("eps") or ()) if norm is not None]
    curves = [Curve("at the latents that enter a step", points)]
    curves += [Curve("at the network's output", eps, "second")] if eps else []
    notes = [f"in iteration {found.get('iteration')}"] if found else []
    if found and found.get("through") not in (None, "all"):
        notes.append(f"through {found['through']}")
    notes += (
        ["it explodes: over 1000 times its size at the finished latents"] if found.get("exploding") else []
    )
    notes += [f"clipped at {len(found['clipped'])} boundaries"] if found.get("clipped") else []
    label, across = "norm of the gradient", "step, from noise (left) to picture"
    return {
        "wide": draw(curves, width=760, height=220, label=label, across=across),
        "narrow": draw(curves, width=350, height=200, label=label, across=across),
        "legend": [(curve.style, curve.name) for curve in curves] if len(curves) > 1 else [],
        "note": "; ".join(notes),
    }


def _per_sample(iterations: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A faint line per sample, where every iteration measured the same few samples."""
    samples = {tuple(entry.get("examples") or ()) for entry in iterations}
    if len(samples) != 1 or not 2 <= len(next(iter(samples))) <= 24:
        return []
    lines = []
    for i, sample in enumerate(next(iter(samples))):
        points = [
            (float(e["iteration"]), float(e["per_sample"][i]))
            for e in iterations
            if len(e.get("per_sample") or []) > i and e["per_sample"][i] is not None
        ]
        lines.append(Curve(f"sample {sample}", points, "faint"))
    return lines


def _points(iterations: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(e["iteration"]), float(e[name])) for e in iterations if e.get(name) is not None]


def table(iterations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The iterations as rows; columns that no iteration fills are left out."""
    columns = ["iteration", "loss", "heldout", "prior", "grad_norm", "lr", "seconds"]
    columns = [c for c in columns if any(e.get(c) is not None for e in iterations)]
    names = {"heldout": "held-out", "grad_norm": "gradient norm", "lr": "learning rate"}
    return {
        "columns": [names.get(c, c) for c in columns],
        "rows": [[figures.number(e.get(c)) for c in columns] for e in iterations],
    }


def tabulated(given: Mapping[str, Any]) -> dict[str, Any]:
    """A table that the record itself holds; numbers become text."""
    rows = [[figures.number(cell) for cell in row] for row in given["rows"]]
    return {"title": given["title"], "columns": given["columns"], "rows": rows, "note": given.get("note", "")}


def settings(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The settings as names and text; a setting within a setting is called ``outer.inner``."""
    rows: list[tuple[str, str]] = []
    for name, value in nested.items():
        if isinstance(value, Mapping) and value and not prefix:
            rows += settings(value, f"{name}.")
        elif isinstance(value, Mapping | list):
            rows.append((prefix + name, json.dumps(value, ensure_ascii=False)))
        else:
            rows.append((prefix + name, "none" if value is None else figures.number(value)))
    return rows


def _shapes(entry: Mapping[str, Any]) -> str:
    shapes = entry.get("shapes") or {}
    shown = [f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in list(shapes.items())[:4]]
    return ", ".join(shown) + (f", … ({len(shapes)} tensors)" if len(shapes) > 4 else "")


def _when(text: Any) -> str:
    try:
        return datetime.fromisoformat(str(text)).strftime("%-d %B %Y, %H:%M UTC")
    except ValueError:
        return str(text or "")
