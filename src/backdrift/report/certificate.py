"""A certificate's record (``record.json`` of :func:`backdrift.verify`) as one self-contained page, and as text.

The record: ``format``, ``kind``, ``title``, ``created``, ``settings``, ``versions``, ``machine``, ``dtype``; ``rows``
(their fields: :class:`backdrift.verification.rows.Row`); ``flow``, the true flow's reference (``solver``, ``steps``,
``uncertainty``, ``history``); ``references``, of each sampler its ``yardstick``, the yardstick's ``rounding`` against
float64 and the float64 gradient's mismatch with finite ``differences``; ``rounding``, the limit below which an error
counts as rounding, by solver; ``recommendations`` by target; ``notes``. A number that is not known is ``null``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import InputError
from ..files import write_atomically
from .again import again
from .figures import number, seconds, size
from .view import _when, settings
from .work_precision import Series, draw, mark

FORMAT = "backdrift-certificate/1"

TARGETS = {"sampler": "the sampler's own gradient", "flow": "the true flow's gradient"}
_TONES = {"exact": "good", "within": "good", "off": "busy", "failed": "bad", "refused": "busy"}
_AXES = {"calls": "network calls", "seconds": "seconds", "peak_bytes": "MiB held at most"}


def write(folder: str | Path) -> Path:
    """Draw ``<folder>/report.html`` from the certificate in ``folder`` and return its path.

    Raises:
        InputError: there is no readable certificate.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = Path(folder)
    record = read(folder)
    environment = Environment(
        loader=PackageLoader("backdrift.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("certificate.html").render(
        **view(record), again=again(folder, record), version=__version__
    )
    path = folder / "report.html"
    write_atomically(path, lambda file: file.write(page.encode("utf-8")))
    return path


def read(folder: Path) -> dict[str, Any]:
    """The record in a folder.

    Raises:
        InputError: it cannot be read, or is no certificate.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a readable certificate: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{str(path)!r} is not a certificate of the format {FORMAT!r}.")
    return record


def headings() -> list[tuple[str, str]]:
    """The columns of the table, and what they mean."""
    return [
        (
            "method",
            "the gradient method; “coupled”: it runs on the solver's reversible (McCallum–Foster) coupling",
        ),
        ("own err.", "relative error to the sampler's own gradient, that of the steps as they were taken"),
        ("cos", "cosine of the angle to it"),
        (
            "flow err.",
            "relative error to the gradient of the true flow, which infinitely many steps would give",
        ),
        ("cos", "cosine of the angle to that"),
        ("diff.", "relative mismatch with finite differences of the sampler's loss along random directions"),
        ("growth", "how many times as large the adjoint becomes in a step back, on average"),
        ("calls", "network calls: sampling + way back"),
        ("VJPs", "vector–Jacobian products with the network"),
        ("time", "sampling, loss and way back together, measured once"),
        ("memory", "most bytes of tensors held meanwhile, the loss and its decoder included"),
        (
            "verdict",
            "exact: rounding explains the error · within: the tolerance · off: further · failed · refused",
        ),
    ]


def cells(row: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """A row's cells under :func:`headings`."""
    calls = "–" if row["calls_forward"] is None else f"{row['calls_forward']}+{row['calls_redone']}"
    growth = "–" if row["growth"] is None else f"{number(row['growth'], 3)}×"
    return [
        label(row, record),
        _error(row["own"]),
        _cosine(row["own"]),
        _flow_error(row),
        _cosine(row["flow"]),
        number(row["differences"], 2),
        growth,
        calls,
        number(row["vjps"]),
        seconds(row["seconds"]),
        size(row["peak_bytes"]),
        str(row["verdict"]),
    ]


def label(row: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The method's name, with its solver where that could be another one."""
    asked, solver, name = record["settings"]["solver"], str(row["solver"]), str(row["name"])
    base = solver.removeprefix("McCallumFoster(").rsplit(", zeta", 1)[0]
    if solver not in asked and base in asked:
        return f"{name}, coupled" if len(asked) == 1 else f"{name} on {base}, coupled"
    return name if asked == [solver] else f"{name} on {solver}"


def errors_by_steps(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table of the errors at all numbers of steps but the one asked about: its headings and its rows."""
    counts = record["settings"]["steps"][:-1]
    names = ["method", *(f"{kind} @{n}" for kind in ("own", "flow") for n in counts)]
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault(label(row, record), {})[row["steps"]] = row
    rows = []
    for name, by_steps in found.items():
        known = [by_steps.get(n) for n in counts]
        own = ["–" if row is None else _error(row["own"]) for row in known]
        rows.append([name, *own, *("–" if row is None else _flow_error(row) for row in known)])
    return names, rows


def summary(record: Mapping[str, Any]) -> list[str]:
    """What the references are worth, what failed, and what follows: lines of text."""
    lines = [*trust(record), *troubles(record)]
    target = record["settings"]["target"]
    for name in (target, *(t for t in TARGETS if t != target)):
        lines.append(f"Recommended for {TARGETS[name]}: {record['recommendations'][name]['text']}")
    return lines


def trust(record: Mapping[str, Any]) -> list[str]:
    """How far the two references can be trusted."""
    lines = []
    for one in record["references"]:
        if one["directions"] is None:
            continue
        how = f"Own gradient on {one['solver'].replace(', zeta=None', '')}, {one['steps']} steps: {one['yardstick']}"
        if one["rounding"] is not None:
            how += f"; in float64 it differs by {number(one['rounding'], 2)}"
        lines.append(
            f"{how}; finite differences along {_directions(one['directions'])} differ from it by "
            f"{number(one['differences'], 2)} in float64."
        )
    flow = record["flow"]
    half = flow["steps"] // 2
    lines.append(
        f"Flow's gradient: {flow['solver']}, {flow['steps']} steps; with {half} it differs by "
        f"{number(flow['uncertainty'], 2)}, so nothing smaller can be told (≤)."
    )
    return lines


def troubles(record: Mapping[str, Any]) -> list[str]:
    """Methods that failed or were refused, each once, with the reason; and what could not be measured."""
    found: dict[tuple[str, str], str] = {}
    for row in record["rows"]:
        if row["verdict"] in ("failed", "refused"):
            found[label(row, record), row["verdict"]] = row["reason"]
    lines = [f"{name} {verdict}: {reason}" for (name, verdict), reason in found.items()]
    notes = {f"{label(row, record)}: {note}" for row in record["rows"] for note in row["notes"]}
    return lines + sorted(notes) + list(record["notes"])


def view(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows."""
    about = record["settings"]
    target = about["target"]
    other = "flow" if target == "sampler" else "sampler"
    counts = sorted({row["steps"] for row in record["rows"]}, key=lambda n: (n != about["steps"][-1], n))
    chosen = record["recommendations"][target]
    return {
        "title": record["title"],
        "when": _when(record["created"]),
        "seed": about["seed"],
        "chosen": chosen,
        "target": TARGETS[target],
        "other": record["recommendations"][other] | {"target": TARGETS[other]},
        "tiles": tiles(record),
        "trust": trust(record),
        "troubles": troubles(record),
        "headings": headings(),
        "groups": [
            {
                "title": f"{steps} steps",
                "rows": [_shown(row, record, chosen) for row in record["rows"] if row["steps"] == steps],
            }
            for steps in counts
        ],
        "plots": plots(record),
        "settings": sorted(settings(about)),
        "versions": list(record["versions"].items()),
        "machine": [(k, str(v)) for k, v in record["machine"].items()],
    }


def tiles(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top."""
    about, flow = record["settings"], record["flow"]
    judged = [row for row in record["rows"] if row["asked"] and row["verdict"] != "yardstick"]
    exact = sum(row["verdict"] == "exact" for row in judged)
    failed = len({row["name"] for row in record["rows"] if row["verdict"] == "failed"})
    checked = [one["differences"] for one in record["references"] if one["differences"] is not None]
    found = [
        {
            "name": "exact within rounding",
            "value": f"{exact} of {len(judged)}",
            "note": f"at {about['steps'][-1]} steps",
        },
        {"name": "failed", "value": str(failed), "note": "methods that are not what they claim"},
        {
            "name": "tolerance",
            "value": number(float(about["tolerance"]), 2),
            "note": "relative error that will do",
        },
        {
            "name": "true flow known to",
            "value": number(flow["uncertainty"], 2),
            "note": f"{flow['solver']}, {flow['steps']} steps",
        },
    ]
    if checked:
        found.append(
            {
                "name": "finite differences",
                "value": number(max(checked), 2),
                "note": "from the float64 gradient, relative",
            }
        )
    return found


def plots(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Work–precision curves to the flow's gradient and to the sampler's own, and the adjoint on its way back."""
    found = []
    for target in ("flow", "sampler"):
        floor = record["flow"]["uncertainty"] if target == "flow" else None
        panels = [
            {"svg": draw(curves(record, target, x), x=_AXES[x], y="relative error", floor=floor)}
            for x in _AXES
        ]
        if any(panel["svg"] for panel in panels):
            note = (
                "The dashed line is how far the reference itself is known."
                if target == "flow"
                else "Where a method's error is exactly 0 it lies below this picture."
            )
            found.append(
                {
                    "title": f"Error to {TARGETS[target]}",
                    "note": note,
                    "panels": panels,
                    "legend": _legend(record),
                }
            )
    lines = adjoints(record)
    norms = draw(lines, x="node, from data (left) to noise", y="‖dL/dx‖", log_x=False)
    if norms:
        found.append(
            {
                "title": "The adjoint on its way back",
                "note": "Its size at every node of the run at the steps asked for. Exact methods have plain "
                "autograd's. Methods that would go another way if they stopped at every node are left out.",
                "panels": [{"svg": norms}],
                "legend": [(mark(line.place, 6, 6), line.name) for line in lines],
            }
        )
    return found


def curves(record: Mapping[str, Any], target: str, x: str) -> list[Series]:
    """One line per method and solver, over its numbers of steps."""
    found: dict[str, list[tuple[float, float]]] = {}
    scale = 2**20 if x == "peak_bytes" else 1
    for row in record["rows"]:
        measured = row["own" if target == "sampler" else "flow"]
        if row["verdict"] == "yardstick" or row[x] is None or measured is None:
            continue
        error = measured["relative"]
        if error is None:
            continue
        if target == "flow":
            error = max(error, row["flow_uncertainty"])
        found.setdefault(label(row, record), []).append((row[x] / scale, error))
    places = places_of(record)
    return [Series(name, points, places[name]) for name, points in found.items()]


def adjoints(record: Mapping[str, Any]) -> list[Series]:
    """‖dL/dx‖ over the nodes, from data to noise: plain autograd's, and that of each method that goes its own way."""
    places = places_of(record)
    found = []
    for row in record["rows"]:
        name = label(row, record)
        if row["norms"] and row["asked"]:
            points = [(float(i), float(n)) for i, n in enumerate(reversed(row["norms"])) if n is not None]
            plain = row["verdict"] == "yardstick"
            found.append(Series(name, points, len(places) if plain else places[name]))
    return found


def places_of(record: Mapping[str, Any]) -> dict[str, int]:
    """The methods in the order of the table, numbered: their colours."""
    names = [label(row, record) for row in record["rows"] if row["verdict"] != "yardstick"]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _legend(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    refused = {label(row, record) for row in record["rows"] if row["verdict"] == "refused"}
    return [(mark(place, 6, 6), name) for name, place in places_of(record).items() if name not in refused]


def _shown(row: Mapping[str, Any], record: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    best = (row["name"], row["solver"], row["steps"]) == (chosen["name"], chosen["solver"], chosen["steps"])
    return {
        "cells": cells(row, record)[:-1],
        "verdict": row["verdict"],
        "tone": _TONES.get(row["verdict"], ""),
        "method": row["method"],
        "best": best and row["verdict"] != "yardstick",
    }


def _directions(count: int) -> str:
    return "a random direction" if count == 1 else f"{count} random directions"


def _error(difference: Mapping[str, Any] | None) -> str:
    return "–" if difference is None else number(difference["relative"], 2)


def _cosine(difference: Mapping[str, Any] | None) -> str:
    if difference is None or difference["cosine"] is None:
        return "–"
    return f"{difference['cosine']:.4f}".replace("-", "−")


def _flow_error(row: Mapping[str, Any]) -> str:
    if row["flow"] is None or row["flow"]["relative"] is None:
        return "–"
    error, uncertainty = row["flow"]["relative"], row["flow_uncertainty"]
    if uncertainty is not None and error <= uncertainty:
        return f"≤ {number(error + uncertainty, 2)}"
    return number(error, 2)
