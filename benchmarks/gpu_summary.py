"""What the results of :mod:`benchmarks.gpu` say, in rows."""

from __future__ import annotations

from typing import Any

GIB = 2**30
_KEY = ("model", "dtype", "wants", "through", "steps")
NAMES = {
    "sd15": "SD1.5 512²",
    "sdxl": "SDXL 1024²",
    "sd3-medium": "SD3-medium 1024²",
    "flux-dev": "Flux-dev 1024²",
}


def find(data: dict[str, Any], **keys: Any) -> dict[str, Any] | None:
    """The finished cell with these values."""
    for cell in data["cells"]:
        if cell["status"] == "done" and all(cell.get(k) == v for k, v in keys.items()):
            return cell
    return None


def group_of(cell: dict[str, Any]) -> dict[str, Any]:
    """What the cells of one table row have in common."""
    return {k: cell[k] for k in _KEY}


def over(data: dict[str, Any], cell: dict[str, Any], method: str) -> float | None:
    """Time as a multiple of another method's in the same group (for ``forward``: with all steps)."""
    same = group_of(cell) | ({"through": "all"} if method == "forward" else {})
    other = find(data, **same, method=method)
    return cell["seconds"] / other["seconds"] if other and "seconds" in cell else None


def largest(data: dict[str, Any], cell: dict[str, Any]) -> int | None:
    """The largest N that fits the card with this method, on a line through two measured peaks; None without two."""
    card = data["machine"].get("accelerator_bytes")
    same = {k: v for k, v in group_of(cell).items() if k != "steps"} | {"method": cell["method"]}
    points = sorted(
        {
            c["steps"]: c["peak_bytes"] for c in data["cells"] if c["status"] == "done" and _has(c, same)
        }.items()
    )
    if card is None or len(points) < 2:
        return None
    (n, low), (m, high) = points[0], points[-1]
    slope = (high - low) / (m - n)
    return None if slope <= 0 else int((card - low) / slope + n)


def _has(cell: dict[str, Any], same: dict[str, Any]) -> bool:
    return all(cell.get(k) == v for k, v in same.items())


def planned(data: dict[str, Any], cell: dict[str, Any]) -> float | None:
    """Planned peak over measured peak: of a budget's own plan, or of plain autograd."""
    if "planned_bytes" in cell:
        return cell["planned_bytes"] / cell["peak_bytes"]
    if cell["method"] not in ("plain", "max"):
        return None
    plan = cell.get("plan") or {}
    return plan["plain"] / cell["peak_bytes"] if plan.get("status") == "done" else None


def table(data: dict[str, Any], wanted: list[dict[str, Any]] | None = None) -> list[str]:
    """One line a cell: all that there are, or all that are wanted."""
    lines = []
    for cell in wanted if wanted is not None else data["cells"]:
        keys = {**group_of(cell), "method": cell["method"]}
        known = [c for c in data["cells"] if _has(c, keys)]
        lines.append(_line(data, known[0] if known else cell | {"status": "not measured"}))
    return lines


def _line(data: dict[str, Any], cell: dict[str, Any]) -> str:
    head = f"{cell['model']:10} {cell['dtype']:8} {cell['wants']:5} {cell['through']:6} "
    head += f"N={cell['steps']:<3} {cell['method']:13}"
    if cell["status"] != "done":
        return f"{head} {cell['status']} {cell.get('says', '')}".rstrip()
    parts = [f"{cell['seconds']:7.2f} s", f"{cell['peak_bytes'] / GIB:7.2f} GiB"]
    for method in ("forward", "plain"):
        ratio = over(data, cell, method)
        parts += [f"{ratio:.2f} × {method}"] if ratio is not None and cell["method"] != method else []
    ratio = planned(data, cell)
    parts += [f"planned/measured {ratio:.2f}"] if ratio is not None else []
    n = largest(data, cell)
    parts += [f"largest N about {n}"] if n is not None else []
    if "relative_difference" in cell:
        same = "the bits" if cell["bits"] else f"{cell['relative_difference']:.1e} off that"
        parts.append(f"{same} of {cell['compared_with']}")
    return f"{head} {', '.join(parts)}"


def figures(data: dict[str, Any]) -> list[list[str]]:
    """The README's rows: for each group with a forward run, what the methods took."""
    card, rows = data["machine"]["accelerator"], []
    groups = {tuple(group_of(c).items()): None for c in data["cells"] if c["status"] == "done"}
    for group in groups:
        same = dict(group)
        if (same["model"], same["wants"], same["dtype"]) not in _LEADING or same["steps"] not in (4, 10, 30):
            continue
        said = [_said(data, c) for c in data["cells"] if _has(c, same) and c["method"] != "forward"]
        if said:
            wants = {"noise": "noise gradient", "lora": "LoRA gradient"}[same["wants"]]
            span = "" if same["through"] == "all" else f", {same['through']} steps"
            rows.append(
                [
                    f"{NAMES[same['model']]}, {wants}{span}, N = {same['steps']}, bf16, on {card}",
                    "; ".join(said),
                ]
            )
    return rows


_LEADING = {
    ("sdxl", "noise", "bfloat16"),
    ("sd3-medium", "lora", "bfloat16"),
    ("flux-dev", "noise", "bfloat16"),
    ("sd15", "noise", "bfloat16"),
}
_SHOWN = {
    "fifteen": "the fifteen lines",
    "plain": "plain autograd",
    "blocks": "diffusers' block checkpointing",
}


def _said(data: dict[str, Any], cell: dict[str, Any]) -> str:
    name = _SHOWN.get(cell["method"], f'`"{cell["method"]}"`')
    if cell["status"] != "done":
        return f"{name}: {cell['status']}"
    ratio = over(data, cell, "forward")
    times = f"{ratio:.1f} × sampling, " if ratio is not None else ""
    return f"{name}: {times}{cell['peak_bytes'] / GIB:.1f} GiB"
